"""A run's directory: what is never removed, who may write there, and what stands in the way."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("lightning")

from csdiv.models import checkpoint, data, folder, run, training
from csdiv.models.config import TrainConfig

TINY = TrainConfig(
    epochs=2, warmup_epochs=1, num_components=3, latent_dim=2, hidden_dim=8, num_threads=1, importance_samples=2,
    likelihood_samples=4,
)  # fmt: skip


def tiny_data() -> data.Dataset:
    return data.Dataset.from_tensors(torch.rand(40, 5, generator=torch.Generator().manual_seed(0)))


def files_of(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def make_user_folder(directory: Path) -> dict[str, bytes]:
    """A project in which somebody works, with names that csdiv uses too."""
    for name in ("figures/plot.png", "figures/samples.png", "tensorboard/events.out.tfevents.1", "config.toml",
                 "config.json", "report.html", "metrics.jsonl", "model.safetensors", "src/main.py"):  # fmt: skip
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(f"mine: {name}")
    return files_of(directory)


# what is not a run


@pytest.mark.skipif(find_spec("tensorboard") is not None, reason="TensorBoard is installed")
def test_tensorboard_that_is_missing_costs_no_results(tmp_path: Path) -> None:
    training.train(replace(TINY, output_dir=tmp_path), tiny_data())
    before = files_of(tmp_path)
    with pytest.raises(ValueError, match="tensorboard: not installed"):
        training.train(replace(TINY, output_dir=tmp_path, tensorboard=True), tiny_data(), overwrite=True)
    assert files_of(tmp_path) == before


@pytest.mark.parametrize("place", [".", "{}", "{}/../{}"], ids=["dot", "absolute", "indirect"])
def test_overwrite_refuses_a_folder_that_is_no_run(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = tmp_path / "project"
    before = make_user_folder(project)
    monkeypatch.chdir(project)
    config = replace(TINY, output_dir=place.format(project, project.name))
    for overwrite, message in ((True, "is not a run of csdiv"), (False, "is not empty")):
        with pytest.raises(FileExistsError, match=message):
            training.train(config, tiny_data(), overwrite=overwrite)
        with pytest.raises(FileExistsError, match=message):
            run.train_and_report(config, overwrite=overwrite)
    assert files_of(project) == before


@pytest.mark.parametrize(
    "disguise",
    [
        {"config.json": json.dumps({"name": "a project of JavaScript", "versions": {"node": "20"}})},
        {"config.json": json.dumps({"versions": {"csdiv": "0.1.0"}, "model": {}})},  # the pair that load_model reads
        {"config.toml": "# csdiv 0.1.0\nepochs = 3\n"},
        {"files.txt": "a list of files\nreport.html\n"},
        {"files.txt": "", "run.lock": "", "resume.ckpt": ""},
        {"config.json": "[" * 10000, "config.toml": "# csdiv 0.1.0\n"},
    ],
)
def test_overwrite_refuses_what_only_resembles_a_run(disguise: dict[str, str], tmp_path: Path) -> None:
    make_user_folder(tmp_path)
    for name, content in disguise.items():
        (tmp_path / name).write_text(content)
    before = files_of(tmp_path)
    with pytest.raises(FileExistsError, match="is not a run of csdiv"):
        training.train(replace(TINY, output_dir=tmp_path), tiny_data(), overwrite=True)
    assert files_of(tmp_path) == before


# what is a run


def test_overwrite_removes_what_csdiv_wrote_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(TINY, output_dir=tmp_path / "run")
    fit = training.Trainer.fit

    def with_events(trainer: training.Trainer, *arguments: object, **options: object) -> None:
        (config.output_dir / "tensorboard").mkdir()
        for name in ("events.out.tfevents.1", "hparams.yaml"):
            (config.output_dir / "tensorboard" / name).write_text("")
        fit(trainer, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(training.Trainer, "fit", with_events)
        training.train(config, tiny_data())
    names = files_of(config.output_dir).keys()
    assert names == {folder.LOCK, folder.MANIFEST} | set(
        (config.output_dir / folder.MANIFEST).read_text().split("\n")[1:-1]
    )
    mine = ("notes.txt", "figures/mine.png", "figures/own/a.png", "tensorboard/events.out.tfevents.other", ".hidden")
    for name in mine:
        (config.output_dir / name).parent.mkdir(parents=True, exist_ok=True)
        (config.output_dir / name).write_text("mine")
    for _ in range(2):
        training.train(config, tiny_data(), overwrite=True)
    after = files_of(config.output_dir)
    assert all(after.pop(name) == b"mine" for name in mine)
    assert after.keys() == {name for name in names if not name.startswith("tensorboard")}


@pytest.mark.parametrize("name", ["report.html", "figures/samples.png"])
@pytest.mark.parametrize("mode", ["overwrite", "resume"])
def test_files_of_others_in_a_run_are_not_replaced(name: str, mode: str, tmp_path: Path) -> None:
    training.train(replace(TINY, output_dir=tmp_path), tiny_data())
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    before = files_of(tmp_path)
    with pytest.raises(FileExistsError, match=f"{name} was not written by csdiv"):
        training.train(replace(TINY, output_dir=tmp_path), tiny_data(), **{mode: True})
    assert files_of(tmp_path) == before
    (tmp_path / "scores.json").write_text("mine")
    with pytest.raises(FileExistsError, match=r"scores\.json was not written by csdiv"):
        run.evaluate_run(tmp_path)


def test_overwrite_of_a_run_from_before_there_was_a_manifest(tmp_path: Path) -> None:
    checkpoint.save_config(tmp_path, TINY, tiny_data())
    for name in (
        "metrics.jsonl",
        "report.html",
        "resume.ckpt",
        "tensorboard/events.out.tfevents.9",
        "figures/latent.png",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("old")
    (tmp_path / "figures" / "mine.png").write_text("mine")
    training.train(replace(TINY, output_dir=tmp_path), tiny_data(), overwrite=True)
    after = files_of(tmp_path)
    assert b"old" not in after.values()
    assert after["figures/mine.png"] == b"mine"
    assert not (tmp_path / "tensorboard").exists()


@pytest.mark.parametrize(
    "name", ["../mine", "{}/mine", "figures/../../mine", "notes.txt", "figures/", "", "figures/link/a"]
)
def test_a_manifest_cannot_name_other_files(name: str, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    training.train(replace(TINY, output_dir=directory), tiny_data())
    (tmp_path / "mine").write_text("mine")
    (directory / "notes.txt").write_text("mine")
    (directory / "figures").mkdir()
    (directory / "figures" / "link").symlink_to(tmp_path)
    with (directory / folder.MANIFEST).open("a") as file:
        file.write(name.format(tmp_path) + "\n")
    folder.clear(directory)
    assert (tmp_path / "mine").exists()
    assert {path.name for path in directory.iterdir()} == {folder.LOCK, folder.MANIFEST, "figures", "notes.txt"}


def test_a_linked_folder_of_figures_is_left_alone(tmp_path: Path) -> None:
    directory, gallery = tmp_path / "run", tmp_path / "gallery"
    training.train(replace(TINY, output_dir=directory), tiny_data())
    gallery.mkdir()
    (gallery / "latent.png").write_text("mine")
    (directory / "figures").symlink_to(gallery)
    folder.record(directory, "figures/latent.png")
    folder.clear(directory)
    assert (gallery / "latent.png").read_text() == "mine"


# the data inside


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("source", ["figures", ".", "own.npz", "link"])
def test_data_inside_the_output_directory_are_refused(
    source: str, overwrite: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    training.train(replace(TINY, output_dir=tmp_path / "run"), tiny_data())
    monkeypatch.chdir(tmp_path / "run")
    (tmp_path / "run" / "figures").mkdir()
    np.savez("own.npz", x=np.zeros((9, 2)))
    Path("link").symlink_to("own.npz")
    before = files_of(tmp_path)
    with pytest.raises(ValueError, match="is inside the output directory"):
        run.train_and_report(replace(TINY, data=source, output_dir="."), overwrite=overwrite)
    with pytest.raises(ValueError, match="is inside the output directory"):
        training.train(replace(TINY, data=source, output_dir=tmp_path / "run"), tiny_data(), overwrite=overwrite)
    assert files_of(tmp_path) == before


def test_an_output_directory_inside_the_images_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its figures would be images of the data from then on."""
    monkeypatch.chdir(tmp_path)
    for source in (".", str(tmp_path)):
        with pytest.raises(ValueError, match=r"output_dir: runs/a is inside the images"):
            run.train_and_report(replace(TINY, data=source, output_dir="runs/a"))
    (tmp_path / "train-images-idx3-ubyte").touch()
    with pytest.raises(ValueError, match="not an IDX file"):
        run.train_and_report(replace(TINY, data=".", output_dir="runs/a"))
    assert not (tmp_path / "runs").exists()


def test_drawn_samples_do_not_replace_the_data_of_the_run(tmp_path: Path) -> None:
    own, directory = tmp_path / "own.npz", tmp_path / "run"
    np.savez(own, x=np.random.default_rng(0).random((40, 5)))
    training.train(replace(TINY, data=str(own), output_dir=directory), data.load_data(own))
    before = own.read_bytes()
    (tmp_path / "link.npz").symlink_to(own)
    for output in (own, tmp_path / "link.npz"):
        with pytest.raises(ValueError, match="holds the data of the run"):
            run.sample_run(directory, 3, output, 0)
        with pytest.raises(ValueError, match="holds the data of the run"):
            run.interpolate_run(directory, 2, 3, output, 0)
    assert own.read_bytes() == before


# files where folders are needed, and the other way round


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("name", ["figures", "tensorboard", *folder.FILES, "run.lock", "files.txt"])
def test_a_file_in_the_place_of_a_folder_is_refused_before_training(
    name: str, resume: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "load_data", lambda *_, **__: pytest.fail("too late"))
    if name in folder.FOLDERS:
        (tmp_path / name).write_text("mine")
    else:
        (tmp_path / name).mkdir()
    message = "is a file, and a folder" if name in folder.FOLDERS else "is a folder, and a file"
    with pytest.raises(OSError, match=message):
        run.train_and_report(replace(TINY, output_dir=tmp_path), resume=resume, overwrite=not resume)


@pytest.mark.parametrize("below", ["", "deeper/still"])
def test_an_output_directory_that_cannot_be_is_refused(below: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "dangling"):
        (tmp_path / "dangling").unlink(missing_ok=True)
        (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
        with pytest.raises(NotADirectoryError, match="a folder is needed"):
            run.train_and_report(replace(TINY, output_dir=place / below), overwrite=True)
    assert (tmp_path / "file").read_text() == "mine"


# two runs


HOLD = """
import sys
from pathlib import Path
from csdiv.models import folder
with folder.held(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("mode", [{}, {"overwrite": True}, {"resume": True}], ids=str)
@pytest.mark.parametrize("through", ["itself", "link"])
def test_a_second_run_in_a_directory_is_told_who_holds_it(
    mode: dict[str, bool], through: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "run"
    training.train(replace(TINY, output_dir=directory), tiny_data())
    before = files_of(directory)
    (tmp_path / "link").symlink_to(directory)
    place = directory if through == "itself" else tmp_path / "link"
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(directory)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        message = rf"is in use by process {process.pid} on \S+ since 20\d\d-"
        with pytest.raises(folder.FolderInUse, match=message):
            training.train(replace(TINY, output_dir=place), tiny_data(), **mode)
        after = files_of(directory)
        assert after.pop(folder.LOCK) != before.pop(folder.LOCK)
        assert after == before
    finally:
        process.kill()  # the lock goes with the process, however it ends
        process.communicate()
    training.train(replace(TINY, output_dir=place), tiny_data(), **(mode or {"overwrite": True}))


def test_a_directory_is_held_until_the_report_is_written(tmp_path: Path) -> None:
    held: list[str] = []
    training.train(
        replace(TINY, output_dir=tmp_path / "run"),
        tiny_data(),
        finish=lambda result: held.append((tmp_path / "run" / folder.LOCK).read_text()),
    )
    assert f"process {os.getpid()} on" in held[0]
    assert (tmp_path / "run" / folder.LOCK).read_text() == ""


def test_a_forked_child_does_not_go_on_holding(tmp_path: Path) -> None:
    with folder.held(tmp_path):
        child = os.fork()
        if child == 0:
            time.sleep(20)
            os._exit(0)
    try:
        with folder.held(tmp_path):
            pass
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


@pytest.mark.slow
def test_two_commands_at_once_give_one_run(tmp_path: Path) -> None:
    """Both start in the same second; one is refused, and the metrics are those of one run."""
    command = [
        sys.executable, "-m", "csdiv", "train", f"--output-dir={tmp_path / 'run'}", "--epochs=6", "--warmup-epochs=1",
        "--num-components=5", "--hidden-dim=16", "--importance-samples=2", "--likelihood-samples=2", "--num-threads=1",
    ]  # fmt: skip
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert sorted(process.returncode for process in processes) == [0, 1], outputs
    refused = outputs[[process.returncode for process in processes].index(1)]
    assert "is in use by process" in refused or "is not empty" in refused
    lines = (tmp_path / "run" / folder.METRICS).read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == list(range(6))


# the records of a resumed run


def test_resume_selects_records_by_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines of another run, torn ones and lost ones between them do not shift what is kept."""
    config = replace(TINY, output_dir=tmp_path / "run", epochs=5)
    training.train(replace(config, output_dir=tmp_path / "whole"), tiny_data())
    save = checkpoint.save_resume_state

    def broken(state: dict, path: Path) -> None:
        if state["epoch"] == 3:
            raise KeyError("killed")
        save(state, path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_resume_state", broken)
        with pytest.raises(KeyError, match="killed"):
            training.train(config, tiny_data())
    metrics = config.output_dir / folder.METRICS
    lines = metrics.read_text().splitlines()
    strange = ['{"epoch": 1, "stage": "warm', "[" * 10000, "[1]", '{"epoch": "2"}', "\udcff", lines[3], lines[0]]
    mixed = [lines[0], *strange, lines[2], lines[1], lines[3], '{"epo']
    metrics.write_text("\n".join(mixed), errors="surrogateescape")
    training.train(config, tiny_data(), resume=True)
    assert metrics.read_text() == (tmp_path / "whole" / folder.METRICS).read_text()
    metrics.write_text(lines[0] + "\n")  # the records of epochs 1 to 4 are lost: not taken for those of others
    training.train(config, tiny_data(), resume=True)
    assert [record["epoch"] for record in training.read_metrics(metrics)] == [0]

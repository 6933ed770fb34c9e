"""Training runs that are stopped, resumed, split over processes, or led astray."""

import math
import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning")

from csdiv.models import CSRAE, checkpoint, data, folder, modules, training
from csdiv.models.config import TrainConfig

CONFIG = TrainConfig(
    epochs=8, warmup_epochs=2, num_components=12, latent_dim=3, hidden_dim=16, batch_size=256, num_threads=1
)
FLAGS = [
    "--epochs=16", "--warmup-epochs=3", "--num-components=12", "--latent-dim=4", "--hidden-dim=32",
    "--importance-samples=5", "--num-threads=1", "--self-overlap-interval=4", "--learn-divergence-weight",
]  # fmt: skip


def stop_after(epochs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run breaks off between the record of an epoch and its checkpoint, the worst moment."""
    save = training.checkpoint.save_resume_state

    def broken(state: dict, path: Path) -> None:
        if state["epoch"] + 1 > epochs:
            raise KeyError("killed")
        save(state, path)

    monkeypatch.setattr(training.checkpoint, "save_resume_state", broken)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"model": "vae"},
        {"learn_divergence_weight": True, "self_overlap_interval": 3},
        {"checkpoint_interval": 3, "validation_fraction": 0.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("stop", [1, 2, 6])
@pytest.mark.filterwarnings("ignore:target_divergence")
def test_resumed_run_gives_the_uninterrupted_curve(
    options: dict, stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digits = data.load_digits(options.get("validation_fraction", 0.1))
    whole, broken = (replace(CONFIG, output_dir=tmp_path / name, **options) for name in ("whole", "broken"))
    training.train(whole, digits)
    interval = whole.checkpoint_interval
    with monkeypatch.context() as patch:
        stop_after(max(stop, interval), patch)
        with pytest.raises(KeyError, match="killed"):
            training.train(broken, digits)
    kept = training.read_metrics(broken.output_dir / training.METRICS)
    assert max(stop, interval) < len(kept) <= max(stop, interval) + interval  # at most one interval is lost
    training.train(broken, digits, resume=True)
    for name in (training.METRICS, checkpoint.WEIGHTS):
        assert (broken.output_dir / name).read_bytes() == (whole.output_dir / name).read_bytes()


def command(directory: Path, *flags: str) -> list[str]:
    return [sys.executable, "-m", "csdiv", "train", f"--output-dir={directory}", *flags]


def wait_for_epochs(directory: Path, epochs: int, process: subprocess.Popen) -> None:
    metrics = directory / training.METRICS
    deadline = time.monotonic() + 120
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < epochs:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "whole"
    subprocess.run(command(directory, *FLAGS), check=True, capture_output=True, timeout=300)
    return directory


@pytest.mark.slow
@pytest.mark.parametrize(("name", "epochs"), [("SIGKILL", 4), ("SIGINT", 7)])
def test_killed_command_is_resumed(uninterrupted: Path, name: str, epochs: int, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    process = subprocess.Popen(
        command(directory, *FLAGS),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
    )
    wait_for_epochs(directory, epochs, process)
    process.send_signal(getattr(signal, name))
    output = process.communicate(timeout=60)[0]
    assert process.returncode == (-signal.SIGKILL if name == "SIGKILL" else 130), output
    assert "Traceback" not in output
    if name != "SIGKILL":
        assert f"csdiv train --output-dir {directory} --resume" in output
    assert not (directory / "report.html").exists()
    done = subprocess.run(command(directory, "--resume"), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    for file in (training.METRICS, checkpoint.WEIGHTS):
        assert (directory / file).read_bytes() == (uninterrupted / file).read_bytes()
    assert (directory / "report.html").exists()


@pytest.mark.slow
def test_two_processes_train_one_model(tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29517"]
    flags = [f"--output-dir={tmp_path / 'run'}", *FLAGS, "--epochs=12", "--batch-size=250"]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [*launcher, "-m", "csdiv", "train", *flags],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("report: ") == 1
    records = training.read_metrics(tmp_path / "run" / training.METRICS)
    assert [record["step"] for record in records] == [6 * epoch for epoch in range(1, 13)]  # 1257 = 5 x 250 + 7
    assert records[2]["train_reconstruction"] < records[0]["train_reconstruction"]
    assert (tmp_path / "run" / "report.html").exists()


# what a run is resumed from


class Malicious:
    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (Path("unpickled"),)


@pytest.fixture
def stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    config = replace(CONFIG, output_dir=tmp_path / "run")
    with monkeypatch.context() as patch:
        stop_after(3, patch)
        with pytest.raises(KeyError, match="killed"):
            training.train(config, data.load_digits())
    return config


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_resume_executes_nothing(stopped: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = stopped.output_dir / folder.RESUME
    good, metrics = path.read_bytes(), (stopped.output_dir / training.METRICS).read_bytes()
    torch.save({"state_dict": {}, "payload": Malicious()}, tmp_path / "malicious")
    for bad in ((tmp_path / "malicious").read_bytes(), pickle.dumps(Malicious()), good[: len(good) // 2], b""):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=r"resume\.ckpt: truncated, or not a file of plain tensors"):
            training.train(stopped, data.load_digits(), resume=True)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="not a checkpoint of csdiv"):
        training.train(stopped, data.load_digits(), resume=True)
    assert not (tmp_path / "unpickled").exists()
    assert (stopped.output_dir / training.METRICS).read_bytes() == metrics


def test_resume_refuses_another_model_or_other_data(stopped: TrainConfig) -> None:
    digits = data.load_digits()
    metrics = (stopped.output_dir / training.METRICS).read_bytes()
    fewer = replace(digits, train=data.Split(digits.train.x[:500], digits.train.labels[:500]))
    with pytest.raises(ValueError, match="are not those of the run"):
        training.train(stopped, fewer, resume=True)
    other = replace(stopped, output_dir=stopped.output_dir.parent / "other", num_components=13)
    training.train(replace(other, epochs=3), digits)
    (stopped.output_dir / folder.RESUME).write_bytes((other.output_dir / folder.RESUME).read_bytes())
    with pytest.raises(ValueError, match=r"another model .*prior\.means"):
        training.train(stopped, digits, resume=True)
    assert (stopped.output_dir / training.METRICS).read_bytes() == metrics
    with pytest.raises(FileNotFoundError, match="to resume from"):
        training.train(replace(stopped, output_dir=stopped.output_dir / "nothing"), digits, resume=True)


def test_diverged_run_keeps_its_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(CONFIG, output_dir=tmp_path)
    step = modules.CSRAETraining._step

    def poisoned(self: modules.CSRAETraining, split: str, x: torch.Tensor) -> object:
        if self.current_epoch == 5:
            with torch.no_grad():
                self.model.prior.means.fill_(math.nan)
        return step(self, split, x)

    monkeypatch.setattr(modules.CSRAETraining, "_step", poisoned)
    with pytest.raises(modules.TrainingDiverged, match=r"step 25 \(csrae\): the divergence is not finite; smallest"):
        training.train(config, data.load_digits())
    state = checkpoint.load_resume_state(tmp_path / folder.RESUME)
    assert state["epoch"] == 4
    assert all(t.isfinite().all() for t in checkpoint.load_model(tmp_path).parameters())


# the options


def test_training_a_gaussian_likelihood_on_features_with_a_constant_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = 1e4 + 1e3 * torch.randn(300, 6)
    x[:, 2] = 7.0
    config = replace(CONFIG, output_dir=tmp_path, epochs=6)
    result = training.train(config, data.Dataset.from_tensors(x))
    assert all(t.isfinite().all() for t in result.model.state_dict().values())
    assert result.history[-1]["validation_reconstruction"] < 5 * math.log(1e3 * math.sqrt(2 * math.pi * math.e)) + 1
    torch.testing.assert_close(result.model.sample(4)[:, 2], torch.full((4,), 7.0), rtol=0, atol=1.0)


def test_learned_weight_holds_the_constraint(tmp_path: Path) -> None:
    config = replace(
        CONFIG, output_dir=tmp_path, epochs=40, batch_size=64, learn_divergence_weight=True, target_divergence=3.0
    )
    history = training.train(config, data.load_digits()).history
    weights = [record["divergence_weight"] for record in history if record["stage"] == "csrae"]
    assert weights[0] != weights[-1]
    assert history[-1]["train_divergence"] == pytest.approx(3.0, rel=0.15)
    assert checkpoint.load_model(tmp_path).divergence_weight.item() == pytest.approx(weights[-1])


def test_infeasible_target_is_reported(tmp_path: Path) -> None:
    config = replace(
        CONFIG,
        output_dir=tmp_path,
        epochs=30,
        learn_divergence_weight=True,
        target_divergence=1e-3,
        max_divergence_weight=2.5,
    )
    with pytest.warns(UserWarning, match="λ") as warned:
        training.train(config, data.load_digits())
    messages = [str(warning.message) for warning in warned]
    assert any("is below the" in message and "components" in message for message in messages)
    assert any("λ reached its cap, 2.5" in message and "infeasible" in message for message in messages)


def test_bernoulli_likelihood_of_other_values_is_refused(tmp_path: Path) -> None:
    config = replace(CONFIG, output_dir=tmp_path / "run", likelihood="bernoulli", num_components=2)
    with pytest.raises(ValueError, match=r"data in \[0, 1\] expected"):
        training.train(config, data.Dataset.from_tensors(torch.randn(20, 3)))
    assert not (tmp_path / "run").exists()


def test_only_a_csrae_learns_its_weight() -> None:
    with pytest.raises(ValueError, match="learn_divergence_weight"):
        replace(CONFIG, model="vae", learn_divergence_weight=True)


def test_training_with_convolutions_and_without_validation(tmp_path: Path) -> None:
    config = replace(CONFIG, output_dir=tmp_path, epochs=3, architecture="conv", validation_fraction=0.0)
    result = training.train(config, data.load_digits(0.0))
    assert isinstance(result.model, CSRAE)
    assert "validation_loss" not in result.history[-1]
    assert result.model.sample(2).shape == (2, 64)


@pytest.mark.parametrize("renamed", [False, True])
def test_interrupted_write_leaves_one_whole_file(
    renamed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, replace_file = tmp_path / "file", os.replace
    path.write_text("before")

    def interrupted(source: str, target: Path) -> None:
        if renamed:
            replace_file(source, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        folder.write_atomically(path, "after")
    assert path.read_text() == ("after" if renamed else "before")
    assert list(tmp_path.iterdir()) == [path]

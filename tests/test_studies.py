"""Studies: cells that are computed once, protocols that are read, tables that say what they show."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lightning")

from csdiv.models import folder
from csdiv.studies import cells, run
from csdiv.studies.clustering import ClusteringConfig, ClusteringStudy
from csdiv.studies.config import read_study
from csdiv.studies.density import DensityConfig
from csdiv.studies.report import Table

SMALL = """
data = "{data}"
output_dir = "{output}"
seeds = 2

[train]
latent_dim = 3
hidden_dim = 16
epochs = 3
warmup_epochs = 1
max_variance_ratio = 0.0
num_threads = 1

[density]
weights = [1.0]
components = [12, 1]
selection_epochs = 2
final_images = 10
final_samples = 50
ablation_images = 5
ablation_samples = 20
refit_components = 3

[clustering]
many_components = 12
kmeans_starts = 1
"""


@pytest.fixture(scope="module")
def protocol(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A protocol for 200 digits."""
    from sklearn.datasets import load_digits

    directory = tmp_path_factory.mktemp("studies")
    images, labels = load_digits(return_X_y=True)
    x = torch.as_tensor(images[:200], dtype=torch.float32).view(-1, 8, 8) / 16.0
    torch.save({"x": x, "labels": torch.as_tensor(labels[:200])}, directory / "few.pt")
    path = directory / "small.toml"
    path.write_text(SMALL.format(data=directory / "few.pt", output=directory / "runs"))
    return path


def column(path: Path, name: str) -> list[str]:
    with path.open() as file:
        return [row[name] for row in csv.DictReader(file)]


@pytest.mark.slow
def test_density_study(protocol: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    run.run_study("density", str(protocol), {}, publish=protocol.parent / "published", only_report=False)
    directory = protocol.parent / "runs" / "density"
    printed = capsys.readouterr().out
    assert "0 cells are finished" in printed
    assert "on two quiet cores" in printed
    nll = "NLL, own prior (nats)"
    assert all(20 < float(value) < 60 for value in column(directory / "headline.csv", nll))  # 64 log 2 = 44
    assert column(directory / "headline.csv", "seeds") == ["2"] * 4
    assert column(directory / "selection.csv", "").count("chosen") == 4
    assert len(column(directory / "ablations.csv", "model")) == 5
    page = (directory / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert (protocol.parent / "published" / "report.md").read_text().startswith("# Density estimation on few")
    # Again, without computing anything; after the loss of one score, that alone.
    before = (directory / "report.md").read_text()
    monkeypatch.setattr(cells, "train", None)
    run.run_study("density", str(protocol), {}, publish=None, only_report=False)
    assert (directory / "report.md").read_text() == before
    next(directory.glob("csrae-*.json")).unlink()
    run.run_study("density", str(protocol), {}, publish=None, only_report=False)
    assert (directory / "report.md").read_text() == before


def test_clustering_study(protocol: Path) -> None:
    run.run_study("clustering", str(protocol), {"seeds": 1}, publish=None, only_report=False)
    directory = protocol.parent / "runs" / "clustering"
    assert set(column(directory / "few.csv", "K")) == {"10"}
    assert set(column(directory / "few.csv", "matching")) == {"one-to-one"}
    assert set(column(directory / "few.csv", "of")) == {"CSRAE codes, K = 10", "VAE codes", "pixels"}
    names = (column(directory / "many.csv", name) for name in ("clusters", "K", "matching"))
    many = set(zip(*names, strict=True))
    assert ("components", "12", "many-to-one") in many
    assert ("components, merged by overlap", "10", "one-to-one") in many
    assert len(column(directory / "ablations.csv", "CSRAE")) == 1 + 2 + 4
    pixels = dict(zip(column(directory / "few.csv", "of"), column(directory / "few.csv", "accuracy"), strict=True))
    assert 0.5 < float(pixels["pixels"]) <= 1.0  # k-means sorts most digits of 8 x 8 pixels
    assert (directory / "report.html").read_text().count("data:image/png;base64,") == 2


def test_clustering_needs_labels(protocol: Path) -> None:
    config = read_study(ClusteringConfig, "clustering", str(protocol), {})
    data = config.load()
    blind = replace(data, train=replace(data.train, labels=None))
    with pytest.raises(ValueError, match="labelled data expected"):
        ClusteringStudy(config, blind)
    with pytest.raises(ValueError, match="many_components: above 10"):
        ClusteringStudy(replace(config, many_components=10), data)


def test_half_trained_model_goes_on(protocol: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = read_study(DensityConfig, "density", str(protocol), {"output_dir": tmp_path})
    data, options = config.load(), config.training("csrae", 1.0, 12, 0, epochs=4)
    cell, resumed = cells.training_cell(options, data, tmp_path), []
    half = replace(options, output_dir=(tmp_path / cell.name).parent)
    train = cells.train

    def stopped(config: Any, data: Any, **given: Any) -> Any:
        resumed.append(given["resume"])
        if len(resumed) == 1:
            train(config, data, **given)
            records = (half.output_dir / "metrics.jsonl").read_text()
            assert records.count("\n") == 4
            raise KeyboardInterrupt
        return train(config, data, **given)

    monkeypatch.setattr(cells, "train", stopped)
    with pytest.raises(KeyboardInterrupt):
        cells.run_cells(lambda results: [cell], tmp_path)
    assert not (tmp_path / f"{cell.name}.json").exists()
    result = cells.run_cells(lambda results: [cell], tmp_path)[cell.name]
    assert resumed == [False, True]
    assert result["epoch"] == 3
    assert result["versions"]["torch"] == torch.__version__
    assert result["seconds"] > json.loads((half.output_dir / "seconds.json").read_text()) * 0.99


def test_models_are_shared_where_their_options_are_the_same(protocol: Path) -> None:
    config = read_study(DensityConfig, "density", str(protocol), {})
    first = config.training("csrae", 1.0, 12, 0)
    assert cells.model_name(first) == cells.model_name(replace(first, output_dir=Path("other"), num_threads=7))
    assert cells.model_name(first) != cells.model_name(replace(first, seed=1))
    assert config.training("vae", 1.0, 12, 0) == config.training("vae", 1.0, 50, 0)
    assert config.training("vae", 1.0, 12, 0).divergence_weight == 0.5


def test_collapsed_model_is_reported_and_kept(protocol: Path, tmp_path: Path) -> None:
    config = read_study(DensityConfig, "density", str(protocol), {"output_dir": tmp_path})
    options = config.training("csrae", 50.0, 2, 0, epochs=30, max_variance_ratio=0.3, learning_rate=0.02)
    cell = cells.training_cell(options, config.load(), tmp_path)
    result = cells.run_cells(lambda results: [cell], tmp_path)[cell.name]
    assert "posterior collapse after epoch" in result["stopped"]
    assert result["variance_ratio"] > 0.3
    assert {"model.safetensors", "resume.ckpt"} <= {path.name for path in (tmp_path / cell.name).parent.iterdir()}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seeds = 0", "seeds: at least 1"),
        ("nonsense = 1", "has no option nonsense"),
        ("[train]\nnonsense = 1", "train: no option is called nonsense"),
        ("[density]\nweights = [1.0, -1.0]", "weights: above 0"),
        ("[density]\ncomponents = []", "components: a list with something in it"),
        ("seeds = ", "not TOML"),
    ],
)
def test_protocols_are_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text(text)
    with pytest.raises((ValueError, TypeError), match=message):
        read_study(DensityConfig, "density", str(tmp_path / "bad.toml"), {})


def test_unknown_study_is_refused() -> None:
    with pytest.raises(ValueError, match="study: one of density, clustering"):
        run.run_study("nothing", "digits", {}, publish=None, only_report=False)


def test_shipped_protocols_are_read() -> None:
    for name in ("digits", "mnist"):
        assert read_study(DensityConfig, "density", name, {"seeds": 2}).seeds == 2


def test_table_shows_what_is_missing() -> None:
    table = Table("t", "Title", ("model", "NLL (nats)"), [["a", 1.234], ["b", None]], "A note.")
    assert table.to_markdown().splitlines()[2:6] == [
        "| model | NLL (nats) |",
        "| --- | --- |",
        "| a | 1.23 |",
        "| b | – |",
    ]
    assert table.to_csv() == "model,NLL (nats)\na,1.234\nb,\n"


@pytest.mark.parametrize("place", ["runs", "runs/models", "runs/density", "runs/density/figures", "published"])
def test_a_file_in_the_place_of_a_folder_is_refused_before_a_study(
    place: str, protocol: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DensityConfig, "load", lambda config: pytest.fail("too late"))
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / place).write_text("mine")
    with pytest.raises(NotADirectoryError, match=f"{place} is a file"):
        run.run_study("density", str(protocol), {"output_dir": tmp_path / "runs"}, publish=tmp_path / "published",
                      only_report=False)  # fmt: skip


def test_a_second_process_is_told_who_runs_a_study(
    protocol: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "run_cells", lambda *_: pytest.fail("too late"))
    monkeypatch.setattr(run, "write_study", lambda *_: None)
    given = {"output_dir": tmp_path}
    with folder.held(tmp_path / "density"):
        with pytest.raises(folder.FolderInUse, match="density is in use by process"):
            run.run_study("density", str(protocol), given, publish=None, only_report=False)
        run.run_study("density", str(protocol), given, publish=None, only_report=True)


def test_a_model_that_another_process_trains_is_left_to_it(protocol: Path, tmp_path: Path) -> None:
    config = read_study(DensityConfig, "density", str(protocol), {"output_dir": tmp_path})
    cell = cells.training_cell(config.training("csrae", 1.0, 12, 0), config.load(), tmp_path)
    directory = (tmp_path / cell.name).parent
    with folder.held(directory), pytest.raises(folder.FolderInUse, match="is in use by process"):
        cell.compute()
    assert {path.name for path in directory.iterdir()} == {folder.LOCK}

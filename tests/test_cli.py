"""The commands, from the command line to the last file."""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("typer")

from typer.testing import CliRunner

from csdiv import cli
from csdiv.models import GaussianDecoder, checkpoint, data, evaluation, report

OPTIONS = [
    "train", "--epochs", "3", "--warmup-epochs", "1", "--num-components", "12", "--latent-dim", "4",
    "--hidden-dim", "32", "--importance-samples", "20", "--num-threads", "1",
]  # fmt: skip
FIGURES = {
    f"{name}.png"
    for name in ("overview", "samples", "reconstructions", "interpolations", "prototypes", "latent", "curves")
}


def invoke(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli.app(), list(arguments))
    return result.exit_code, result.output


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    directory = tmp_path_factory.mktemp("runs") / "digits"
    code, output = invoke(*OPTIONS, "--output-dir", str(directory))
    assert code == 0, output
    return directory, output


def test_train_writes_its_files(run: tuple[Path, str]) -> None:
    directory, _ = run
    files = {"metrics.jsonl", "config.json", "config.toml", "model.safetensors", "resume.ckpt", "scores.json"}
    assert {path.name for path in directory.iterdir()} >= files | {"report.html", "figures"}
    assert {path.name for path in (directory / "figures").iterdir()} == FIGURES
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (directory / "figures").iterdir())
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert [(r["epoch"], r["stage"]) for r in records] == [(0, "warm-up"), (1, "csrae"), (2, "csrae")]
    for r in records[1:]:
        assert r["train_loss"] == pytest.approx(r["train_reconstruction"] + r["train_divergence"], rel=1e-5)
        assert 1 <= r["effective_components"] <= 12
        assert 0 <= r["active_units"] <= 4
    content = json.loads((directory / "config.json").read_text())
    assert content["model"]["num_components"] == 12
    assert {"csdiv", "torch", "lightning"} <= content["versions"].keys()
    assert (directory / "config.toml").read_text().startswith("# csdiv 0.")


def test_train_prints_scores_that_evaluate_reproduces(run: tuple[Path, str]) -> None:
    directory, output = run
    scores = evaluation.evaluate(checkpoint.load_model(directory), data.load_digits(), importance_samples=20)
    expected = dict(report.score_rows(scores))
    varying = {"training step (ms)", "the divergence takes"}
    code, again = invoke("evaluate", str(directory))
    assert code == 0, again
    written = json.loads((directory / "scores.json").read_text())
    for text in (output, again):
        lines = [line.rsplit("  ", 1) for line in text.splitlines()]
        printed = {line[0].strip(): line[1].strip() for line in lines if len(line) == 2}
        assert {name: printed[name] for name in expected.keys() - varying} == {
            name: value for name, value in expected.items() if name not in varying
        }
        assert printed["the divergence takes"].endswith("% of a step")
    assert written.keys() == expected.keys()
    assert written["NMI, K = 10 components merged by overlap"] == f"{scores.clustering.scores[1].nmi:.3f}"


def test_sample_and_interpolate(run: tuple[Path, str], tmp_path: Path) -> None:
    directory, _ = run
    for command, flags, size in (("sample", ["--n", "7"], 7), ("interpolate", ["--pairs", "2", "--steps", "5"], 10)):
        for suffix in ("npz", "png"):
            for name in ("a", "b"):
                path = tmp_path / "new" / f"{command}-{name}.{suffix}"
                code, output = invoke(command, str(directory), *flags, "--output", str(path))
                assert code == 0, output
                assert f"{size} decoded" in output
            assert (
                path.read_bytes() == (tmp_path / "new" / f"{command}-a.{suffix}").read_bytes()
            )  # the seed is the same
        x = np.load(tmp_path / "new" / f"{command}-a.npz")["x"]
        assert x.shape == (size, 1, 8, 8)
        assert 0 < x.min() <= x.max() < 1
    assert invoke("sample", str(directory), "--output", "a.txt")[1].startswith("error: output: a .png or .npz file")
    assert "at most 180" in invoke("interpolate", str(directory), "--pairs", "181")[1]
    code, output = invoke("sample", str(tmp_path / "nothing"))
    assert code == 1
    assert "Traceback" not in output


def test_info_names_every_backend() -> None:
    code, output = invoke("info")
    assert code == 0
    for name in ("reference", "cpu", "cuda", "triton"):
        assert re.search(rf"^{name} +(available|not available: \w+)", output, re.MULTILINE)


def test_info_explains_the_choice_for_a_shape() -> None:
    shape = ("info", "--shape", "4096", "512", "64")
    assert "preferred: cuda, then triton: " in invoke(*shape)[1]
    spherical = invoke(*shape, "--structure", "spherical")[1]
    assert "preferred: cuda, then triton: fewer instructions for an element" in spherical
    if not torch.cuda.is_available():
        assert "taken here: none, torch sees no GPU" in spherical
    assert "form: diagonal" in spherical or torch.cuda.is_available()
    assert "taken here: cpu" in invoke(*shape, "--device", "cpu")[1]
    assert "reference: csdiv has no kernels for mps" in invoke(*shape, "--device", "mps")[1]
    code, output = invoke(*shape, "--structure", "full")
    assert code == 1
    assert "a structure of diagonal, spherical" in output


def test_study_says_what_is_wrong(tmp_path: Path) -> None:
    names = "density, clustering, semisupervised, faces"
    assert invoke("study", "nothing") == (1, f"error: study: one of {names} expected, got 'nothing'\n")
    code, output = invoke("study", "density", "--config", str(tmp_path / "none.toml"))
    assert (code, "No such file" in output) == (1, True)


def test_bench_passes_its_flags_on() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "csdiv", "bench", "--help"], capture_output=True, text=True, check=True
    )
    assert "accuracy" in done.stdout
    assert "--rounds" in done.stdout


def test_train_takes_options_of_a_file_and_flags_win(tmp_path: Path) -> None:
    x, labels = np.random.default_rng(0).normal(size=(60, 5)), np.arange(60) % 3
    np.savez(tmp_path / "own.npz", x=x, labels=labels)
    lines = [f'data = "{tmp_path / "own.npz"}"', "epochs = 4", "warmup_epochs = 1", "num_components = 5", "seed = 7"]
    (tmp_path / "options.toml").write_text(
        "\n".join([*lines, "importance_samples = 5", "latent_dim = 2", "num_threads = 1"])
    )
    directory = tmp_path / "run"
    code, output = invoke(
        "train", "--config", str(tmp_path / "options.toml"), "--epochs", "3", "--output-dir", str(directory)
    )
    assert code == 0, output
    config = checkpoint.load_config(directory)
    assert (config.epochs, config.seed, config.num_components, config.hidden_dim) == (3, 7, 5, 256)
    assert {path.name for path in (directory / "figures").iterdir()} == {"latent.png", "curves.png"}
    assert "one-to-one accuracy, K = 3 components merged by overlap" in output
    assert isinstance(checkpoint.load_model(directory).decoder, GaussianDecoder)
    code, output = invoke("sample", str(directory), "--output", str(tmp_path / "own.png"))
    assert "an .npz file, for data that are no images" in output
    again = directory / "config.toml"
    code, output = invoke("train", "--config", str(again), "--output-dir", str(tmp_path / "again"))
    assert code == 0, output
    assert (tmp_path / "again" / "metrics.jsonl").read_bytes() == (directory / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch = 3", "no option is called epoch"),
        ("epochs = ", "not TOML"),
        ('epochs = "3"', "epochs: int expected, got '3'"),
        ("learning_rate = -1", "learning_rate: above 0 expected"),
        ('data = "nowhere"', "there is no nowhere"),
    ],
)
def test_train_says_what_is_wrong_with_a_file(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "options.toml").write_text(text)
    code, output = invoke("train", "--config", str(tmp_path / "options.toml"), "--output-dir", str(tmp_path / "run"))
    assert code == 1
    assert message in output
    assert not (tmp_path / "run").exists()


def test_resume_keeps_the_options_of_the_run(run: tuple[Path, str], tmp_path: Path) -> None:
    directory = tmp_path / "copy"
    shutil.copytree(run[0], directory)
    before = (directory / "metrics.jsonl").read_bytes()
    code, output = invoke("train", "--output-dir", str(directory), "--resume", "--epochs", "9")
    assert code == 1
    assert "leave out epochs" in output
    code, output = invoke("train", "--output-dir", str(directory), "--resume", "--config", "a.toml")
    assert code == 1
    assert "leave out --config" in output
    code, output = invoke("train", "--output-dir", str(directory), "--resume")
    assert code == 0, output  # the run was over: evaluated once more
    assert (directory / "metrics.jsonl").read_bytes() == before


class Page(HTMLParser):
    """Collects the tags of a page, and checks that they are balanced."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_report_is_one_self_contained_page(run: tuple[Path, str]) -> None:
    text = (run[0] / "report.html").read_text()
    page = Page(text)
    images = [attributes["src"] or "" for tag, attributes in page.found if tag == "img"]
    assert len(images) == len(FIGURES - {"overview.png"})
    assert all(source.startswith("data:image/png;base64,") for source in images)
    assert not any(tag in ("script", "link", "iframe") for tag, _ in page.found)
    for forbidden in ("http://", "https://", "url(", "@import", "$"):
        assert forbidden not in text
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.found


def test_train_refuses_to_overwrite(run: tuple[Path, str]) -> None:
    directory, _ = run
    before = (directory / "metrics.jsonl").read_bytes()
    code, output = invoke(*OPTIONS, "--output-dir", str(directory))
    assert code == 1
    assert "--overwrite" in output
    assert (directory / "metrics.jsonl").read_bytes() == before


def test_train_says_what_is_wrong_with_an_option(tmp_path: Path) -> None:
    code, output = invoke("train", "--learning-rate", "-1", "--output-dir", str(tmp_path / "run"))
    assert code == 1
    assert "learning_rate: above 0 expected, got -1" in output
    assert not (tmp_path / "run").exists()


def test_train_that_diverges_exits_with_an_error(tmp_path: Path) -> None:
    code, output = invoke(*OPTIONS, "--learning-rate", "1e12", "--output-dir", str(tmp_path))
    assert code == 1
    assert "is not finite" in output
    assert "Traceback" not in output


def test_help_names_every_option() -> None:
    code, output = invoke("train", "--help")
    assert code == 0
    assert "--divergence-weight" in output
    assert invoke("--help")[0] == 0


def test_main_without_typer_says_what_to_install() -> None:
    code = "import sys; sys.modules['typer'] = None; from csdiv.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr.strip() == "csdiv's commands need the extra: pip install 'csdiv[train]'"

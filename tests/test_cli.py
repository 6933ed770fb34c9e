"""``csdiv train`` from the command line to the last file."""

import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

pytest.importorskip("lightning")
pytest.importorskip("typer")

from typer.testing import CliRunner

from csdiv import cli
from csdiv.models import checkpoint, data, evaluation

OPTIONS = [
    "train", "--epochs", "3", "--warmup-epochs", "1", "--num-components", "12", "--latent-dim", "4",
    "--hidden-dim", "32", "--importance-samples", "20",
]  # fmt: skip
FIGURES = {f"{name}.png" for name in ("overview", "samples", "reconstructions", "prototypes", "latent", "curves")}


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
    names = {"metrics.jsonl", "config.json", "model.safetensors", "report.html", "figures"}
    assert {path.name for path in directory.iterdir()} == names
    assert {path.name for path in (directory / "figures").iterdir()} == FIGURES
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (directory / "figures").iterdir())
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert [(r["epoch"], r["stage"]) for r in records] == [(0, "warm-up"), (1, "csrae"), (2, "csrae")]
    for r in records[1:]:
        assert r["train_loss"] == pytest.approx(r["train_reconstruction"] + r["train_divergence"], rel=1e-5)
    assert json.loads((directory / "config.json").read_text())["training"]["num_components"] == 12


def test_train_prints_scores_that_the_checkpoint_reproduces(run: tuple[Path, str]) -> None:
    directory, output = run
    scores = evaluation.evaluate(
        checkpoint.load_model(directory), data.load_digits(), importance_samples=20, batch_size=128
    )
    lines = [line.rsplit("  ", 1) for line in output.splitlines()]
    printed = {line[0].strip(): line[1].strip() for line in lines if len(line) == 2}
    assert printed["test NLL (nats per image)"] == f"{scores.likelihood.nll.mean():.2f}"
    assert printed["NMI, K = 12 components"] == f"{scores.clustering.scores[0].nmi:.3f}"
    merged = "one-to-one accuracy, K = 10 components merged by overlap"
    assert printed[merged] == f"{scores.clustering.scores[1].accuracy:.3f}"
    assert printed["the divergence takes"].endswith("% of a step")


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

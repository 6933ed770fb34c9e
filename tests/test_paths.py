"""Paths beyond ASCII, and bytes that are no text: a run with them works, or is refused before it trains."""

import io
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("lightning")
pytest.importorskip("typer")

from csdiv.cli import main
from csdiv.models import checkpoint, folder, load_data, run
from csdiv.models.config import TrainConfig, read_toml, to_toml
from csdiv.models.training import train

TINY = TrainConfig(
    epochs=2, warmup_epochs=1, num_components=3, latent_dim=2, hidden_dim=8, num_threads=1, importance_samples=2,
    likelihood_samples=4,
)  # fmt: skip
NOT_TEXT = os.fsdecode(b"caf\xe9")


def write_data(path: Path, labels: list[str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    given = {} if labels is None else {"labels": np.array(labels * 20)}
    np.savez(path, x=np.random.default_rng(0).random((20 * len(labels or [1, 2]), 5)), **given)
    return path


@pytest.mark.filterwarnings("ignore:Glyph")
def test_a_run_in_a_folder_of_any_name(tmp_path: Path) -> None:
    name = ' 😀 naïve "quoted" \\ $\\nothing$ & <b> \x7f tab\t and\nline'
    own = write_data(tmp_path / name / f"{name}.npz", [name, "b"])
    config = replace(TINY, output_dir=tmp_path / name / "run", data=str(own))
    run.train_and_report(config)
    assert checkpoint.load_config(config.output_dir) == config
    for output in (f"{name}.npz", "drawn.npz"):
        run.sample_run(config.output_dir, 3, tmp_path / output, 0)
    run.evaluate_run(config.output_dir)
    run.train_and_report(checkpoint.load_config(config.output_dir), resume=True)


@pytest.mark.parametrize("option", ["output_dir", "data"])
@pytest.mark.parametrize("name", [NOT_TEXT, "\ud83d", "zero\0byte"])
def test_paths_that_toml_cannot_hold_are_refused(option: str, name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{option}: a path (in UTF-8|without zero bytes) expected"):
        replace(TINY, **{option: str(tmp_path / name)})


def test_models_in_folders_whose_names_are_no_text_are_refused(tmp_path: Path) -> None:
    for call in (
        checkpoint.load_model,
        run.evaluate_run,
        lambda place: run.sample_run(place, 3, tmp_path / "a.npz", 0),
    ):
        directory = tmp_path / NOT_TEXT
        directory.mkdir(exist_ok=True)
        checkpoint.save_config(directory, TINY, load_data(write_data(tmp_path / "own.npz")))
        with pytest.raises(ValueError, match="directory: a path in UTF-8 expected, got b"):
            call(directory)


def test_samples_go_to_files_of_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(replace(TINY, output_dir=tmp_path / "run"), load_data(write_data(tmp_path / "own.npz")))
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", stdout)
    output = tmp_path / f"{NOT_TEXT}.npz"
    monkeypatch.setattr(sys, "argv", ["csdiv", "sample", str(tmp_path / "run"), "--n", "3", "--output", str(output)])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    assert np.load(output)["x"].shape == (3, 5)
    stdout.seek(0)
    assert r"caf\udce9.npz" in stdout.read()


def test_every_string_survives_toml(tmp_path: Path) -> None:
    for code in [*range(1, 0x24), 0x27, 0x5C, *range(0x7F, 0xA1), 0x2028, 0xFEFF, 0xFFFF, 0x1F600, 0x10FFFF]:
        config = replace(TINY, data=f"a{chr(code)}b")
        (tmp_path / "config.toml").write_bytes(to_toml(config, {}).encode())
        assert read_toml(tmp_path / "config.toml")["data"] == config.data


COMMANDS = """
import sys
from csdiv.cli import main
assert not sys.flags.utf8_mode
for line in sys.argv[1:]:
    sys.argv = ["csdiv", *line.split("|")]
    try:
        main()
    except SystemExit as end:
        assert not end.code, (line, end.code)
"""


def in_the_locale_c(program: str, *arguments: str) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG"))}
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=environment | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


ROUND_TRIP = """
import os, sys
from dataclasses import replace
from pathlib import Path
from csdiv.models.config import TrainConfig, read_toml, to_toml
config = TrainConfig(data=sys.argv[1], output_dir=sys.argv[1])
assert os.path.exists(config.data) and config.output_dir.exists()
path = Path(sys.argv[1], "config.toml")
path.write_bytes(to_toml(config, {}).encode())
assert TrainConfig(**read_toml(path)) == config
"""


def test_options_and_help_in_the_locale_c(tmp_path: Path) -> None:
    directory = tmp_path / "naïve 😀"
    directory.mkdir()
    in_the_locale_c(COMMANDS, "train|--help")
    in_the_locale_c(ROUND_TRIP, str(directory))
    assert read_toml(directory / "config.toml")["output_dir"] == str(directory)


@pytest.mark.slow
def test_commands_in_the_locale_c(tmp_path: Path) -> None:
    """With names that it cannot show, in flags and in the configuration."""
    directory = tmp_path / "naïve 😀"
    own = write_data(directory / "größe.npz", ["ä", "b"])
    (directory / "options.toml").write_text(f'data = "{own}"\nnum_threads = 1\nlatent_dim = 2\n', encoding="utf-8")
    flags = (
        "--epochs=2|--warmup-epochs=1|--num-components=3|--hidden-dim=8|--importance-samples=2|--likelihood-samples=2"
    )
    trained = directory / "rün"
    in_the_locale_c(
        COMMANDS,
        f"train|--config={directory / 'options.toml'}|--output-dir={trained}|{flags}",
        f"train|--output-dir={trained}|--resume",
        f"evaluate|{trained}",
        f"sample|{trained}|--output={directory / 'ä.npz'}",
        f"train|--data={own}|--output-dir={trained}|--overwrite|{flags}",
    )
    config = checkpoint.load_config(trained)  # read in this locale, it names the same files
    assert config.data == str(own)
    assert config.output_dir == trained
    assert "größe" in (trained / folder.REPORT).read_text(encoding="utf-8")

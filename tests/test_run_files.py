"""Checkpoints and configurations that claim absurd sizes, or of which a byte has changed."""

import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

pytest.importorskip("lightning")

from csdiv.models import checkpoint, data, folder, run, training
from csdiv.models.config import TrainConfig
from csdiv.studies import cells

TINY = TrainConfig(
    epochs=3, warmup_epochs=1, num_components=3, latent_dim=2, hidden_dim=8, num_threads=1, importance_samples=2,
    likelihood_samples=4,
)  # fmt: skip


def tiny_data() -> data.Dataset:
    return data.Dataset.from_tensors(torch.rand(40, 5, generator=torch.Generator().manual_seed(0)))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "finished"
    training.train(replace(TINY, output_dir=directory), tiny_data())
    return directory


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    for path in finished.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def commands(directory: Path) -> list[Callable[[], Any]]:
    """What reads a model."""
    return [
        lambda: checkpoint.load_model(directory),
        lambda: run.evaluate_run(directory),
        lambda: run.sample_run(directory, 3, directory / "samples.npz", 0),
        lambda: run.interpolate_run(directory, 2, 2, directory / "lines.npz", 0),
    ]


# config.json


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("hidden_dim", 10**6, "weights of another model"),
        ("hidden_dim", 10**10, "not a csdiv configuration"),
        ("hidden_dim", 10**30, "hidden_dim: an integer of 64 bits"),
        ("hidden_dim", -8, "hidden_dim: at least 1"),
        ("hidden_dim", 8.0, "hidden_dim: int expected"),
        ("hidden_dim", True, "hidden_dim: int expected"),
        ("hidden_dim", [8], "hidden_dim: int expected"),
        ("num_components", 10**9, "weights of another model"),
        ("num_components", 0, "num_components: at least 1"),
        ("latent_dim", 10**12, "(weights of another model|not a csdiv configuration)"),
        ("latent_dim", None, "latent_dim: int expected"),
        ("sample_shape", [10**13], "weights of another model"),
        ("sample_shape", [10**7, 10**7, 10**7], "not a csdiv configuration"),
        ("sample_shape", [-5], "sample_shape: a list of positive"),
        ("sample_shape", [], "sample_shape: a list of positive"),
        ("sample_shape", [[5]], "sample_shape: a list of positive"),
        ("sample_shape", "5", "sample_shape: a list of positive"),
        ("sample_shape", [True, 5], "sample_shape: a list of positive"),
        ("divergence_weight", float("nan"), "divergence_weight: a finite value"),
        ("divergence_weight", "1", "divergence_weight: float expected"),
        ("model", "gan", "model: one of"),
        ("model", ["vae"], "model: str expected"),
        ("likelihood", "poisson", "likelihood: one of"),
        ("likelihood", {}, "likelihood: one of"),
        ("architecture", 1, "architecture: str expected"),
        ("nonsense", 1, "not a csdiv configuration"),
    ],
)
def test_sizes_of_config_json_are_compared_before_memory_is_taken(
    option: str, value: Any, message: str, copy: Path
) -> None:
    content = json.loads((copy / folder.CONFIG).read_text())
    content["model"][option] = value
    (copy / folder.CONFIG).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        checkpoint.load_model(copy)


NESTED = "[" * 100_000


@pytest.mark.parametrize(
    "content", [NESTED, f'{{"model": {NESTED}', "", "\x00", "null", "3", '{"model": 3}', b"\xff\xfe"]
)
def test_damaged_config_json_is_named(content: str | bytes, copy: Path) -> None:
    (copy / folder.CONFIG).write_bytes(content if isinstance(content, bytes) else content.encode())
    for command in commands(copy):
        with pytest.raises(ValueError, match=r"config\.json: not "):
            command()


# config.toml


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("hidden_dim = 8", "hidden_dim = 1000000", "different hidden_dim"),
        ("hidden_dim = 8", "hidden_dim = -8", "hidden_dim: at least 1"),
        ("hidden_dim = 8", f"hidden_dim = {10**30}", "hidden_dim: an integer of 64 bits"),
        ("num_components = 3", "num_components = 1000000000", "num_components: at most 28"),
        ("latent_dim = 2", f"latent_dim = {NESTED}", "not TOML"),
        ("latent_dim = 2", f"latent_dim = {NESTED}{']' * 100_000}", "not TOML"),
        ("latent_dim = 2", "latent_dim = [2]", "latent_dim: int expected"),
        ("seed = 0", f"seed = {2**32}", "seed: below"),
        ("num_threads = 1", "num_threads = 1000000", "num_threads: below"),
        ("learning_rate = 0.003", f"learning_rate = {10**400}", "learning_rate: an integer of 64 bits"),
        ("learning_rate = 0.003", "learning_rate = nan", "learning_rate: a finite value"),
    ],
)
def test_sizes_of_config_toml_are_checked_before_memory_is_taken(old: str, new: str, message: str, copy: Path) -> None:
    options = (copy / folder.OPTIONS).read_text()
    assert old in options
    (copy / folder.OPTIONS).write_text(options.replace(old, new))
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    with pytest.raises(ValueError, match=message):
        training.train(replace(checkpoint.load_config(copy), output_dir=copy), tiny_data(), resume=True)
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before


@pytest.mark.parametrize("options", [{"hidden_dim": 10**6}, {"latent_dim": 10**9}, {"hidden_dim": 10**10}])
def test_a_model_beyond_memory_is_refused_before_training(options: dict[str, int], tmp_path: Path) -> None:
    config = replace(TINY, output_dir=tmp_path / "run", **options)
    with pytest.raises(ValueError, match=r"would take .* GB|overflowed"):
        training.train(config, tiny_data())
    assert not (tmp_path / "run").exists()


# model.safetensors


def header(content: bytes, change: Callable[[dict], Any]) -> bytes:
    """A file whose header says something else."""
    (size,) = struct.unpack("<Q", content[:8])
    head = json.loads(content[8 : 8 + size])
    change(head)
    text = json.dumps(head).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + size :]


def test_weights_of_which_a_bit_has_changed_are_refused(copy: Path) -> None:
    path, generator = copy / folder.WEIGHTS, np.random.default_rng(0)
    good = path.read_bytes()
    expected = safetensors.torch.load(good)
    for place in generator.choice(len(good), 40, replace=False):
        changed = bytearray(good)
        changed[place] ^= 1 << generator.integers(8)
        path.write_bytes(changed)
        try:
            loaded = checkpoint.load_model(copy).state_dict()
        except ValueError as error:
            assert str(path) in str(error)  # noqa: PT017
        else:  # of the checksum's name, or of a blank
            assert place < len(good) - sum(t.nbytes for t in expected.values())
            assert all(torch.equal(t, expected[name]) for name, t in loaded.items())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(value: float, copy: Path) -> None:
    path = copy / folder.WEIGHTS
    state = safetensors.torch.load(path.read_bytes())
    state["prior.log_variances"][1, 0] = value
    path.write_bytes(safetensors.torch.save(state))
    for command in commands(copy):
        with pytest.raises(ValueError, match=r"model\.safetensors: finite numbers expected in prior\.log_variances"):
            command()
    assert not (copy / "samples.npz").exists()


def test_weights_without_a_checksum_load(copy: Path) -> None:
    """Those of older versions, and those that others wrote in another precision."""
    path = copy / folder.WEIGHTS
    state = safetensors.torch.load(path.read_bytes())
    for dtype in (torch.float32, torch.float64):
        path.write_bytes(safetensors.torch.save({name: t.to(dtype) for name, t in state.items()}))
        model = checkpoint.load_model(copy)
        assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
        assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    path.write_bytes(safetensors.torch.save({name: t.to(torch.int64) for name, t in state.items()}))
    with pytest.raises(ValueError, match="finite numbers expected"):
        checkpoint.load_model(copy)


@pytest.mark.parametrize(
    "change",
    [
        lambda head: head["prior.means"].update(shape=[10**13, 2]),
        lambda head: head["prior.means"].update(shape=[10**13, 2], data_offsets=[0, 8 * 10**13]),
        lambda head: head["prior.means"].update(shape=[-3, 2]),
        lambda head: head["prior.means"].update(dtype="F64"),
        lambda head: head.pop("prior.means"),
    ],
)
def test_absurd_headers_of_weights_are_refused(change: Callable[[dict], Any], copy: Path) -> None:
    path = copy / folder.WEIGHTS
    path.write_bytes(header(path.read_bytes(), change))
    with pytest.raises(ValueError, match=r"model\.safetensors: (truncated or not safetensors|weights of another)"):
        checkpoint.load_model(copy)


@pytest.mark.parametrize("content", [b"", b"\xff" * 8, struct.pack("<Q", 10**13), struct.pack("<Q", 2**63) + b"{}"])
def test_weights_that_are_no_safetensors_are_refused(content: bytes, copy: Path) -> None:
    (copy / folder.WEIGHTS).write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors: truncated or not safetensors"):
        checkpoint.load_model(copy)


def test_a_sparse_file_of_terabytes_takes_no_memory(copy: Path) -> None:
    with (copy / folder.WEIGHTS).open("r+b") as file:
        file.truncate(10**12)
    with pytest.raises(ValueError, match="truncated or not safetensors"):
        checkpoint.load_model(copy)


# resume.ckpt


def test_a_checkpoint_of_which_a_bit_has_changed_is_refused(copy: Path) -> None:
    path, generator = copy / folder.RESUME, np.random.default_rng(0)
    good = path.read_bytes()
    expected = checkpoint.load_resume_state(path)["state_dict"]
    refused = 0
    for place in generator.choice(len(good), 100, replace=False):
        changed = bytearray(good)
        changed[place] ^= 1 << generator.integers(8)
        path.write_bytes(changed)
        try:
            state = checkpoint.load_resume_state(path)["state_dict"]
        except ValueError as error:
            assert str(path) in str(error)  # noqa: PT017
            refused += 1
        else:  # of what fills the space between arrays
            assert all(torch.equal(t, expected[name]) or name.startswith("multiplier") for name, t in state.items())
    assert refused > 50


def test_one_changed_byte_of_each_array_is_refused_by_name(copy: Path) -> None:
    path = copy / folder.RESUME
    good = path.read_bytes()
    for name, t in checkpoint.load_resume_state(path)["state_dict"].items():
        place = good.find(t.contiguous().numpy().tobytes())
        path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        with pytest.raises(ValueError, match=r"resume\.ckpt: truncated, or .*\(the checksum of .*data/\d+ is wrong\)"):
            training.train(replace(TINY, output_dir=copy), tiny_data(), resume=True)
        assert place > 0, name


def spoil_weights(state: dict) -> None:
    state["state_dict"]["model.prior.means"][0] = torch.nan


def widen(state: dict) -> None:
    state["state_dict"]["model.prior.means"] = torch.zeros(1).expand(10**9, 2)


def shrink_moments(state: dict) -> None:
    state["optimizer_states"][0]["state"][0]["exp_avg"] = torch.zeros(1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (spoil_weights, r"finite numbers expected in model\.prior\.means"),
        (widen, r"weights of another model \(model\.prior\.means differ\)"),
        (shrink_moments, "the state of another run"),
        (lambda state: state["optimizer_states"].clear(), "the state of another run"),
        (lambda state: state.update(optimizer_states=[3]), "the state of another run"),
        (lambda state: state.update(epoch=-1), "the state of another run"),
        (lambda state: state.update(epoch=10**9), "the state of another run"),
        (lambda state: state.update(epoch="2"), "not a checkpoint of csdiv"),
        (lambda state: state.update(state_dict={"model.prior.means": 3}), "not a checkpoint of csdiv"),
        (lambda state: state.pop("loops"), "not a checkpoint of csdiv"),
        (lambda state: state.pop("callbacks"), "not a checkpoint of csdiv"),
        (lambda state: state.pop("lr_schedulers"), "not a checkpoint of csdiv"),
    ],
)
def test_states_of_other_runs_are_refused(change: Callable[[dict], Any], message: str, copy: Path) -> None:
    state = checkpoint.load_resume_state(copy / folder.RESUME)
    change(state)
    torch.save(state, copy / folder.RESUME)
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    with pytest.raises(ValueError, match=rf"resume\.ckpt: {message}"):
        training.train(replace(TINY, output_dir=copy), tiny_data(), resume=True)
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before


# samples that could not be saved


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0}, "n: at least 1"),
        ({"n": -5}, "n: at least 1"),
        ({"n": 10**12}, "would take"),
        ({"pairs": 0}, "pairs: at least 1"),
        ({"steps": -1}, "steps: at least 1"),
        ({"steps": 10**12}, "would take"),
        ({"output": "a.txt"}, "npz file"),
        ({"output": "a.png"}, "npz file, for data that are no images"),
        ({"output": "file/a.npz"}, "is a file, and a folder is needed"),
        ({"output": "folder.npz"}, "is a folder, and a file"),
    ],
)
def test_samples_that_cannot_be_are_refused_before_the_model_is_loaded(
    arguments: dict[str, Any], message: str, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "load_model", lambda directory: pytest.fail("too late"))
    (copy / "file").write_text("mine")
    (copy / "folder.npz").mkdir()
    output = copy / arguments.pop("output", "a.npz")
    if "n" in arguments or not arguments:
        with pytest.raises((ValueError, OSError), match=message):
            run.sample_run(copy, arguments.get("n", 3), output, 0)
    if "n" not in arguments:
        with pytest.raises((ValueError, OSError), match=message):
            run.interpolate_run(copy, arguments.get("pairs", 2), arguments.get("steps", 2), output, 0)


# results of studies


@pytest.mark.parametrize("content", ["", "[1]", NESTED, "\x00", '{"seconds": 1'])
def test_damaged_results_of_a_study_are_named(content: str, tmp_path: Path) -> None:
    cell = cells.Cell("one", dict, 1.0)
    (tmp_path / "one.json").write_text(content)
    with pytest.raises(ValueError, match=r"one\.json: not "):
        cells.run_cells(lambda results: [cell], tmp_path)
    training_cell = cells.training_cell(TINY, tiny_data(), tmp_path)
    directory = (tmp_path / training_cell.name).parent
    directory.mkdir(parents=True)
    (directory / "seconds.json").write_text(content)
    with pytest.raises(ValueError, match=r"seconds\.json: "):
        training_cell.compute()

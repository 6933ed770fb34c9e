"""The scripts of docs/recipes run, say what they reach, and reach it."""

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

RECIPES = Path(__file__).parents[1] / "docs" / "recipes"
OUTCOMES: dict[str, Callable[[Any], bool]] = {
    "vae_loss": lambda losses: losses[1] < 0.8 * losses[0],
    "domain_adaptation": lambda accuracies: accuracies[0] < 0.9 and accuracies[1] > 0.95,
    "mixture_reduction": lambda ise: abs(ise[0] - 0.0140525) < 1e-7 and ise[1] <= 0.2 * ise[0],
    "phd_intensities": lambda found: found[0] > 0.0 and found[1] == sorted(found[1]),
    "point_set_registration": lambda error: error <= 1e-4,
    "distributional_rl": lambda losses: losses[1] < 0.2 * losses[0],
}


def test_every_recipe_is_here_and_in_the_list() -> None:
    assert {path.stem for path in RECIPES.glob("*.py")} == set(OUTCOMES)
    listed = (RECIPES / "README.md").read_text()
    assert all(f"({name}.py)" in listed for name in OUTCOMES)
    assert all(len((RECIPES / f"{name}.py").read_text().splitlines()) <= 85 for name in OUTCOMES)


@pytest.mark.parametrize("name", list(OUTCOMES))
def test_recipe(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_num_threads(1)  # small problems: a second thread costs more than it brings
    outcome = runpy.run_path(str(RECIPES / f"{name}.py"), run_name=name)["main"]()
    assert OUTCOMES[name](outcome), capsys.readouterr().out


def test_drawing_of_the_reduction(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib").use("Agg")
    recipe = runpy.run_path(str(RECIPES / "mixture_reduction.py"), run_name="mixture_reduction")
    recipe["main"](str(tmp_path / "reduction.png"))
    assert (tmp_path / "reduction.png").read_bytes().startswith(b"\x89PNG")

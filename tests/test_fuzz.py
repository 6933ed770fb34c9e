"""The fuzzer finds nothing wrong, finds what is put there, and its truth is mpmath's."""

from collections.abc import Callable
from unittest import mock

import fuzz
import numpy as np
import pytest
import torch
from fuzz_cases import Case
from fuzz_expected import Expected
from mpmath import mp, mpf
from torch import Tensor

import csdiv

F64 = torch.float64


def test_sixty_cases() -> None:
    assert fuzz.sweep(7, range(60)) == 0


@pytest.mark.slow
def test_ten_thousand_cases() -> None:
    assert fuzz.sweep(11, range(10_000)) == 0


class _Scaled(torch.autograd.Function):
    """The same values with gradients that are off by a thousandth."""

    @staticmethod
    def forward(ctx: object, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return 1.001 * grad


FAULTS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    # and in how many of 15 cases it must be found: others are infinite, have no gradient or an empty batch
    "a value": (lambda value: value * (1.0 + 3e-5) + 3e-5, 7),
    "a gradient": (_Scaled.apply, 6),
    "NaN and infinities": (lambda value: value.nan_to_num(nan=0.0, neginf=-1e30), 1),
    "a dtype": (torch.Tensor.half, 14),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_is_found(fault: str, capsys: pytest.CaptureFixture[str]) -> None:
    change, least = FAULTS[fault]
    right = csdiv.log_overlap
    with mock.patch.object(csdiv, "log_overlap", lambda *args, **options: change(right(*args, **options))):
        assert fuzz.sweep(7, range(15), "log_overlap") >= least
    assert "python tests/fuzz.py --seed 7 --case" in capsys.readouterr().out


# The truth


def log_overlap(p: dict[str, list], q: dict[str, list]) -> mpf:
    """log V(p, q) of lists of means, covariance matrices and log weights, by determinants and linear systems."""
    terms = []
    for mean, s, a in zip(p["means"], p["matrices"], p["log_weights"], strict=True):
        for other, t, b in zip(q["means"], q["matrices"], q["log_weights"], strict=True):
            delta = mp.matrix([x - y for x, y in zip(mean, other, strict=True)])
            c = s + t
            square = (delta.T * mp.lu_solve(c, delta))[0]
            terms.append(a + b - (square + mp.log(mp.det(2 * mp.pi * c))) / 2)
    return mp.log(sum(mp.exp(t) for t in terms))


def exact(leaves: dict[str, Tensor], side: str) -> dict[str, list]:
    """A side of a case as numbers of mpmath."""
    means = [[mpf(x) for x in row] for row in leaves[f"{side}_means"].tolist()]
    if f"{side}_variances" in leaves:
        matrices = [mp.diag([mpf(v) for v in row]) for row in leaves[f"{side}_variances"].tolist()]
    else:
        factors = [mp.matrix(f) for f in leaves[f"{side}_scale_tril"].tolist()]
        matrices = [f * f.T for f in factors]
    log_weights = [mpf(w) for w in leaves[f"{side}_log_weights"].tolist()]
    return {"means": means, "matrices": matrices, "log_weights": log_weights}


def divergence(leaves: dict[str, Tensor]) -> mpf:
    p, q = exact(leaves, "p"), exact(leaves, "q")
    return (log_overlap(p, p) + log_overlap(q, q)) / 2 - log_overlap(p, q)


def leaves_of(kind: str) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(3)
    leaves = {}
    for side, k in (("p", 2), ("q", 3)):
        leaves[f"{side}_means"] = torch.randn(k, 2, generator=g, dtype=F64)
        leaves[f"{side}_log_weights"] = torch.randn(k, generator=g, dtype=F64)
        if kind == "needles":
            lower = torch.tensor([[1.0, 0.0], [1.0, 1e-6]], dtype=F64)
            leaves[f"{side}_scale_tril"] = lower * (1.0 + torch.rand(k, 2, 2, generator=g, dtype=F64)).tril()
        else:
            decades = 6.0 if kind == "decades" else 0.3
            leaves[f"{side}_variances"] = 10.0 ** (decades * torch.randn(k, 2, generator=g, dtype=F64))
    return leaves


@pytest.mark.parametrize("kind", ["plain", "decades", "needles"])
def test_truth_is_that_of_mpmath(kind: str) -> None:
    """Values, and gradients by differences of 60 digits."""
    leaves = leaves_of(kind)
    case = Case(0, 0, "cs_divergence", 2, (F64, F64), leaves, needs=tuple(leaves))
    expected = Expected(case)
    gradients = expected.gradients(np.ones(1))
    with mp.workdps(60):
        value = divergence(leaves)
        assert abs(mpf(str(expected.value[0])) - value) <= float(expected.band[0]) / 500
        step = mpf(10) ** -25
        for name, index in [("p_means", (1, 0)), ("q_means", (0, 1)), ("q_log_weights", (2,))]:
            moved = {"p": exact(leaves, "p"), "q": exact(leaves, "q")}
            numbers = moved[name[0]][name[2:]]
            for at in index[:-1]:
                numbers = numbers[at]
            numbers[index[-1]] += step
            p, q = moved["p"], moved["q"]
            slope = ((log_overlap(p, p) + log_overlap(q, q)) / 2 - log_overlap(p, q) - value) / step
            grad, band = (t[index] for t in gradients[name])
            assert abs(mpf(str(grad)) - slope) <= float(band) / 500
        name = next(n for n in leaves if n.endswith(("variances", "scale_tril")))
        index = (0, 1, 0) if name.endswith("tril") else (0, 1)
        ends = [dict(leaves), dict(leaves)]
        for sign, end in zip((-1.0, 1.0), ends, strict=True):
            end[name] = leaves[name].clone()
            end[name][index] *= 1.0 + sign * 2.0**-30
        slope = (divergence(ends[1]) - divergence(ends[0])) / mpf((ends[1][name][index] - ends[0][name][index]).item())
        assert abs(float(gradients[name][0][index]) / float(slope) - 1.0) < 1e-6


def test_a_case_is_one_of_its_seed_and_index() -> None:
    first, again, other = (fuzz.draw(7, index) for index in (3, 3, 4))
    assert str(first) == str(again) != str(other)
    assert all(torch.equal(t.nan_to_num(), again.leaves[n].nan_to_num()) for n, t in first.leaves.items())

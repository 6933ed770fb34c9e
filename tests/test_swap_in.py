"""The same training step with a textbook loss and with csdiv."""

import json
import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning")

from bench import swap_in
from csdiv.models.data import load_data

COMMITTED = Path(__file__).resolve().parent.parent / "bench" / "results" / "swap_in.json"


def test_loss_curves_agree_to_rounding() -> None:
    curves = swap_in.compare_curves(load_data("digits"), steps=8, seeds=1)
    assert curves["float64"] <= 1e-14
    assert [r["steps"] for r in curves["float32"]] == [2, 4, 6, 8]
    for r in curves["float32"]:
        assert 0.0 <= r["csdiv"] <= 2e-6
        assert 0.0 <= r["eager_orders"] <= 2e-6


@pytest.mark.parametrize("provider", [*swap_in.ORDERS, swap_in.CHUNKED])
def test_swapped_losses_and_gradients_are_csdivs(provider: str) -> None:
    model = swap_in.make_model(12, 7).double()
    means, log_variances = torch.randn(2, 5, swap_in.LATENT, dtype=torch.float64)
    own, other = (swap_in.swapped(model, name) for name in (swap_in.CSDIV, provider))
    values = [m.divergence(means, log_variances) for m in (own, other)]
    grads = [
        torch.autograd.grad(v.sum(), list(m.prior.parameters())) for v, m in zip(values, (own, other), strict=True)
    ]
    torch.testing.assert_close(values[0], values[1], rtol=1e-12, atol=1e-12)
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_a_wrong_loss_shows_and_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(swap_in.ORDERS, swap_in.EAGER, lambda *x: swap_in.regularizer(*x) * (1 + 1e-7))
    monkeypatch.setattr(swap_in, "STEPS", 3)
    real = swap_in.compare_curves
    monkeypatch.setattr(swap_in, "compare_curves", lambda data, device: real(data, device, 3, 1))
    with pytest.raises(ArithmeticError, match="float64 losses differ"):
        swap_in.run("digits", 1)
    assert swap_in.difference([1.0, math.nan], [1.0, 2.0]) == math.inf


def test_steps_are_timed_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    records = swap_in.time_steps(swap_in.Size(4, (swap_in.CSDIV, swap_in.EAGER)), "cpu", 2, num_features=9)
    assert all(r["median_ms"] > 0 and r["divergence_ms"] > 0 for r in records)
    monkeypatch.setattr(swap_in, "free_bytes", lambda device: 0)
    (_, refused) = swap_in.time_steps(swap_in.Size(4, (swap_in.CSDIV, swap_in.EAGER)), "cpu", 2, num_features=9)
    assert "needs" in refused["skipped"]


@pytest.mark.skipif(not COMMITTED.exists(), reason="csdiv bench swap-in has not been measured yet")
def test_committed_curves_are_within_their_bounds() -> None:
    committed = json.loads(COMMITTED.read_text())
    assert committed["curves"]["float64"] <= swap_in.TOLERANCE
    assert {r["components"] for r in committed["records"]} == {size.components for size in swap_in.SIZES}
    table = swap_in.markdown(committed["records"], committed["curves"])
    assert "| 50,000 | csdiv |" in table
    assert "gains little" in table

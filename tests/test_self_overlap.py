"""SelfOverlapExpansion: log V(p, p) of a prior under training, computed at some steps only."""

import copy
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mixtures import mixture, on_every_structure
from torch import Tensor

import csdiv
from csdiv import GaussianMixture
from csdiv.nn import GaussianMixturePrior, SelfOverlapExpansion

close = torch.testing.assert_close


def moved(p: GaussianMixture, step: float) -> GaussianMixture:
    """p with other parameters of the same structure, which require gradients."""
    generator = torch.Generator().manual_seed(3)
    scaled = p.map(lambda t: t * (1.0 + step * torch.randn(t.shape, generator=generator, dtype=t.dtype)))
    return scaled.map(lambda t: t.detach().requires_grad_())


@on_every_structure
def test_expansion_is_exact_at_its_origin(structure: str) -> None:
    p = moved(mixture(structure), 0.0)
    value, exact = SelfOverlapExpansion(2)(p), csdiv.log_overlap(p)
    close(value, exact)
    close(torch.autograd.grad(value, p._tensors()), torch.autograd.grad(exact, p._tensors()))


@on_every_structure
def test_expansion_is_accurate_to_first_order(structure: str) -> None:
    """A change ten times as small gives an error a hundred times as small."""
    p, errors = mixture(structure), []
    for step in (1e-3, 1e-4):
        expansion, q = SelfOverlapExpansion(2), moved(p, step)
        before, exact = expansion(p), csdiv.log_overlap(q)
        errors.append(abs(expansion(q) - exact).item())
        assert errors[-1] < 0.2 * abs(exact - before)
    assert errors[0] / errors[1] == pytest.approx(100, rel=0.2)


def test_expansion_in_log_variances_of_one_gaussian_is_exact() -> None:
    """log V = −½ Σ log 4πs."""
    expansion, mean = SelfOverlapExpansion(2), torch.zeros(1, 3)
    expansion(GaussianMixture(mean, torch.ones(1, 3)))
    p = GaussianMixture(mean, torch.tensor([[1e-3, 1.0, 1e3]]))
    close(expansion(p), csdiv.log_overlap(p))


def test_expansion_with_weights_and_variances_of_zero() -> None:
    """They stay where they are, and the others move."""
    points = torch.tensor([[0.0, 0.0], [5.0, 0.0], [9.0, 9.0]], dtype=torch.float64)
    variances = torch.tensor([[1.0, 0.5], [0.0, 2.0], [1.0, 1.0]], dtype=torch.float64)
    log_weights = torch.tensor([-0.5, -torch.inf, -0.7], dtype=torch.float64)
    p = GaussianMixture(points, variances, log_weights=log_weights)
    expansion, step = SelfOverlapExpansion(2), 1e-4 * torch.randn(3, 2, dtype=torch.float64)
    expansion(p)
    q = GaussianMixture(points + step, variances, log_weights=log_weights).map(lambda t: t.clone().requires_grad_())
    value = expansion(q)
    close(value, csdiv.log_overlap(q), rtol=0.0, atol=1e-7)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(value, q._tensors()))


def test_expansion_computes_every_n_calls_and_after_refresh() -> None:
    p = mixture()
    expansion, found = SelfOverlapExpansion(3), []
    for step in range(7):
        q = moved(p, 0.1 * step)
        if step == 5:
            expansion.refresh()
        found.append(torch.equal(expansion(q), csdiv.log_overlap(q)))
    assert found == [True, False, False, True, False, True, False]
    with torch.no_grad():
        assert torch.equal(SelfOverlapExpansion(1)(p), csdiv.log_overlap(p))


def test_expansion_does_not_follow_parameters_changed_in_place() -> None:
    prior = GaussianMixturePrior(5, 2)
    p = GaussianMixture(prior.means, prior.log_variances)  # the caller's own tensors
    prior.log_variances.data.fill_(1.0)
    expansion = SelfOverlapExpansion(2)
    before = expansion(p).item()
    prior.means.data *= 1.01
    assert expansion(p).item() != before
    assert copy.deepcopy(expansion).interval == 2


def test_expansion_refuses_batches_and_intervals_below_one() -> None:
    for interval in (0, -1):
        with pytest.raises(ValueError, match=f"interval: at least 1 expected, got {interval}"):
            SelfOverlapExpansion(interval)
    with pytest.raises(ValueError, match=r"p: one mixture expected, got a batch \(2,\)"):
        SelfOverlapExpansion(2)(mixture(batch_shape=(2,)))


# The direction in which a prior is trained


def cosines(self_overlap: Callable[[GaussianMixture], Tensor]) -> list[float]:
    """Of the prior's gradient with the exact one, at ten steps of gradient descent."""
    torch.manual_seed(0)
    prior = GaussianMixturePrior(200, 4).double()
    prior.initialize_(torch.randn(200, 4).double(), torch.rand(200, 4).double() + 0.1)
    means, log_variances = prior().sample(256), torch.full((256, 4), -2.0, dtype=torch.float64)
    optimizer, found = torch.optim.SGD(prior.parameters(), lr=2.0), []
    for _ in range(10):
        exact = torch.autograd.grad(csdiv.cs_regularizer(means, log_variances, prior).mean(), list(prior.parameters()))
        p = prior()
        loss = csdiv.cs_regularizer(means, log_variances, p, prior_self_overlap=self_overlap(p)).mean()
        optimizer.zero_grad()
        loss.backward()
        sides = [torch.cat([t.flatten() for t in grads]) for grads in (exact, [t.grad for t in prior.parameters()])]
        found.append(torch.cosine_similarity(*sides, dim=0).item())
        optimizer.step()
    return found


@pytest.mark.parametrize("interval", [1, 2, 5, 10])
def test_expansion_trains_in_the_exact_direction(interval: int) -> None:
    found = cosines(SelfOverlapExpansion(interval))
    assert all(cosine > 1.0 - 1e-9 for cosine in found[::interval])
    assert min(found) > 0.99


def test_detached_self_overlap_does_not() -> None:
    """Which is why the documentation warns of it, even of a value that is fresh."""
    assert max(cosines(lambda p: csdiv.log_overlap(p).detach())) < 0.8


def test_loop_in_the_documentation_runs() -> None:
    text = (Path(__file__).parents[1] / "docs" / "autoencoder.md").read_text()
    (loop,) = [b for b in re.findall(r"^```python\n(.*?)^```", text, re.M | re.S) if "SelfOverlapExpansion" in b]
    names: dict[str, object] = {}
    exec(compile(loop, "docs/autoencoder.md", "exec"), names)
    assert names["regularizer"].isfinite().all()

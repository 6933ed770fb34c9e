"""What tests of bad and unusual inputs share."""

import math
from collections.abc import Callable

import pytest
import torch
from entries import BACKENDS
from torch import Tensor

import csdiv
from csdiv import GaussianMixture, testing

FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "cs_divergence": csdiv.cs_divergence,
    "log_overlap": csdiv.log_overlap,
    "component_log_overlap": csdiv.component_log_overlap,
    "pairwise_log_overlap": csdiv.pairwise_log_overlap,
    "cosine_similarity": csdiv.cosine_similarity,
    "ise": csdiv.ise,
    "nise": csdiv.nise,
    "mmd2": lambda p, q, backend: csdiv.mmd2(p, q, 0.7, backend=backend),
    "channel_log_overlap": lambda p, q, backend: csdiv.channel_log_overlap(p, q, *channels(p, q), backend=backend),
    "responsibilities": lambda p, q, backend: q.responsibilities(p, backend=backend),
    "assign": lambda p, q, backend: q.assign(p, backend=backend),
}

REDUCTIONS = ("cosine_similarity", "ise", "nise", "mmd2", "channel_log_overlap")

on_every_backend = pytest.mark.parametrize("backend", BACKENDS)
on_every_function = pytest.mark.parametrize("function", list(FUNCTIONS.values()), ids=list(FUNCTIONS))
on_every_reduction = pytest.mark.parametrize("function", [FUNCTIONS[name] for name in REDUCTIONS], ids=REDUCTIONS)
on_every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def ones(*shape: int, **options: object) -> Tensor:
    return torch.ones(shape, **options)


def mixture(k: int = 4, d: int = 3, **options: object) -> GaussianMixture:
    return testing.random_mixture(k, d, **options)


def tensors(p: GaussianMixture) -> list[Tensor]:
    return [t for t in (p.means, p.variances, p.log_weights) if t is not None]


def channels(p: GaussianMixture, q: GaussianMixture) -> tuple[Tensor, Tensor]:
    """One channel of each side, of its own weights."""
    return p.log_weights.unsqueeze(-2), q.log_weights.unsqueeze(-2)


def with_gradients(p: GaussianMixture) -> GaussianMixture:
    return p.map(lambda t: t.clone().requires_grad_())


def gradients_are_finite(value: Tensor, *sides: GaussianMixture) -> bool:
    """Whether no gradient of the sum of ``value`` is NaN or infinite."""
    inputs = [t for side in sides for t in tensors(side) if t.requires_grad]
    grads = torch.autograd.grad(value.sum(), inputs, materialize_grads=True, retain_graph=True)
    return all(bool(g.isfinite().all()) for g in grads)


def with_absent_component(p: GaussianMixture, index: int, **values: float) -> GaussianMixture:
    """p with a component of weight zero inserted, whose means and variances are ``values``."""

    def insert(t: Tensor, value: float) -> Tensor:
        return torch.cat([t[:index], torch.full_like(t[:1], value), t[index:]])

    means, variances, log_weights = tensors(p)
    return GaussianMixture(
        insert(means, values["means"]),
        insert(variances, values["variances"]),
        log_weights=insert(log_weights, -math.inf),
    )

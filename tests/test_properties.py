"""Laws that hold for every mixture, looked for by hypothesis in shapes and magnitudes nobody would write down.

Two evaluations of one mathematical value differ by both their errors: by the band of each, see csdiv.testing.
"""

import math

import pytest
import torch
from entries import BACKENDS
from hypothesis import given
from hypothesis import strategies as st

import csdiv
from csdiv import GaussianMixture, testing

SIZES = st.sampled_from([1, 2, 3, 7, 15, 16, 17, 31, 33, 63, 65])
DIMS = st.sampled_from([1, 2, 3, 4, 5, 8, 16, 17, 33])
on_every_backend = pytest.mark.parametrize("backend", BACKENDS)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[GaussianMixture, GaussianMixture]:
    """Two float32 mixtures: any structure, variances 10^±(0.3, 6 or 30) within one dimension, some weights zero.

    Means are spread by what the variances of their dimension allow, so that mixtures overlap at every magnitude.
    """
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    dim, decades = draw(DIMS), draw(st.sampled_from([0.0, 0.3, 6.0, 30.0]))
    scale = 10.0 ** draw(st.sampled_from([-6.0, 0.0, 6.0])) if decades < 30.0 else 1.0
    sides = []
    for _ in range(2):
        structure = draw(st.sampled_from(testing.STRUCTURES[:4]))
        batch = draw(st.sampled_from([(), (), (3,), (1,)]))
        p = testing.random_mixture(
            draw(SIZES), dim, batch_shape=batch, structure=structure, decades=decades, generator=g
        )
        log_weights = p.log_weights.clone()
        if draw(st.booleans()):
            log_weights[..., 1::2] = -math.inf
        sides.append(GaussianMixture(p.means * scale, p.variances * min(scale * scale, 1e7), log_weights=log_weights))
    return sides[0], sides[1]


def allowed(backend: str, *arguments: GaussianMixture, entry: str = "cs_divergence") -> torch.Tensor:
    """The band of one evaluation; of the reference, which takes no scale out, that of its own formula."""
    return testing.band(entry, *(p.to(torch.float64) for p in arguments), scaled=backend != "reference")


def assert_same(a: torch.Tensor, b: torch.Tensor, band: torch.Tensor) -> None:
    eps = torch.finfo(a.dtype).eps
    assert a.shape == b.shape
    close = (a - b).abs() <= 2.0 * (band + eps * torch.maximum(a.abs(), b.abs()))
    assert bool((close | (a == b)).all()), f"{a} and {b}, allowed {2.0 * band}"


def permuted(p: GaussianMixture) -> GaussianMixture:
    order = torch.arange(p.num_components).flip(0)
    rows = order if p.variances.shape[-2] > 1 else slice(None)
    return GaussianMixture(p.means[..., order, :], p.variances[..., rows, :], log_weights=p.log_weights[..., order])


def full_rows(p: GaussianMixture) -> torch.Tensor:
    return p.variances.expand(*p.variances.shape[:-2], p.num_components, p.variances.shape[-1])


@on_every_backend
@given(pair=pairs())
def test_symmetric(pair: tuple[GaussianMixture, GaussianMixture], backend: str) -> None:
    p, q = pair
    band = allowed(backend, p, q)
    assert_same(csdiv.cs_divergence(p, q, backend=backend), csdiv.cs_divergence(q, p, backend=backend), band)
    band = allowed(backend, p, q, entry="log_overlap")
    assert_same(csdiv.log_overlap(p, q, backend=backend), csdiv.log_overlap(q, p, backend=backend), band)


@on_every_backend
@given(pair=pairs())
def test_not_negative_and_zero_for_equal_mixtures(pair: tuple[GaussianMixture, GaussianMixture], backend: str) -> None:
    p, q = pair
    assert bool((csdiv.cs_divergence(p, q, backend=backend) >= -allowed(backend, p, q)).all())
    assert bool((csdiv.cs_divergence(p, p, backend=backend).abs() <= allowed(backend, p, p)).all())
    rescaled = GaussianMixture(p.means, p.variances, log_weights=p.log_weights + 2.0)
    assert bool((csdiv.cs_divergence(p, rescaled, backend=backend).abs() <= allowed(backend, p, rescaled)).all())


@on_every_backend
@given(pair=pairs())
def test_components_may_be_permuted_split_or_added_without_weight(
    pair: tuple[GaussianMixture, GaussianMixture], backend: str
) -> None:
    p, q = pair
    value, band = csdiv.cs_divergence(p, q, backend=backend), allowed(backend, p, q)
    assert_same(csdiv.cs_divergence(permuted(p), permuted(q), backend=backend), value, band)
    weights = p.log_weights
    share = torch.tensor(0.25).log()
    for extra, first in (
        (weights[..., :1] + torch.log1p(-share.exp()), weights[..., :1] + share),
        (-math.inf, weights[..., :1]),
    ):
        extra = torch.as_tensor(extra).expand(*weights.shape[:-1], 1)
        longer = GaussianMixture(
            torch.cat([p.means, p.means[..., :1, :]], -2),
            torch.cat([full_rows(p), full_rows(p)[..., :1, :]], -2),
            log_weights=torch.cat([first, weights[..., 1:], extra], -1),
        )
        band = torch.maximum(allowed(backend, p, q), allowed(backend, longer, q))
        assert_same(csdiv.cs_divergence(longer, q, backend=backend), value, band)


@on_every_backend
@given(pair=pairs(), exponent=st.integers(-6, 6), reflect=st.booleans())
def test_common_affine_map(
    pair: tuple[GaussianMixture, GaussianMixture], exponent: int, reflect: bool, backend: str
) -> None:
    """Scales are powers of two, so that the mapped parameters are exact."""
    p, q = pair
    a = 2.0**exponent * (-1.0 if reflect else 1.0)
    moved = [GaussianMixture(s.means.flip(-1) * a, full(s).flip(-1) * a * a, log_weights=s.log_weights) for s in pair]
    band = allowed(backend, p, q) + allowed(backend, *moved)
    assert_same(csdiv.cs_divergence(*moved, backend=backend), csdiv.cs_divergence(p, q, backend=backend), band)


def full(p: GaussianMixture) -> torch.Tensor:
    return p.variances.expand(*p.variances.shape[:-1], p.dim)


@on_every_backend
@given(pair=pairs())
def test_weight_gradients_sum_to_zero_and_none_is_nan(
    pair: tuple[GaussianMixture, GaussianMixture], backend: str
) -> None:
    p, q = (side.map(lambda t: t.clone().requires_grad_()) for side in pair)
    value = csdiv.cs_divergence(p, q, backend=backend)
    inputs = [t for side in (p, q) for t in side._tensors()]
    grads = torch.autograd.grad(value.sum(), inputs)
    assert all(not g.isnan().any() for g in grads)
    wide = [side.to(torch.float64).map(lambda t: t.detach().requires_grad_()) for side in (p, q)]
    leaves = [t for side in wide for t in side._tensors()]
    bands = testing.gradient_bands(
        "cs_divergence", *wide, torch.ones_like(value), leaves, scaled=backend != "reference"
    )
    for name, grad, band in zip(("p", "q"), grads[2::3], bands[2::3], strict=True):
        assert bool((grad.double().sum(-1).abs() <= band.sum(-1)).all()), name

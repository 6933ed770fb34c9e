"""Tensors made from what users have, and the precision of checks and constructors."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from mixtures import close, mixture

import csdiv
from csdiv import GaussianMixture
from csdiv.checks import as_float_tensor

BASE = np.arange(24.0).reshape(4, 6)


def read_only(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    "array",
    [
        BASE[::-1, ::-1],
        BASE.astype(">f8"),
        BASE.astype(">f4")[::-1],
        BASE.astype("f2"),
        np.zeros(4, [("name", "u1"), ("x", "<f4")])["x"],
        np.rec.fromarrays([BASE, BASE], names="a, b").a,
        np.asfortranarray(BASE)[:, ::-2],
        read_only(BASE),
        np.broadcast_to(BASE[0], (3, 6)),
        np.array(2.5, ">f4"),
        BASE[:0, ::-1],
    ],
)
@pytest.mark.filterwarnings("error")
def test_numpy_arrays_of_any_memory_are_taken(array: np.ndarray) -> None:
    found = as_float_tensor(array, "means")
    assert found.shape == array.shape
    np.testing.assert_array_equal(found.numpy(), array)


def test_numpy_arrays_share_their_memory() -> None:
    array = BASE.copy()
    assert as_float_tensor(array, "means").data_ptr() == array.ctypes.data


@pytest.mark.parametrize(
    "array", [np.array(["a"]), np.array([None]), np.arange(3), np.zeros(3, "M8[s]"), np.zeros(3, "c8")]
)
def test_numpy_arrays_of_other_types_are_refused_by_name(array: np.ndarray) -> None:
    with pytest.raises(TypeError, match="weights: floating point expected, got"):
        as_float_tensor(array, "weights")
    with pytest.raises(TypeError, match="x: floating point expected, got"):
        mixture().log_prob(array)


def test_log_prob_takes_arrays_backwards_and_names_its_argument() -> None:
    p = mixture()
    x = np.random.default_rng(0).normal(size=(5, 3))
    close(p.log_prob(x[::-1]), p.log_prob(x).flip(0))
    for method in (p.log_prob, p.assign, p.responsibilities):
        with pytest.raises(ValueError, match="one dimension expected, got D = 2 in x and D = 3 in p"):
            method(torch.zeros(5, 2))
    with pytest.raises(ValueError, match=r"batch shapes .* got \(3,\) in x and \(2,\) in p"):
        mixture(batch_shape=(2,)).log_prob(torch.zeros(3, 5, 3))
    with pytest.raises(TypeError, match="x: a tensor expected, got list"):
        p.log_prob([[0.0, 0.0, 0.0]])


def is_positive_definite(matrix: torch.Tensor) -> bool:
    """Leading minors of a 3 × 3 matrix in exact arithmetic."""
    a, b, c, d, e, f = (Fraction(matrix[i, j].item()) for i, j in ((0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2)))
    return a > 0 and a * c > b * b and a * (c * f - e * e) - b * (b * f - e * d) + d * (b * e - c * d) > 0


@pytest.mark.parametrize("thin", [2e-4, 5e-5])
def test_covariances_of_needles_are_refused_if_they_are_not_positive_definite(thin: float) -> None:
    """Rotated and rounded to float32, some of the thinner ones are not; a factor in float32 misjudges some."""
    torch.manual_seed(0)
    rotations = torch.linalg.qr(torch.randn(300, 3, 3, dtype=torch.float64)).Q
    scaled = rotations * torch.tensor([1.0, thin, thin], dtype=torch.float64)
    needles = (scaled @ scaled.mT).float()
    needles = needles.tril() + needles.tril(-1).mT
    expected = torch.tensor([is_positive_definite(matrix) for matrix in needles])
    assert bool(expected.all()) == (thin > 1e-4)
    assert not torch.equal(torch.linalg.cholesky_ex(needles).info == 0, expected)
    GaussianMixture(torch.zeros(1, 3), covariance_matrix=needles[expected].unsqueeze(1))
    for matrix in needles[~expected]:
        with pytest.raises(ValueError, match="covariance_matrix: positive definite expected"):
            GaussianMixture(torch.zeros(1, 3), covariance_matrix=matrix.unsqueeze(0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_logits_of_half_precision_are_normalised_in_float32(dtype: torch.dtype) -> None:
    """log(1/K) is no number of float16 that is near, and the sum overflows."""
    k, x = 10**5, torch.zeros(1, 1, dtype=dtype)
    logits = torch.zeros(k, dtype=dtype, requires_grad=True)
    p = GaussianMixture(torch.zeros(k, 1, dtype=dtype), torch.ones(1, 1, dtype=dtype), logits=logits)
    found = p.log_prob(x)
    close(found, torch.tensor([-0.5 * math.log(2.0 * math.pi)]), rtol=1e-6, atol=0.0)
    (grad,) = torch.autograd.grad(found.sum(), logits)
    assert grad.dtype == dtype
    assert grad.float().abs().max() < 1e-9
    given = GaussianMixture(p.means, p.variances, log_weights=torch.full((k,), 2.0, dtype=dtype))
    close(given.normalized().log_prob(x), found.detach(), rtol=1e-6, atol=0.0)


def test_logits_of_many_components_are_normalised() -> None:
    """Light ones beside heavy ones: 2²⁵ of e⁻²⁰ add up to 0.069 of the heavy one's weight."""
    k = 2**25
    logits = torch.full((k,), -20.0)
    logits[0] = 0.0
    p = GaussianMixture(torch.zeros(k, 1), torch.ones(1, 1), logits=logits)
    total = 1.0 + (k - 1) * math.exp(-20.0)
    close(
        p.log_weights[:2].double(),
        torch.tensor([-math.log(total), -20.0 - math.log(total)]).double(),
        rtol=2e-7,
        atol=1e-9,
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("covariance", ["diag", "spherical", "tied", "tied_spherical"])
def test_prior_of_half_precision_is_computed_in_float32(covariance: str, dtype: torch.dtype) -> None:
    prior = csdiv.nn.GaussianMixturePrior(20, 4, covariance)
    with torch.no_grad():
        prior.log_variances.uniform_(-3.0, 3.0)
        prior.logits.normal_()
    prior.to(dtype)
    wide = csdiv.nn.GaussianMixturePrior(20, 4, covariance).double()
    wide.load_state_dict(prior.state_dict())
    values = csdiv.log_overlap(prior), csdiv.log_overlap(wide)
    assert values[0].dtype == torch.float32
    close(values[0].double(), values[1], rtol=1e-6, atol=1e-6)
    grads = [
        torch.autograd.grad(value, list(module.parameters()))
        for value, module in zip(values, (prior, wide), strict=True)
    ]
    for found, expected in zip(*grads, strict=True):
        assert found.dtype == dtype
        close(found.double(), expected, rtol=1e-2, atol=1e-5)

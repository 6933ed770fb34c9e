"""Closed forms, 40-digit vectors and laws, on every backend: what the numbers themselves must be."""

import json
import math
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from entries import BACKENDS, WITH_FULL
from torch import Tensor

import csdiv
from csdiv import GaussianMixture, testing

DTYPES = (torch.float32, torch.float64)
VECTORS = json.loads((Path(__file__).parent / "vectors.json").read_text())
on_every_backend = pytest.mark.parametrize("backend", BACKENDS)
on_every_full_backend = pytest.mark.parametrize("backend", WITH_FULL)


def tolerance(dtype: torch.dtype, *terms: float) -> float:
    """The error allowed where the terms of these sizes are added up: 1e-12 in float64, else 4 eps max(1, |terms|)."""
    if dtype == torch.float64:
        return 1e-12
    return 4.0 * torch.finfo(dtype).eps * max(1.0, *map(abs, terms))


def numbers(value: object) -> Tensor:
    """Nested lists of numbers and fractions such as "14/45" as float64."""

    def parse(v: object) -> object:
        return [parse(x) for x in v] if isinstance(v, list) else float(Fraction(str(v)))

    return torch.tensor(parse(value), dtype=torch.float64)


def mixture(weights: Tensor, means: Tensor, covariances: Tensor) -> GaussianMixture:
    log_weights = (weights / weights.sum()).log()
    if covariances.ndim == 3:
        return GaussianMixture(means, covariance_matrix=covariances, log_weights=log_weights)
    return GaussianMixture(means.view(len(weights), -1), covariances.view(len(weights), -1), log_weights=log_weights)


def vector(name: str) -> tuple[GaussianMixture, GaussianMixture, dict[str, float]]:
    """p, q and the expected values; what the file says of q in words is done here."""
    entry = VECTORS[name]
    source = VECTORS["nrl_2d"] if isinstance(entry["p"], str) else entry
    p = source["p"]
    parameters = [numbers(p["weights"]), numbers(p["means"]), numbers(p.get("covariances", p.get("variances")))]
    if name == "nrl_2d_moment_matched":
        w, m, s = parameters
        mean = w @ m
        q = mixture(
            torch.ones(1),
            mean[None],
            (torch.einsum("k,kij->ij", w, s + m[:, :, None] * m[:, None]) - mean.outer(mean))[None],
        )
    elif isinstance(entry["q"], str):
        kept = {"nrl_2d": [1, 2], "williams_1d": [1, 2, 3, 5, 7, 8]}[name]
        q = mixture(*(t[kept] for t in parameters))
    else:
        q = mixture(*(numbers(entry["q"][key]) for key in ("weights", "means", "variances")))
    return mixture(*parameters), q, {k: float(v) for k, v in entry.items() if k not in ("p", "q", "source")}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", sorted(VECTORS))
@on_every_backend
def test_vectors(name: str, dtype: torch.dtype, backend: str) -> None:
    p, q, expected = vector(name)
    p, q = p.to(dtype), q.to(dtype)
    if p.variances is None and backend not in WITH_FULL:
        pytest.skip(f"{backend} has no full covariances")
    found = {
        "cs_divergence": csdiv.cs_divergence(p, q, backend=backend),
        "log_overlap_pq": csdiv.log_overlap(p, q, backend=backend),
        "log_overlap_pp": csdiv.log_overlap(p, backend=backend),
        "log_overlap_qq": csdiv.log_overlap(q, backend=backend),
        "ise": csdiv.ise(p, q, backend=backend),
    }
    terms = [value for key, value in expected.items() if key.startswith("log")]
    for key, value in expected.items():
        assert found[key].item() == pytest.approx(value, rel=0.0, abs=tolerance(dtype, *terms)), key


def test_vectors_are_all_used() -> None:
    assert set(VECTORS) == {"nrl_2d", "nrl_2d_moment_matched", "williams_1d", "diagonal_3d"}


def random_pair(dim: int = 4, structure: str = "diagonal", dtype: torch.dtype = torch.float64) -> list[GaussianMixture]:
    g = torch.Generator().manual_seed(7)
    return [testing.random_mixture(k, dim, structure=structure, dtype=dtype, generator=g) for k in (5, 7)]


def close(actual: Tensor, expected: Tensor | float, allowed: float = 1e-12) -> None:
    torch.testing.assert_close(
        actual, torch.as_tensor(expected, dtype=actual.dtype).expand_as(actual), rtol=allowed, atol=allowed
    )


# Analytic values


@on_every_backend
def test_two_gaussians(backend: str) -> None:
    """D = ¼ δᵀM⁻¹δ + ½ log(|M| / √(|S||T|)), M = (S + T)/2."""
    p, q = (side.map(lambda t: t[:1]) for side in random_pair())
    p, q = GaussianMixture(p.means, p.variances), GaussianMixture(q.means, q.variances)
    m, delta = 0.5 * (p.variances + q.variances), p.means - q.means
    expected = (0.25 * delta**2 / m + 0.5 * (m.log() - 0.5 * (p.variances * q.variances).log())).sum()
    close(csdiv.cs_divergence(p, q, backend=backend), expected)


@on_every_full_backend
def test_two_gaussians_of_full_covariance(backend: str) -> None:
    p, q = (GaussianMixture(side.means[:1], scale_tril=side.scale_tril[:1]) for side in random_pair(structure="full"))
    s, t = (side.scale_tril[0] @ side.scale_tril[0].mT for side in (p, q))
    m, delta = 0.5 * (s + t), (p.means - q.means)[0]
    expected = 0.25 * delta @ torch.linalg.solve(m, delta) + 0.5 * (m.logdet() - 0.5 * (s.logdet() + t.logdet()))
    close(csdiv.cs_divergence(p, q, backend=backend), expected)


@on_every_backend
def test_two_gaussians_of_equal_covariance(backend: str) -> None:
    """D = ¼ δᵀS⁻¹δ, half of the Kullback–Leibler divergence."""
    p, q = random_pair()
    p, q = GaussianMixture(p.means[:1], p.variances[:1]), GaussianMixture(q.means[:1], p.variances[:1])
    close(csdiv.cs_divergence(p, q, backend=backend), (0.25 * (p.means - q.means) ** 2 / p.variances).sum())


@on_every_backend
def test_gaussian_against_the_standard_normal(backend: str) -> None:
    """Σ_d [ μ²/(2(1+s)) + ½ log(1+s) − ¼ log s − ½ log 2 ]."""
    p, _ = random_pair()
    m, s = p.means[0], p.variances[0]
    expected = (m**2 / (2.0 * (1.0 + s)) + 0.5 * (1.0 + s).log() - 0.25 * s.log() - 0.5 * math.log(2.0)).sum()
    normal = GaussianMixture(torch.zeros_like(m)[None], torch.ones_like(s)[None])
    close(csdiv.cs_divergence(GaussianMixture(m[None], s[None]), normal, backend=backend), expected)
    close(csdiv.cs_regularizer(m[None], s[None].log(), normal, backend=backend), expected)


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("a", "printed"), [(0.5, 0.00389611965944916), (1.0, 0.0600572534791388), (3.0, 1.90348811081489)]
)
def test_two_modes_against_the_standard_normal(a: float, printed: float, dtype: torch.dtype, backend: str) -> None:
    """½ N(−a, 1) + ½ N(a, 1) against N(0, 1): a²/4 + ½ log((1 + e^{−a²})/2)."""
    p = GaussianMixture(torch.tensor([[-a], [a]], dtype=dtype), torch.ones(1, 1, dtype=dtype))
    q = GaussianMixture(torch.zeros(1, 1, dtype=dtype), torch.ones(1, 1, dtype=dtype))
    divergence = csdiv.cs_divergence(p, q, backend=backend).item()
    assert divergence == pytest.approx(printed, rel=0.0, abs=tolerance(dtype, 1.0 + a * a))
    assert 0.25 * a * a + 0.5 * math.log(0.5 * (1.0 + math.exp(-a * a))) == pytest.approx(printed, rel=1e-12)


@on_every_backend
@pytest.mark.parametrize("shift", [5.0, 20.0])
def test_shift_orthogonal_to_the_means(shift: float, backend: str) -> None:
    """|shift|²/(4σ²) whatever the mixture: 6.25 and 100, the example of Kampa et al. 2011."""
    means = torch.randn(6, 3, dtype=torch.float64)
    means[:, 2] = 0.0
    weights = torch.randn(6, dtype=torch.float64)
    moved = means + torch.tensor([0.0, 0.0, shift], dtype=torch.float64)
    one = torch.ones(1, 1, dtype=torch.float64)
    divergence = csdiv.cs_divergence(
        GaussianMixture(means, one, log_weights=weights),
        GaussianMixture(moved, one, log_weights=weights),
        backend=backend,
    )
    close(divergence, {5.0: 6.25, 20.0: 100.0}[shift])


@on_every_backend
def test_log_form_of_diagonal_gaussians(backend: str) -> None:
    """log κ = Σ_d [ −½ log cosh h − ¼ δ² e^{−m} / cosh h ] is −D_CS of two Gaussians."""
    p, q = random_pair()
    u, v, delta = p.variances[0].log(), q.variances[0].log(), p.means[0] - q.means[0]
    m, h = 0.5 * (u + v), 0.5 * (u - v)
    log_kappa = (-0.5 * h.cosh().log() - 0.25 * delta**2 * (-m).exp() / h.cosh()).sum()
    p, q = GaussianMixture(p.means[:1], p.variances[:1]), GaussianMixture(q.means[:1], q.variances[:1])
    close(csdiv.cs_divergence(p, q, backend=backend), -log_kappa)


# Laws of the values


@on_every_backend
def test_additive_over_independent_blocks(backend: str) -> None:
    """p₁ ⊗ p₂ against q₁ ⊗ q₂: the divergences add."""
    (p1, q1), (p2, q2) = random_pair(2), random_pair(3)
    divergences = [csdiv.cs_divergence(a, b, backend=backend) for a, b in ((p1, q1), (p2, q2))]
    products = [
        GaussianMixture(
            torch.cat([a.means.repeat_interleave(b.num_components, 0), b.means.repeat(a.num_components, 1)], -1),
            torch.cat(
                [a.variances.repeat_interleave(b.num_components, 0), b.variances.repeat(a.num_components, 1)], -1
            ),
            log_weights=(a.log_weights[:, None] + b.log_weights).flatten(),
        )
        for a, b in ((p1, p2), (q1, q2))
    ]
    close(csdiv.cs_divergence(*products, backend=backend), sum(divergences))


@on_every_backend
def test_overlap_under_an_affine_map(backend: str) -> None:
    """V(Ap, Aq) = V/|det A| and D(Ap, Aq) = D, A diagonal."""
    p, q = random_pair()
    a = torch.tensor([0.5, -3.0, 10.0, 1e-3], dtype=torch.float64)
    moved = [GaussianMixture(s.means * a + 2.0, s.variances * a**2, log_weights=s.log_weights) for s in (p, q)]
    expected = csdiv.log_overlap(p, q, backend=backend) - a.abs().log().sum()
    close(csdiv.log_overlap(*moved, backend=backend), expected)
    close(csdiv.cs_divergence(*moved, backend=backend), csdiv.cs_divergence(p, q, backend=backend))


@on_every_full_backend
def test_overlap_under_a_full_affine_map(backend: str) -> None:
    p, q = random_pair(structure="full")
    a = torch.randn(4, 4, dtype=torch.float64)
    s = [side.scale_tril @ side.scale_tril.mT for side in (p, q)]
    moved = []
    for side, matrix in zip((p, q), s, strict=True):
        covariance = a @ matrix @ a.mT
        covariance = 0.5 * (covariance + covariance.mT)
        moved.append(GaussianMixture(side.means @ a.mT, covariance_matrix=covariance, log_weights=side.log_weights))
    expected = csdiv.log_overlap(p, q, backend=backend) - a.det().abs().log()
    close(csdiv.log_overlap(*moved, backend=backend), expected, 1e-11)
    close(csdiv.cs_divergence(*moved, backend=backend), csdiv.cs_divergence(p, q, backend=backend), 1e-11)


@on_every_backend
def test_maximum_mean_discrepancy(backend: str) -> None:
    """(2πg²)^{D/2} [V_g(p,p) − 2 V_g(p,q) + V_g(q,q)] against ∬ (p − q)(x) k(x, y) (p − q)(y) by quadrature, D = 1."""
    p, q = (side.normalized() for side in random_pair(1))
    g = 0.7
    x = torch.linspace(-12.0, 12.0, 2401, dtype=torch.float64)
    difference = (p.log_prob(x[:, None], backend=backend).exp() - q.log_prob(x[:, None], backend=backend).exp()) * (
        x[1] - x[0]
    )
    kernel = torch.exp(-((x[:, None] - x) ** 2) / (2.0 * g * g))
    close(csdiv.mmd2(p, q, g, backend=backend), difference @ kernel @ difference, 1e-9)


@on_every_backend
def test_overlap_is_the_integral_of_the_product(backend: str) -> None:
    p, q = random_pair(1)
    x = torch.linspace(-12.0, 12.0, 4001, dtype=torch.float64)[:, None]
    product = (p.log_prob(x, backend=backend) + q.log_prob(x, backend=backend)).exp()
    close(csdiv.log_overlap(p, q, backend=backend).exp(), torch.trapezoid(product, x[:, 0]), 1e-9)
    close(csdiv.renyi2_entropy(p, backend=backend), -csdiv.log_overlap(p, p, backend=backend))


# Laws of the gradients


def gradients(backend: str, structure: str = "diagonal") -> tuple[list[GaussianMixture], list[Tensor]]:
    sides = [side.map(lambda t: t.requires_grad_()) for side in random_pair(structure=structure)]
    inputs = [t for side in sides for t in side._tensors()]
    return sides, list(torch.autograd.grad(csdiv.cs_divergence(*sides, backend=backend), inputs))


@on_every_backend
def test_weight_gradients_sum_to_zero_on_each_side(backend: str) -> None:
    _, grads = gradients(backend)
    for grad in (grads[2], grads[5]):
        assert grad.abs().max() > 1e-3
        close(grad.sum(), 0.0)


@on_every_backend
def test_mean_gradients_of_a_common_translation_vanish(backend: str) -> None:
    _, grads = gradients(backend)
    close(grads[0].sum(0) + grads[3].sum(0), 0.0)


@on_every_backend
def test_gradients_of_a_common_scaling_vanish(backend: str) -> None:
    """The diagonal of Σ (g_μ μᵀ + 2 g_S S) over both sides."""
    sides, grads = gradients(backend)
    total = sum((grads[3 * i] * s.means + 2.0 * grads[3 * i + 1] * s.variances).sum(0) for i, s in enumerate(sides))
    close(total.detach(), 0.0)


@on_every_full_backend
def test_gradients_of_a_common_linear_map_vanish(backend: str) -> None:
    """Σ (g_μ μᵀ + 2 g_S S) over both sides = 0, a D×D matrix."""
    total = torch.zeros(4, 4, dtype=torch.float64)
    sides = []
    for side in random_pair(structure="full"):
        covariance = (side.scale_tril @ side.scale_tril.mT).requires_grad_()
        sides.append(
            GaussianMixture(side.means.requires_grad_(), covariance_matrix=covariance, log_weights=side.log_weights)
        )
    csdiv.cs_divergence(*sides, backend=backend).backward()
    for side in sides:
        total += side.means.grad.mT @ side.means.detach()
        total += 2.0 * (side.covariance_matrix.grad @ side.covariance_matrix.detach()).sum(0)
    close(total, 0.0)


@on_every_backend
def test_gradients_are_zero_for_equal_mixtures(backend: str) -> None:
    p = random_pair()[0]
    q = p.map(torch.clone)
    inputs = [t.requires_grad_() for side in (p, q) for t in side._tensors()]
    for grad in torch.autograd.grad(csdiv.cs_divergence(p, q, backend=backend), inputs):
        close(grad, 0.0)


def test_hessian_is_positive_semidefinite_for_equal_mixtures() -> None:
    """D has its minimum at p = q."""
    p = random_pair(2)[0]
    flat = torch.cat([p.means.flatten(), p.variances.log().flatten()])

    def divergence(x: Tensor) -> Tensor:
        means, log_variances = x.view(2, *p.means.shape)
        return csdiv.cs_divergence(GaussianMixture(means, log_variances.exp(), log_weights=p.log_weights), p)

    values = torch.linalg.eigvalsh(torch.func.hessian(divergence)(flat))
    assert values.min() > -1e-12
    assert values.max() > 1e-3


# Two printed formulas that are wrong, beside the right ones


@on_every_backend
def test_self_term_constant_is_four_pi(backend: str) -> None:
    """Kampa, Hasanbelliu, Principe, IJCNN 2011, eq. (3) prints (2π)^{D/2} |Σ|^{1/2} for ∫ N(x; μ, Σ)² dx.

    The right constant is (4π)^{D/2} |Σ|^{1/2}; with the printed one a mixture diverges from itself, by the 0.584 that
    the TrackerComponentLibrary's example gives, since the cross terms of the components are right.
    """
    p, _, _ = vector("nrl_2d")
    pairs = csdiv.pairwise_log_overlap(p, p) + p.log_weights[:, None] + p.log_weights
    covariances = p.covariance_matrix
    printed = -0.5 * (2.0 * math.log(2.0 * math.pi) + covariances.logdet()) + 2.0 * p.log_weights
    right = -0.5 * (2.0 * math.log(4.0 * math.pi) + covariances.logdet()) + 2.0 * p.log_weights
    off = pairs.clone().fill_diagonal_(-math.inf)
    as_printed = torch.cat([printed, off.flatten()]).logsumexp(0)
    as_right = torch.cat([right, off.flatten()]).logsumexp(0)
    close(as_right, csdiv.log_overlap(p))
    cross = csdiv.log_overlap(p, p)  # has both orders of each pair, and no special case
    close(as_printed - cross, 0.5840895705369329)  # D(p, p) as printed
    close(csdiv.cs_divergence(p, p), 0.0)
    one = GaussianMixture(torch.zeros(1, 3, dtype=torch.float64), torch.full((1, 3), 2.0, dtype=torch.float64))
    close(csdiv.log_overlap(one, backend=backend), -1.5 * math.log(4.0 * math.pi * 2.0))


@on_every_backend
def test_prior_self_term_takes_both_variances(backend: str) -> None:
    """Re-implementations of CSRAE use N(μ_k; μ_k', 2σ_k'²) where σ_k² + σ_k'² is right: their D(q, q) < 0."""
    means = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    variances = torch.tensor([[0.01], [4.0]], dtype=torch.float64)
    q = GaussianMixture(means, variances)
    doubled = -0.5 * ((means - means.mT) ** 2 / (2.0 * variances.mT) + (4.0 * math.pi * variances.mT).log())
    wrong = (doubled - 2.0 * math.log(2.0)).logsumexp((0, 1))
    right = csdiv.log_overlap(q, backend=backend)
    close(right, (csdiv.pairwise_log_overlap(q, q, backend=backend) - 2.0 * math.log(2.0)).logsumexp((0, 1)))
    cross = csdiv.log_overlap(q, q, backend=backend)
    assert (0.5 * (wrong + right) - cross).item() < -0.01  # the prior's term wrong, "D_CS(q, q)" negative
    close(csdiv.cs_divergence(q, q, backend=backend), 0.0)

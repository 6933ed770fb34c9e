"""Full covariances: limits, bits, batches, memory, derivatives."""

import math
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from full_pairs import FULL, NATIVE, call, random_pair
from torch import Tensor
from torch.distributions import MultivariateNormal

import csdiv
import csdiv._C as _C
from csdiv import GaussianMixture, testing


def test_full_above_the_limit_takes_the_reference_or_is_refused() -> None:
    p, q = random_pair(3, 4, 33)
    assert torch.equal(csdiv.cs_divergence(p, q), csdiv.cs_divergence(p, q, backend="reference"))
    for backend in NATIVE:
        with pytest.raises(NotImplementedError, match=r"full covariances up to D = 32, got D = 33"):
            csdiv.cs_divergence(p, q, backend=backend)


@pytest.mark.parametrize("name", _C.cpu_isas())
@pytest.mark.parametrize("dim", [3, 11])
def test_full_on_every_instruction_set(name: str, dim: int, isa: Callable[[str], None]) -> None:
    p, q = random_pair(9, 21, dim)
    expected = csdiv.pairwise_log_overlap(p, q, backend="reference")
    isa(name)
    leaves = [t.requires_grad_() for t in (p.scale_tril, q.means)]
    found = csdiv.pairwise_log_overlap(p, q, backend="cpu")
    grads = torch.autograd.grad(found.cos().sum(), leaves)
    torch.testing.assert_close(found, expected)
    reference = csdiv.pairwise_log_overlap(p, q, backend="reference").cos().sum()
    torch.testing.assert_close(grads, torch.autograd.grad(reference, leaves))


@pytest.fixture
def threads() -> Iterator[None]:
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(("n", "m"), [(1003, 1000), (40, 3000), (3000, 40)])
@pytest.mark.parametrize(
    ("entry", "structures"),
    [
        ("cs_divergence", ("full", "full")),
        ("component_log_overlap", ("full", "full")),
        ("pairwise_log_overlap", ("full", "full")),
        ("component_log_overlap", ("tied full", "full")),
        ("component_log_overlap", ("tied full", "tied full")),
    ],
)
def test_full_results_are_the_same_bits_for_any_number_of_threads(
    entry: str, structures: tuple[str, str], n: int, m: int
) -> None:
    if entry != "component_log_overlap":
        n, m = n // 4, m // 4
    g = torch.Generator().manual_seed(n)
    p, q = (
        testing.random_mixture(k, 3, structure=s, dtype=torch.float64, generator=g)
        for k, s in zip((n, m), structures, strict=True)
    )
    leaves = [t.requires_grad_() for t in (p.means, p.scale_tril, q.means, q.scale_tril)]
    runs = []
    for count in (1, 2, 1, 2):
        torch.set_num_threads(count)
        value = call(entry, "cpu")(p, q)
        runs.append([value, *torch.autograd.grad(value.sum(), leaves)])
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dim", [1, 16])
def test_full_divergence_of_a_mixture_from_itself_is_zero(dim: int, dtype: torch.dtype, backend: str) -> None:
    p, _ = random_pair(40, 1, dim, dtype)
    leaves = [t.requires_grad_() for t in p._tensors()]
    value = csdiv.cs_divergence(p, p.map(torch.clone), backend=backend)
    assert value.abs() <= 1e-14
    for g in torch.autograd.grad(value, leaves):
        assert g.abs().max() <= 1e-6 if dtype == torch.float32 else g.abs().max() <= 1e-13


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("points", [True, False])
def test_full_assign_takes_the_largest(points: bool, backend: str) -> None:
    x, q = random_pair(40, 70, 4)
    logits = csdiv.pairwise_log_overlap(csdiv.functional.points(x.means) if points else x, q, backend="reference")
    expected = (logits + q.log_weights).argmax(-1)
    assert torch.equal(q.assign(x.means if points else x, backend=backend), expected)


@pytest.mark.parametrize("backend", NATIVE)
def test_full_log_prob_is_that_of_torch(backend: str) -> None:
    p, _ = random_pair(7, 1, 5)
    x = torch.randn(30, 5, dtype=torch.float64)
    components = MultivariateNormal(p.means, scale_tril=p.scale_tril).log_prob(x.unsqueeze(-2))
    torch.testing.assert_close(p.log_prob(x, backend=backend), (components + p.log_weights).logsumexp(-1))


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("dim", [3, 9])
def test_full_pair_that_is_not_positive_definite_is_nan(dim: int, backend: str) -> None:
    """Only that pair; and a component of weight zero spoils nothing."""
    p, q = random_pair(5, 19, dim)
    covariance = q.scale_tril @ q.scale_tril.mT
    covariance[4] = -100.0 * torch.eye(dim)
    covariance[9, 1, 0] = math.nan
    bad = GaussianMixture._unchecked(means=q.means, covariance_matrix=covariance, log_weights=q.log_weights)
    pairs = csdiv.pairwise_log_overlap(p, bad, backend=backend)
    spoilt = torch.zeros(19, dtype=torch.bool)
    spoilt[[4, 9]] = True
    assert bool(pairs[:, spoilt].isnan().all())
    assert torch.equal(pairs[:, ~spoilt], csdiv.pairwise_log_overlap(p, q, backend=backend)[:, ~spoilt])
    assert bool(csdiv.component_log_overlap(p, bad, backend=backend).isnan().all())
    assert bool(csdiv.log_overlap(bad, p, backend=backend).isnan())

    without = bad.log_weights.masked_fill(spoilt, -math.inf)
    absent = GaussianMixture._unchecked(means=q.means, covariance_matrix=covariance, log_weights=without)
    leaves = [t.requires_grad_() for t in (absent.covariance_matrix, absent.means)]
    value = csdiv.component_log_overlap(p, absent, backend=backend).sum()
    grads = torch.autograd.grad(value + csdiv.log_overlap(absent, p, backend=backend), leaves)
    assert value.isfinite()
    for g in grads:
        assert bool(g.isfinite().all())
        assert not g[spoilt].any()


@pytest.mark.parametrize("structure", ["full", "tied full"])
def test_full_against_points_and_weightless_components_spoil_nothing(structure: str) -> None:
    """In q and in p, in values and in gradients."""
    p, q = (testing.random_mixture(k, 3, structure=s, dtype=torch.float64) for k, s in ((5, "points"), (19, structure)))
    for mixture, other, backend in ((q, p, "cpu"), (p, q, "cpu")):
        bad = mixture.map(torch.clone)
        bad.log_weights[2] = -math.inf
        good = bad.map(torch.clone)
        bad.means[2] = math.nan
        leaves = [
            t.requires_grad_() for t in (other.means, bad.means, q.scale_tril if mixture is p else bad.scale_tril)
        ]
        value = csdiv.log_overlap(bad, other, backend=backend)
        torch.testing.assert_close(value, csdiv.log_overlap(good, other, backend="reference"))
        assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(value, leaves))
    rows = csdiv.component_log_overlap(bad, q, backend="cpu")
    assert rows.isnan().nonzero().tolist() == [[2]]


@pytest.mark.parametrize("structure", ["full", "tied full"])
def test_full_batch_of_single_components_does_not_copy_what_it_shares(structure: str) -> None:
    """The sums of (200, 1, 4, 4) and (300, 4, 4) covariances, or the means whitened by each, would take 4 to 7 MiB."""
    p = testing.random_mixture(1, 4, structure="full", batch_shape=(200,), dtype=torch.float64)
    q = testing.random_mixture(300, 4, structure=structure, dtype=torch.float64)
    wide_p, wide_q = (csdiv.pairs.matrices(side) for side in (p, q))
    tensors = (wide_p.means, wide_p.covariances, wide_q.means, wide_q.covariances, wide_q.log_weights)
    call = csdiv.backends.cpu._call("full_overlap_lse", tensors, [False] * 5)  # type: ignore[attr-defined]
    assert call.problem.q.variances.shape == (300, 4, 4)
    assert csdiv.pairs.route(p, q, "auto").formula == csdiv.pairs.FULL
    found = csdiv.component_log_overlap(p, q, backend="cpu")
    torch.testing.assert_close(found, csdiv.component_log_overlap(p, q, backend="reference"))


def test_full_covariances_of_a_batch_that_the_means_do_not_have() -> None:
    """Also above D = 32, where "auto" is the reference."""
    for dim in (2, 33):
        one, x = testing.random_mixture(3, dim, structure="full", dtype=torch.float64), torch.zeros(1, dim)
        factors = torch.stack([scale * one.scale_tril for scale in (1.0, 2.0)])
        means, weights = one.means.expand(4, 1, 3, dim).clone(), one.log_weights
        p = GaussianMixture(means, scale_tril=factors, log_weights=weights)
        for backend in ("auto", "reference"):
            found = p.log_prob(x, backend=backend)
            assert found.shape == (4, 2, 1)
            for k in range(2):
                item = GaussianMixture(one.means, scale_tril=factors[k], log_weights=weights)
                torch.testing.assert_close(found[:, k], item.log_prob(x, backend=backend).expand(4, 1))


def test_full_tied_far_from_the_origin() -> None:
    """Whitened coordinates are taken from a centre, so that what all means share is not rounded."""
    p, q = (testing.random_mixture(9, 4, structure="tied full", dtype=torch.float64) for _ in range(2))
    far_p, far_q = (GaussianMixture._unchecked(**_moved(side, 2.0**20)) for side in (p, q))
    near_p, near_q = (GaussianMixture._unchecked(**_moved(side, -(2.0**20))) for side in (far_p, far_q))
    found = csdiv.cs_divergence(far_p, far_q, backend="cpu")
    torch.testing.assert_close(found, csdiv.cs_divergence(near_p, near_q, backend="cpu"), rtol=1e-13, atol=1e-14)


def _moved(p: GaussianMixture, distance: float) -> dict[str, Tensor | None]:
    return {"means": p.means + distance, "scale_tril": p.scale_tril, "log_weights": p.log_weights}


@pytest.mark.parametrize("structure", FULL)
def test_negative_variance_against_a_full_covariance_is_nan(structure: str) -> None:
    p, q = (testing.random_mixture(k, 3, structure=structure) for k in (4, 5))
    for variances in (torch.tensor([[1.0, -1e-3, 1.0]]), torch.full((4, 1), -1e-3)):
        negative = GaussianMixture(p.means, variances)
        for value in (csdiv.cs_divergence(negative, q), csdiv.log_overlap(q, negative)):
            assert bool(value.isnan())


@pytest.mark.parametrize("structure", FULL)
def test_infinite_weight_of_a_full_covariance_is_nan(structure: str) -> None:
    p, q = (testing.random_mixture(k, 3, structure=structure) for k in (4, 5))
    q.log_weights[1] = math.inf
    for value in (csdiv.log_overlap(p, q), csdiv.log_overlap(q, p), csdiv.log_overlap(q), q.log_prob(p.means)):
        assert bool(value.isnan().all())


def test_full_without_any_weight_is_minus_infinity_with_zero_gradients() -> None:
    p, q = random_pair(4, 5, 3)
    nothing = GaussianMixture(q.means, scale_tril=q.scale_tril, log_weights=torch.full((5,), -math.inf))
    leaves = [t.requires_grad_() for t in (p.means, p.scale_tril, q.means, q.scale_tril)]
    value = csdiv.log_overlap(p, nothing)
    assert value == -math.inf
    assert not any(g.any() for g in torch.autograd.grad(value, leaves))


LARGE = """
import resource, torch, csdiv
from csdiv import testing
def measure(n):
    p, q = (testing.random_mixture(n, 8, structure="full").map(lambda t: t.requires_grad_()) for _ in range(2))
    csdiv.component_log_overlap(p, q, backend="cpu").sum().backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = measure(10)
print(measure(3000) - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss in KiB is Linux's")
def test_full_covariances_take_memory_for_components_alone() -> None:
    """16 times the inputs in float64 at most; one matrix of pairs would be 69 MiB, their covariances 4.3 GiB."""
    done = subprocess.run([sys.executable, "-c", LARGE], capture_output=True, text=True, check=True, timeout=120)
    assert int(done.stdout) <= 16 * 2 * 3000 * (8 * 8 + 8 + 1) * 8 / 1024


def entry_of_tensors(backend: str = "auto") -> Callable[..., Tensor]:
    def divergence(pm: Tensor, pr: Tensor, qm: Tensor, qr: Tensor, qw: Tensor) -> Tensor:
        p = GaussianMixture(pm, scale_tril=pr.tril())
        return csdiv.cs_divergence(p, GaussianMixture(qm, scale_tril=qr.tril(), log_weights=qw), backend=backend)

    return divergence


def leaves_of_pair(*batch: int) -> list[Tensor]:
    p, q = (side.map(lambda t: t.expand(*batch, *t.shape).clone()) for side in random_pair(2, 3, 2))
    return [t.requires_grad_() for t in (p.means, p.scale_tril, q.means, q.scale_tril, q.log_weights)]


def test_full_pairs_pass_gradcheck() -> None:
    p, q = random_pair(2, 3, 2)
    leaves = [t.requires_grad_() for t in (p.means, p.scale_tril, q.means, q.scale_tril)]

    def pairs(pm: Tensor, pr: Tensor, qm: Tensor, qr: Tensor) -> Tensor:
        sides = GaussianMixture(pm, scale_tril=pr.tril()), GaussianMixture(qm, covariance_matrix=qr @ qr.mT)
        return csdiv.pairwise_log_overlap(*sides, backend="cpu")

    assert torch.autograd.gradcheck(pairs, leaves)


@pytest.mark.parametrize("dynamic", [False, True])
def test_full_compiles_without_a_graph_break(dynamic: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(entry_of_tensors(), fullgraph=True, backend="aot_eager", dynamic=dynamic)
    leaves = leaves_of_pair()
    value, expected = compiled(*leaves), entry_of_tensors("reference")(*leaves)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(torch.autograd.grad(value, leaves), torch.autograd.grad(expected, leaves))


def test_full_under_vmap_and_jvp() -> None:
    batched, one = leaves_of_pair(4), leaves_of_pair()
    with torch.no_grad():
        batched[0] += torch.randn(4, 2, 2, dtype=torch.float64)
    arguments = (batched[0].detach(), *(t.detach() for t in one[1:]))
    in_dims = (0, None, None, None, None)
    function = entry_of_tensors("cpu")
    expected = [function(row, *arguments[1:]) for row in arguments[0]]
    torch.testing.assert_close(torch.vmap(function, in_dims)(*arguments), torch.stack(expected))
    grads = torch.vmap(torch.func.grad(function, (0, 3)), in_dims)(*arguments)
    for k, row in enumerate(arguments[0]):
        expected = torch.func.grad(function, (0, 3))(row, *arguments[1:])
        torch.testing.assert_close(tuple(g[k] for g in grads), expected)
    single = (arguments[0][0], *arguments[1:])
    _, tangent = torch.func.jvp(entry_of_tensors(), single, tuple(map(torch.ones_like, single)))
    gradient = torch.func.grad(function, tuple(range(5)))(*single)
    torch.testing.assert_close(tangent, sum(g.sum() for g in gradient))
    with pytest.raises(NotImplementedError, match='backend "cpu" has no forward-mode'):
        torch.func.jvp(function, single, tuple(map(torch.ones_like, single)))

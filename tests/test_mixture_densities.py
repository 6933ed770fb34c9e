"""Densities, responsibilities and assignments against torch, SciPy and scikit-learn."""

import subprocess
import sys

import pytest
import torch
from entries import BACKENDS
from mixtures import as_distribution, close, covariances, fitted_by_sklearn, mixture, on_every_structure
from scipy import stats

from csdiv import GaussianMixture, testing

# Densities, responsibilities, assignment


@pytest.mark.parametrize("backend", BACKENDS)
@on_every_structure
def test_log_prob_is_that_of_torch_and_scipy(structure: str, backend: str) -> None:
    p = mixture(structure)
    backend = "auto" if structure.endswith("full") else backend
    x = 2.0 * torch.randn(50, 3, dtype=torch.float64)
    found = p.log_prob(x, backend=backend)
    close(found, as_distribution(p).log_prob(x))
    densities = [
        stats.multivariate_normal(m.numpy(), s.numpy()).pdf(x.numpy())
        for m, s in zip(p.means, covariances(p), strict=True)
    ]
    close(found.exp(), sum(w * torch.from_numpy(d) for w, d in zip(p.log_weights.exp(), densities, strict=True)))


LARGE = """
import resource, torch
from csdiv import testing
p, x = testing.random_mixture(20000, 16), torch.randn(20000, 16)
p.log_prob(x[:10])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
p.log_prob(x, backend="cpu")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss in KiB is Linux's")
def test_log_prob_takes_memory_for_points_and_components_alone() -> None:
    """16 times the inputs at most; one matrix of points by components would be 1526 MiB."""
    done = subprocess.run([sys.executable, "-c", LARGE], capture_output=True, text=True, check=True, timeout=120)
    assert int(done.stdout) <= 16 * 2 * 20000 * 16 * 4 / 1024


@pytest.mark.parametrize("backend", BACKENDS)
def test_log_prob_of_many_components_is_that_of_sklearn(backend: str) -> None:
    p = testing.random_mixture(2000, 16, dtype=torch.float64)
    x = torch.randn(3000 if backend == "cpu" else 100, 16, dtype=torch.float64)
    expected = torch.from_numpy(p.to_sklearn().score_samples(x.numpy()))
    close(p.log_prob(x, backend=backend), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["full", "tied", "diag", "spherical"])
def test_responsibilities_and_assignment_are_those_of_sklearn(kind: str, backend: str) -> None:
    fitted = fitted_by_sklearn(kind)
    p = GaussianMixture.from_sklearn(fitted)
    backend = "reference" if p.variances is None else backend
    x = 3.0 * torch.randn(100, 3, dtype=torch.float64)
    close(p.log_prob(x, backend=backend), torch.from_numpy(fitted.score_samples(x.numpy())))
    close(p.responsibilities(x, backend=backend), torch.from_numpy(fitted.predict_proba(x.numpy())))
    assert torch.equal(p.assign(x, backend=backend), torch.from_numpy(fitted.predict(x.numpy())))


@pytest.mark.parametrize("backend", BACKENDS)
def test_responsibilities_and_assignment_of_codes(backend: str) -> None:
    """A mixture in the place of points: each of its components, with its variance added."""
    p, codes = mixture(), mixture(k=9)
    wider = [GaussianMixture(p.means, p.variances + v, log_weights=p.log_weights) for v in codes.variances]
    expected = torch.cat(
        [w.responsibilities(m[None], backend=backend) for w, m in zip(wider, codes.means, strict=True)]
    )
    close(p.responsibilities(codes, backend=backend), expected)
    close(expected.sum(-1), torch.ones(9, dtype=torch.float64))
    assert torch.equal(p.assign(codes, backend=backend), expected.argmax(-1))

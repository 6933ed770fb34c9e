"""GaussianMixture: a value; its draws, and its covariances as matrices."""

import copy
import dataclasses
import inspect
import io
import math
import pickle
from typing import Any

import pytest
import torch
from mixtures import (
    close,
    covariances,
    mixture,
    on_every_structure,
    same,
)
from torch import Tensor
from torch.distributions import (
    MultivariateNormal,
)
from torch.nn.parallel.scatter_gather import gather
from torch.utils import _pytree as pytree

import csdiv
from csdiv import GaussianMixture

# A value


@on_every_structure
def test_structure_is_the_shape(structure: str) -> None:
    p = mixture(structure, batch_shape=(2,))
    assert (p.structure, p.num_components, p.dim, p.batch_shape) == (structure, 4, 3, (2,))
    assert structure in repr(p)
    assert "num_components=4, dim=3" in repr(p)
    assert "batch_shape=(2,)" in repr(p)


def test_structure_of_one_component_or_dimension_is_plain() -> None:
    assert GaussianMixture(torch.zeros(1, 3), torch.ones(1, 3)).structure == "diagonal"
    assert GaussianMixture(torch.zeros(3, 1), torch.ones(3, 1)).structure == "diagonal"
    assert GaussianMixture(torch.zeros(1, 3), scale_tril=torch.eye(3)[None]).structure == "full"


def test_immutable() -> None:
    p = mixture()
    with pytest.raises(AttributeError, match="cannot assign to field 'means'"):
        p.means = torch.zeros(4, 3)
    with pytest.raises(AttributeError, match="cannot delete field 'means'"):
        del p.means
    with pytest.raises(AttributeError, match="cannot assign to field 'label'"):
        p.label = "a"


def test_tensors_stay_the_callers_own() -> None:
    means, variances, log_weights = torch.zeros(4, 3), torch.ones(1, 1), torch.zeros(4)
    p = GaussianMixture(means, variances, log_weights=log_weights)
    assert p.means is means
    assert p.variances is variances
    assert p.log_weights is log_weights


def saved_and_loaded(value: object) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@on_every_structure
def test_pytree_pickle_and_copies(structure: str) -> None:
    p = mixture(structure)
    leaves, spec = pytree.tree_flatten({"p": p})
    assert all(isinstance(t, Tensor) or t is None for t in leaves)
    paths = [pytree.keystr(path) for path, t in pytree.tree_flatten_with_path({"p": p})[0] if t is not None]
    assert paths[0] == "['p'].means"
    doubled = pytree.tree_unflatten([None if t is None else 2.0 * t for t in leaves], spec)["p"]
    assert torch.equal(doubled.means, 2.0 * p.means)
    copies = [copy.deepcopy(p), copy.copy(p), pytree.tree_map(lambda t: t, p), dataclasses.replace(p)]
    copies += [pickle.loads(pickle.dumps(p, protocol)) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    for q in (*copies, saved_and_loaded({"p": [p]})["p"][0]):
        assert isinstance(q, GaussianMixture)
        assert same(p, q)
        assert q.structure == structure
    assert copy.deepcopy(p).means.data_ptr() != p.means.data_ptr()


@pytest.mark.parametrize(
    "given",
    [
        {"covariance_matrix": torch.eye(3)[None]},
        {"variances": torch.ones(2, 4, 1)},
        {"factor": torch.randn(3, 3)[None], "weights": torch.arange(4.0)},
    ],
)
def test_saved_with_the_tensors_that_it_has(given: dict[str, Tensor]) -> None:
    """Without weights, in batches, on the meta device, and with gradients wanted."""
    p = GaussianMixture(torch.randn(2, 4, 3, requires_grad=True), **given)
    q = saved_and_loaded(p)
    assert same(p, q)
    assert q.means.requires_grad
    assert saved_and_loaded(p.detach().to("meta")).means.shape == (2, 4, 3)


def test_is_a_dataclass_of_what_its_constructor_takes() -> None:
    """torch.distributed walks through the fields of dataclasses, and makes new ones by name."""
    p = mixture()
    names = {field.name for field in dataclasses.fields(p)}
    assert names <= set(inspect.signature(GaussianMixture).parameters)
    assert names == set(GaussianMixture.__slots__) - {"__weakref__"}
    q = dataclasses.replace(p, means=2.0 * p.means)
    assert torch.equal(q.means, 2.0 * p.means)
    assert q.log_weights is p.log_weights
    assert len({p, q}) == 2  # by identity
    assert p != dataclasses.replace(p)
    with pytest.raises(ValueError, match="variances"):
        dataclasses.replace(p, variances=torch.ones(7))


def test_replaced_with_linear_weights() -> None:
    """Which come with their logarithms, as they are or in a dtype of fewer digits."""
    weights = torch.tensor([0.0, 0.5, 1e-30, 7.0], requires_grad=True)
    p = GaussianMixture(torch.zeros(4, 3), torch.ones(1, 1), weights=weights)
    assert same(p, dataclasses.replace(p))
    assert dataclasses.replace(p).weights is weights
    low = {field.name: t.bfloat16() for field in dataclasses.fields(p) if (t := getattr(p, field.name)) is not None}
    close(dataclasses.replace(p, **low).weights, weights, rtol=2.0**-8, atol=0.0)
    other = torch.ones(4)
    assert torch.equal(dataclasses.replace(p, weights=other, log_weights=None).log_weights, torch.zeros(4))
    for changed in ({"weights": other}, {"log_weights": other}, {"weights": torch.ones(3)}):
        with pytest.raises(ValueError, match=r"at most one of .* got weights and log_weights"):
            dataclasses.replace(p, **changed)


def test_data_parallel_refuses_to_gather_mixtures() -> None:
    """It takes tensors, dictionaries and sequences only."""
    with pytest.raises(TypeError, match="not iterable"):
        gather([mixture(), mixture()], "cpu")


def test_to_and_detach() -> None:
    p = mixture().map(lambda t: t.requires_grad_())
    low = p.to(torch.float32)
    assert {t.dtype for t in (low.means, low.variances, low.log_weights)} == {torch.float32}
    csdiv.log_overlap(low).backward()
    assert p.means.grad.dtype == torch.float64
    assert not p.detach().means.requires_grad
    assert p.detach().means.data_ptr() == p.means.data_ptr()
    assert p.to("meta").device.type == "meta"


def test_weights_as_given_normalised_and_uniform() -> None:
    means, one = torch.randn(4, 3, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64).log()
    given, logits = GaussianMixture(means, one, log_weights=weights), GaussianMixture(means, one, logits=weights)
    assert torch.equal(given.log_weights, weights)
    close(logits.log_weights.exp().sum(), torch.tensor(1.0, dtype=torch.float64))
    close(given.normalized().log_weights, logits.log_weights)
    close(csdiv.log_overlap(given) - csdiv.log_overlap(logits), torch.tensor(2.0 * math.log(10.0), dtype=torch.float64))
    uniform = GaussianMixture(means, one)
    assert uniform.normalized() is uniform
    same_weights = GaussianMixture(means, one, log_weights=torch.full((4,), -math.log(4.0), dtype=torch.float64))
    close(csdiv.log_overlap(uniform), csdiv.log_overlap(same_weights))


# Full covariances


@on_every_structure
def test_every_structure_equals_its_full_matrix(structure: str) -> None:
    """Values and gradients of a structure are those of the matrices that it stands for."""
    p, q = mixture(structure).map(lambda t: t.requires_grad_()), mixture(k=5)
    full = GaussianMixture(p.means, covariance_matrix=covariances(p), log_weights=p.log_weights)
    inputs = [t for t in (p.means, p.variances, p.scale_tril, p.log_weights) if t is not None]
    for function in (csdiv.cs_divergence, csdiv.log_overlap, csdiv.component_log_overlap, csdiv.pairwise_log_overlap):
        values = [function(side, q) for side in (p, full)]
        close(*values)
        close(*(torch.autograd.grad(v.sum(), inputs, materialize_grads=True, retain_graph=True) for v in values))


def test_full_covariances_pass_gradcheck() -> None:
    p, q = mixture("full", 2, 2), mixture("tied full", 3, 2)
    inputs = [t.requires_grad_() for t in (p.means, p.scale_tril, p.log_weights, q.means, q.scale_tril)]

    def divergence(pm: Tensor, pr: Tensor, pw: Tensor, qm: Tensor, qr: Tensor) -> Tensor:
        return csdiv.cs_divergence(
            GaussianMixture(pm, scale_tril=pr.tril(), log_weights=pw), GaussianMixture(qm, scale_tril=qr.tril())
        )

    assert torch.autograd.gradcheck(divergence, inputs)
    assert torch.autograd.gradgradcheck(divergence, inputs)


def test_full_overlap_of_two_gaussians_is_a_density() -> None:
    p, q = mixture("full"), mixture("full")
    pairs = csdiv.pairwise_log_overlap(p, q)
    s, t = covariances(p), covariances(q)
    expected = MultivariateNormal(q.means, s[:, None] + t).log_prob(p.means[:, None])
    close(pairs, expected)

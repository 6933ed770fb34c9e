"""Eager calls that go past torch's dispatcher: the same bits, and whoever has to see an operator does."""

import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from entries import ENTRIES, function, summed, tensors
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import csdiv
from csdiv import GaussianMixture, testing, transforms

pytest.importorskip("csdiv._C")
import csdiv._C as _C


class Names(TorchDispatchMode):
    """The names of the operators that run below it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def value_and_gradients(entry: str, inputs: Sequence[Tensor]) -> list[Tensor]:
    value = function(entry)(*inputs)
    return [value.detach(), *torch.autograd.grad((value * value.detach().cos()).sum(), inputs)]


def assert_same_bits(found: list[Tensor], expected: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("entry", ENTRIES)
def test_modes_see_the_operators_and_change_no_bit(entry: str, dtype: torch.dtype) -> None:
    inputs = tensors(entry, dtype)
    plain = value_and_gradients(entry, inputs)
    with Names() as mode:
        seen = value_and_gradients(entry, inputs)
    assert any(name.startswith("csdiv.") for name in mode.names) or entry == "channel_log_overlap"
    assert_same_bits(seen, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("entry", ENTRIES)
def test_arguments_made_in_cpp_change_no_bit(entry: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = tensors(entry, dtype)
    made: list[bool] = []
    plain_call = _C.plain_call

    def counted(*arguments: Any) -> Any:
        found = plain_call(*arguments)
        made.append(found is not None)
        return found

    monkeypatch.setattr(_C, "plain_call", counted)
    plain = value_and_gradients(entry, inputs)
    assert any(made) or "channel" in entry
    monkeypatch.setattr(_C, "plain_call", lambda *_: None)
    assert_same_bits(value_and_gradients(entry, inputs), plain)


def test_a_profiler_sees_the_operators() -> None:
    inputs = tensors("cs_regularizer")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        summed("cs_regularizer")(*inputs).backward()
    names = {event.key for event in profile.key_averages()}
    assert {"csdiv::regularizer_forward", "csdiv::regularizer_backward"} <= names


class Seen(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


def test_who_watches() -> None:
    t = torch.ones(2)
    assert not transforms.watched([t, None, torch.nn.Parameter(t)])
    assert transforms.watched([torch.complex(t, t).conj().imag])  # its sign is not in its memory
    assert transforms.watched([torch._efficientzerotensor(2)])
    assert transforms.watched([t.as_subclass(type("Own", (Tensor,), {}))])
    assert transforms.watched([torch._to_functional_tensor(t)])
    for mode in (Names(), Seen(), torch.device("cpu")):
        with mode:
            assert transforms.watched([t])
    assert torch.vmap(lambda x: x * float(transforms.watched([x])))(t).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("entry", ["cs_divergence", "cs_regularizer", "component_log_overlap"])
def test_negative_views_are_read_with_their_sign(entry: str) -> None:
    inputs = tensors(entry, requires_grad=False)
    means = torch.complex(torch.zeros_like(inputs[0]), -inputs[0]).conj().imag
    assert means.is_neg()
    leaf = means.requires_grad_()
    value = function(entry)(leaf, *inputs[1:])
    assert torch.equal(value, function(entry)(*inputs))
    (grad,) = torch.autograd.grad(value.sum(), leaf)
    expected = inputs[0].clone().requires_grad_()
    assert torch.equal(grad, *torch.autograd.grad(function(entry)(expected, *inputs[1:]).sum(), expected))


UPSTREAM: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": torch.sum,
    "mean": torch.mean,
    "half": lambda y: 0.5 * y.sum(),
    "zero": lambda y: 0.0 * y.sum(),
    "weighted": lambda y: (y * torch.arange(y.numel(), dtype=y.dtype).cos().view(y.shape)).sum(),
    "one row": lambda y: y.flatten()[:1].sum(),
}


@pytest.mark.parametrize("upstream", UPSTREAM)
@pytest.mark.parametrize("entry", ["cs_divergence", "log_overlap", "cs_regularizer", "component_log_overlap"])
def test_upstream_gradients_multiply_those_that_came_with_the_values(entry: str, upstream: str) -> None:
    inputs = tensors(entry)
    found = torch.autograd.grad(UPSTREAM[upstream](function(entry)(*inputs)), inputs)
    expected = torch.autograd.grad(UPSTREAM[upstream](function(entry, "reference")(*inputs)), inputs)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("entry", ["cs_divergence", "cs_regularizer"])
def test_a_kept_graph_gives_the_same_gradients_again(entry: str) -> None:
    inputs = tensors(entry)
    total = function(entry)(*inputs).mean()
    first = torch.autograd.grad(total, inputs, retain_graph=True)
    expected = [g.clone() for g in first]
    for g in first:
        g.zero_()
    assert_same_bits(list(torch.autograd.grad(total, inputs)), expected)


def test_nothing_is_recorded_where_nothing_requires_a_gradient() -> None:
    inputs = tensors("cs_regularizer", requires_grad=False)
    assert function("cs_regularizer")(*inputs).grad_fn is None
    with torch.no_grad():
        assert function("cs_regularizer")(*(t.requires_grad_() for t in inputs)).grad_fn is None
    with torch.inference_mode():
        assert function("cs_regularizer")(*inputs).is_inference()


# The operator of components


def codes(n: int = 5, dim: int = 3, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    return torch.randn(n, dim, generator=generator, dtype=dtype), torch.randn(n, dim, generator=generator, dtype=dtype)


@pytest.mark.parametrize("log_variance", [200.0, -200.0, float("nan")])
def test_a_code_does_not_move_the_scale_of_others(log_variance: float) -> None:
    means, logs = codes()
    prior = testing.random_mixture(4, 3)
    wide = csdiv.cs_regularizer(means.double(), logs.double(), prior.to(torch.float64))
    logs[-1] = log_variance
    found = csdiv.cs_regularizer(means, logs, prior)
    torch.testing.assert_close(found[:-1].double(), wide[:-1], rtol=2e-7, atol=2e-7)


@pytest.mark.parametrize("edge", [-20.0, 60.0])
def test_both_sides_of_the_edge_to_float64_agree(edge: float) -> None:
    """Codes within float32's range for gradients, and just out of it."""
    means, logs = codes()
    prior = testing.random_mixture(4, 3)
    for inside, outside in ((edge, edge * (1.0 + 1e-6)),):
        found = []
        for value in (inside, outside):
            leaf = logs.clone()
            leaf[0] = value
            leaf.requires_grad_()
            total = csdiv.cs_regularizer(means, leaf, prior)
            found.append((total.detach(), *torch.autograd.grad(total.sum(), leaf)))
        torch.testing.assert_close(found[0], found[1], rtol=2e-6, atol=2e-5)


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("structure", ["diagonal", "spherical", "tied diagonal", "tied spherical"])
def test_a_batch_of_single_gaussians_takes_the_operator(structure: str, dtype: torch.dtype, known: bool) -> None:
    p = testing.random_mixture(1, 3, batch_shape=(2, 3), structure=structure, dtype=dtype)
    assert p.variances is not None
    q = testing.random_mixture(4, 3, structure=structure, dtype=dtype)
    p_leaves = [p.means.clone().requires_grad_(), p.variances.clone().requires_grad_()]
    q_leaves = [t.clone().requires_grad_() for t in q._tensors()]
    own = csdiv.log_overlap(q).detach() if known else None

    def divergence(backend: str) -> Tensor:
        sides = GaussianMixture(*p_leaves), testing.mixture_of(*q_leaves)
        return csdiv.cs_divergence(*sides, q_self_overlap=own, backend=backend)

    with Names() as mode:
        found = divergence("auto")
    assert any("component_divergence" in name for name in mode.names)
    wide = GaussianMixture(p.means.double(), p.variances.double()), q.to(torch.float64)
    # Of one component each the definition, with the self term of p by the operator that all mixtures take.
    exact = -csdiv.log_overlap(*wide) + 0.5 * csdiv.log_overlap(wide[0]) + 0.5 * csdiv.log_overlap(wide[1])
    torch.testing.assert_close(found.double(), exact, rtol=3e-6, atol=3e-6)
    grads = torch.autograd.grad(found.mean(), [*p_leaves, *q_leaves])
    expected = torch.autograd.grad(divergence("reference").mean(), [*p_leaves, *q_leaves])
    for a, b in zip(grads, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_same_bits_for_any_number_of_threads() -> None:
    inputs = [t.requires_grad_() for t in (*codes(70, 33), *testing.random_mixture(50, 33)._tensors())]
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 7):
        torch.set_num_threads(threads)
        total = csdiv.cs_regularizer(*inputs[:2], testing.mixture_of(*inputs[2:]))
        found.append([total.detach(), *torch.autograd.grad(total.mean(), inputs)])
    torch.set_num_threads(before)
    assert_same_bits(found[1], found[0])
    assert_same_bits(found[2], found[0])


@pytest.mark.parametrize("shape", [(5, 4, 3), (40, 70, 33)])
@pytest.mark.parametrize("entry", ["cs_divergence", "cs_regularizer", "component_log_overlap", "self_overlap"])
def test_the_same_bits_wherever_tensors_lie_in_memory(entry: str, shape: tuple[int, int, int]) -> None:
    n, m, dim = shape
    p, q = (testing.random_mixture(k, dim, generator=torch.Generator().manual_seed(k)) for k in (n, m))
    count = ENTRIES[entry][0]
    given = {3: q._tensors(), 5: [*p._tensors()[:2], *q._tensors()], 6: [*p._tensors(), *q._tensors()]}[count]

    def moved(t: Tensor) -> Tensor:
        place = torch.empty(t.numel() + 3)[3:].view(t.shape)
        assert place.data_ptr() % 16 == 12
        return place.copy_(t)

    found = [value_and_gradients(entry, [f(t).requires_grad_() for t in given]) for f in (torch.clone, moved)]
    assert_same_bits(*found)
    assert_same_bits(value_and_gradients(entry, [t.clone().requires_grad_() for t in given]), found[0])


@pytest.mark.parametrize("entry", ["cs_divergence", "component_log_overlap"])
@pytest.mark.parametrize("n", [1, 6])
def test_problems_in_lanes_agree_with_those_in_tiles(n: int, entry: str) -> None:
    """A batch that fills a vector takes another kernel than one that lacks a problem."""
    lanes = 16
    generator = torch.Generator().manual_seed(n)
    p = testing.random_mixture(n, 2, batch_shape=(lanes,), generator=generator)
    q = testing.random_mixture(7, 2, batch_shape=(lanes,), generator=generator)
    given = [*p._tensors(), *q._tensors()]
    if entry == "component_log_overlap":
        del given[2]

    def first(count: int) -> list[Tensor]:
        leaves = [t[:count].clone().requires_grad_() for t in given]
        value = function(entry)(*leaves)
        return [t[: lanes - 1] for t in (value.detach(), *torch.autograd.grad(value.sum(), leaves))]

    for a, b in zip(first(lanes), first(lanes - 1), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)


# Hooks, and who holds a gradient


def padded(t: Tensor) -> Tensor:
    wide = t.new_zeros(*t.shape[:-1], t.shape[-1] + 1)
    wide[..., :-1] = t.detach()
    return wide[..., :-1]


def one_number(t: Tensor) -> Tensor:
    first = t.detach().flatten()[:1].clone()
    return first.expand(t.shape) if t.ndim > 0 and bool((t == first).all()) else t.detach()


HOOKS: dict[str, Callable[[Tensor], Tensor]] = {
    "padded": lambda t: padded(t) if t.ndim == 2 else t,
    "bfloat16": lambda t: t.bfloat16() if t.is_floating_point() else t,
    "constants expanded": one_number,
    "clones": lambda t: t.detach().clone(),
}


@pytest.mark.parametrize("name", HOOKS)
@pytest.mark.parametrize("entry", ["cs_divergence", "cs_regularizer", "component_log_overlap", "self_overlap"])
def test_hooks_may_give_saved_gradients_in_another_form(entry: str, name: str) -> None:
    inputs = tensors(entry, torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, HOOKS[name]):
        total = 2.0 * function(entry)(*inputs).sum()
    found = torch.autograd.grad(total, inputs)
    expected = torch.autograd.grad(2.0 * function(entry)(*inputs).sum(), inputs)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.to(b.dtype), b, rtol=2e-2 if name == "bfloat16" else 0.0, atol=1e-2)


@pytest.mark.parametrize("n", [5, 70_000])
def test_gradients_that_a_hook_keeps_are_not_changed(n: int) -> None:
    kept: list[Tensor] = []
    means, logs = (t.requires_grad_() for t in codes(n, 8))
    prior = testing.random_mixture(2, 8)

    def keep(t: Tensor) -> Tensor:
        kept.append(t.detach())
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        total = 0.5 * csdiv.cs_regularizer(means, logs, prior).sum()
    before = [t.clone() for t in kept]
    total.backward()
    assert_same_bits(kept, before)


def test_large_gradients_are_ordinary_tensors() -> None:
    means, logs = (t.requires_grad_() for t in codes(70_000, 8))
    total = csdiv.cs_regularizer(means, logs, testing.random_mixture(2, 8)).mean()
    for grad in torch.autograd.grad(total, [means, logs]):
        assert not grad._is_view()
        grad.mul_(2.0)
        grad.detach_().resize_(3, 2)
        grad.untyped_storage().resize_(0)


@pytest.mark.parametrize("shape", [(4,), (3, 1), ()])
def test_known_overlaps_of_a_batch_broadcast_beside_single_gaussians(shape: tuple[int, ...]) -> None:
    p, q = testing.random_mixture(1, 3, batch_shape=(4,)), testing.random_mixture(5, 3)
    p = GaussianMixture(p.means, p.variances)
    own = csdiv.log_overlap(q).expand(shape)
    found = csdiv.cs_divergence(p, q, q_self_overlap=own)
    torch.testing.assert_close(found, csdiv.cs_divergence(p, q).expand(found.shape))
    assert found.shape == torch.broadcast_shapes(shape, (4,))


def test_rows_without_an_upstream_gradient_have_none_whatever_they_are() -> None:
    means, logs = torch.zeros(3, 2, requires_grad=True), torch.zeros(3, 2)
    logs[1, 0] = float("nan")
    logs.requires_grad_()
    csdiv.cs_regularizer(means, logs, testing.random_mixture(4, 2))[[0, 2]].sum().backward()
    assert means.grad is not None
    assert logs.grad is not None
    assert not logs.grad[1].any()
    assert not means.grad[1].any()
    assert logs.grad[[0, 2]].all()


@pytest.mark.parametrize("entry", ["cs_regularizer", "component_log_overlap", "pairwise_log_overlap"])
def test_contiguous_negatives_have_gradients(entry: str) -> None:
    inputs = tensors(entry, requires_grad=False)
    weights = torch.rand(function(entry)(*inputs).shape, dtype=torch.float64)
    leaf, plain = torch._neg_view(-inputs[0]).requires_grad_(), inputs[0].clone().requires_grad_()
    found, expected = (
        torch.autograd.grad((weights * function(entry)(t, *inputs[1:])).sum(), t)[0] for t in (leaf, plain)
    )
    assert torch.equal(found, expected)


FIRST_CALLS = """
import sys, threading
import torch, csdiv
sys.setswitchinterval(1e-6)
x = torch.randn(40, 40)
p = csdiv.GaussianMixture(x, torch.ones(40, 40))
found, gate = [], threading.Barrier(8)
def call():
    gate.wait()
    found.append(csdiv.cs_regularizer(x, x, p).sum().item())
threads = [threading.Thread(target=call) for _ in range(8)]
for t in threads: t.start()
for t in threads: t.join()
assert len(found) == 8 and len(set(found)) == 1
"""


def test_first_calls_of_several_threads_do_not_wait_for_each_other_for_ever() -> None:
    subprocess.run([sys.executable, "-c", FIRST_CALLS], check=True, timeout=120)


def test_wide_codes_beside_weights_of_zero_have_their_derivative() -> None:
    """Log variances beyond what float32 exponentiates: two components alike, one of weight zero, have one slope."""
    means, logs = torch.zeros(2, 2), torch.full((2, 2), 90.0)
    weights = torch.tensor([1.0, 0.0], requires_grad=True)
    prior = GaussianMixture(torch.zeros(2, 2), torch.ones(2, 2), weights=weights)
    own = csdiv.log_overlap(GaussianMixture(torch.zeros(1, 2), torch.ones(1, 2)))
    total = csdiv.cs_regularizer(means, logs, prior, prior_self_overlap=own).sum()
    (grad,) = torch.autograd.grad(total, weights)
    torch.testing.assert_close(grad, torch.tensor([-2.0, -2.0]), rtol=1e-5, atol=1e-5)

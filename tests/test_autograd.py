"""Derivatives: eager, nested, forward-mode, transformed; what a call saves, and only the gradients asked for."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from entries import BACKENDS, ENTRIES, Entry, every, function, summed, tensors
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import csdiv
from csdiv import testing

NATIVE = tuple(name for name in BACKENDS if name != "reference")
on_every_entry = pytest.mark.parametrize("entry", sorted(ENTRIES))
on_every_backend = pytest.mark.parametrize("backend", BACKENDS)
close = torch.testing.assert_close


# Numerical derivatives


@on_every_backend
@on_every_entry
def test_gradcheck(entry: str, backend: str) -> None:
    assert torch.autograd.gradcheck(function(entry, backend), tensors(entry))


@on_every_entry
def test_gradgradcheck(entry: str) -> None:
    assert torch.autograd.gradgradcheck(function(entry), tensors(entry))


def test_third_order() -> None:
    inputs = tensors("cs_divergence")
    thirds = []
    for backend in ("auto", "reference"):
        value = function("cs_divergence", backend)(*inputs)
        for _ in range(3):
            (first,) = torch.autograd.grad(value.sum(), inputs[:1], create_graph=True)
            value = first.pow(2)
        thirds.append(first)
    assert thirds[0].abs().max() > 1e-6
    close(*thirds)


def test_reference_by_chunks_of_rows_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = tensors("cs_divergence")
    whole = function("cs_divergence", "reference")(*inputs)
    monkeypatch.setattr(csdiv.reference, "CHUNK_ELEMENTS", 8)
    chunks = function("cs_divergence", "reference")(*inputs)
    close(chunks, whole)
    close(*(torch.autograd.grad(value, inputs) for value in (chunks, whole)))


# torch.func and forward mode, against the reference


@on_every_entry
@pytest.mark.parametrize("transform", [grad, hessian, jacfwd, lambda f, argnums: jacrev(jacrev(f, argnums), argnums)])
def test_func_derivatives(entry: str, transform: Callable[..., Entry]) -> None:
    inputs = tensors(entry, requires_grad=False)
    close(
        transform(summed(entry), argnums=every(entry))(*inputs),
        transform(summed(entry, "reference"), argnums=every(entry))(*inputs),
    )


@on_every_entry
def test_jvp_and_dual_numbers(entry: str) -> None:
    inputs = tensors(entry, requires_grad=False)
    tangents = tuple(torch.randn_like(t) for t in inputs)
    gradients = grad(summed(entry, "reference"), argnums=every(entry))(*inputs)
    expected = sum((g * t).sum() for g, t in zip(gradients, tangents, strict=True))
    close(jvp(summed(entry), inputs, tangents)[1], expected)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, v) for t, v in zip(inputs, tangents, strict=True)]
        close(forward_ad.unpack_dual(summed(entry)(*duals)).tangent, expected)


@on_every_backend
@on_every_entry
@pytest.mark.parametrize("mapped", ["first", "variances", "all"])
def test_vmap_is_a_loop(entry: str, mapped: str, backend: str) -> None:
    inputs = tensors(entry, requires_grad=False)
    which = {"first": (0,), "variances": (1,), "all": every(entry)}[mapped]
    stacked = [torch.stack([t, t + 0.25, t * 1.5], i % 2) if i in which else t for i, t in enumerate(inputs)]
    dims = tuple(i % 2 if i in which else None for i in every(entry))

    def item(i: int) -> list[Tensor]:
        return [t if d is None else t.select(d, i) for t, d in zip(stacked, dims, strict=True)]

    expected = [function(entry, "reference")(*item(i)) for i in range(3)]
    close(vmap(function(entry, backend), dims)(*stacked), torch.stack(expected))
    close(vmap(function(entry, backend), dims, out_dims=-1)(*stacked), torch.stack(expected, -1))
    for number in every(entry):
        first = vmap(grad(summed(entry, backend), argnums=number), dims)(*stacked)
        close(first, torch.stack([grad(summed(entry, "reference"), argnums=number)(*item(i)) for i in range(3)]))
        second = grad(lambda *t: vmap(summed(entry, backend), dims)(*t).sum(), argnums=number)(*stacked)
        loop = grad(
            lambda *t: sum(
                summed(entry, "reference")(*(x if d is None else x.select(d, i) for x, d in zip(t, dims, strict=True)))
                for i in range(3)
            ),
            argnums=number,
        )
        close(second, loop(*stacked))


@on_every_backend
def test_nested_vmap_over_batches(backend: str) -> None:
    inputs = tensors("cs_divergence", requires_grad=False)
    means = torch.randn(5, 4, *inputs[0].shape, dtype=torch.float64)
    f = function("cs_divergence", backend)
    mapped = vmap(vmap(lambda m: f(m, *inputs[1:])))(means)
    close(
        mapped,
        csdiv.cs_divergence(testing.mixture_of(means, *inputs[1:3]), testing.mixture_of(*inputs[3:]), backend=backend),
    )


@pytest.mark.parametrize("backend", NATIVE)
@on_every_entry
def test_vmap_stays_native(entry: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the reference ran")

    monkeypatch.setattr(csdiv.reference, "pairwise_log_overlap", refuse)
    monkeypatch.setitem(csdiv.reference.FORMULAS, "pairwise", refuse)
    inputs = tensors(entry, requires_grad=False)
    stacked = (torch.stack([inputs[0]] * 3), *inputs[1:])
    dims = (0, *(None,) * (len(inputs) - 1))
    assert vmap(function(entry, backend), dims)(*stacked).shape[0] == 3
    assert vmap(grad(summed(entry, backend)), dims)(*stacked).shape == stacked[0].shape
    with pytest.raises(AssertionError, match="the reference ran"):  # shows that the patch is seen where it is used
        hessian(summed(entry))(*inputs)


@pytest.mark.parametrize("backend", NATIVE)
@on_every_entry
def test_native_backend_by_name_refuses_what_it_has_not(entry: str, backend: str) -> None:
    inputs = tensors(entry)
    raw = tuple(t.detach() for t in inputs)
    with pytest.raises(NotImplementedError, match=f'backend "{backend}" has no forward-mode'):
        jvp(summed(entry, backend), raw, raw)
    with pytest.raises(NotImplementedError, match="nested derivatives"):
        hessian(summed(entry, backend))(*raw)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        function(entry, backend)(forward_ad.make_dual(raw[0], raw[0]), *raw[1:])
    (first,) = torch.autograd.grad(summed(entry, backend)(*inputs), inputs[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match=f'backend "{backend}" has no second derivatives'):
        first.sum().backward()


# Memory and context


@on_every_backend
@on_every_entry
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint(entry: str, reentrant: bool, backend: str) -> None:
    inputs = tensors(entry)
    value = checkpoint(summed(entry, backend), *inputs, use_reentrant=reentrant)
    value.backward()
    expected = torch.autograd.grad(summed(entry, "reference")(*(detached := tensors_like(inputs))), detached)
    close([t.grad for t in inputs], list(expected))


def tensors_like(inputs: tuple[Tensor, ...]) -> list[Tensor]:
    return [t.detach().clone().requires_grad_() for t in inputs]


@on_every_backend
@on_every_entry
def test_saved_tensors_on_the_cpu(entry: str, backend: str) -> None:
    inputs = tensors(entry)
    with torch.autograd.graph.save_on_cpu():
        value = summed(entry, backend)(*inputs)
    close(torch.autograd.grad(value, inputs), torch.autograd.grad(summed(entry, "reference")(*inputs), inputs))


@on_every_backend
@on_every_entry
def test_autocast_computes_in_float32(entry: str, backend: str) -> None:
    inputs = tensors(entry, torch.bfloat16)
    plain = function(entry, backend)(*inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = function(entry, backend)(*inputs)
        mixed = function(entry, backend)(*(t.float() for t in inputs))
    assert value.dtype == mixed.dtype == torch.float32
    assert torch.equal(value, plain)
    assert torch.equal(mixed, plain)
    for t, g in zip(inputs, torch.autograd.grad(value.sum(), inputs), strict=True):
        assert g.dtype == t.dtype


@on_every_backend
@on_every_entry
def test_nothing_is_saved_without_gradients(entry: str, backend: str) -> None:
    inputs = tensors(entry)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        with torch.no_grad():
            assert not function(entry, backend)(*inputs).requires_grad
        with torch.inference_mode():
            assert function(entry, backend)(*inputs).is_inference()
        assert not saved
        function(entry, backend)(*inputs)
    assert saved


@on_every_backend
@on_every_entry
def test_in_place_change_before_backward_is_an_error(entry: str, backend: str) -> None:
    """Or the gradients stay right: where the change is of no input that is kept, as in the reference.

    log_overlap adds p's weights outside of the operator, mmd2 widens the variances, and channels are new tensors.
    """
    inputs = tensors(entry)
    expected = torch.autograd.grad(summed(entry, "reference")(*inputs), inputs)
    raised: dict[int, str] = {}
    for changed in every(entry):
        copies = [t.clone() for t in inputs]
        value = summed(entry, backend)(*copies)
        copies[changed].mul_(1.5)
        try:
            grads = torch.autograd.grad(value, inputs)
        except RuntimeError as error:
            raised[changed] = str(error)
        else:
            close(grads, expected)
    assert all("modified by an inplace operation" in message for message in raised.values())
    copied = {"log_overlap": {2}, "channels of one mixture": {2}, "mmd2": {1, 4}}
    copied |= {name: {2, 5} for name in ("channel_log_overlap", "channels at once", "channel_cs_divergence")}
    own = set(every(entry)) - copied.get(entry, set())
    assert backend == "reference" or set(raised) >= own


# Upstream gradients, and gradients not asked for


@on_every_backend
@on_every_entry
def test_upstream_gradients_of_any_form(entry: str, backend: str) -> None:
    inputs = tensors(entry)
    value = function(entry, backend)(*inputs)
    base = torch.randn(*value.shape, 2, dtype=value.dtype)

    def gradients(upstream: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(value, inputs, upstream, retain_graph=True)

    exact = {"rtol": 0.0, "atol": 0.0, "equal_nan": True}
    close(gradients(base[..., 1]), gradients(base[..., 1].clone()), **exact)
    expanded = torch.tensor(0.5, dtype=value.dtype).expand(value.shape)
    close(gradients(expanded), gradients(expanded.contiguous()), **exact)
    assert all(not g.any() for g in gradients(torch.zeros_like(value)))
    assert all(g.isnan().all() for g in gradients(torch.full_like(value, torch.nan)))


class _Recorder(TorchDispatchMode):
    """Notes the ``needs`` of each operator of csdiv that gives gradients, and these."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, list[bool], list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        needs = next((a for a in args if isinstance(a, list) and a and isinstance(a[0], bool)), [])
        if func.namespace == "csdiv" and any(needs):
            self.calls.append((func.name(), needs, result if "backward" in func.name() else result[-1]))
        return result


@on_every_entry
def test_only_needed_gradients_are_computed(entry: str) -> None:
    for needed in every(entry):
        inputs = [t.detach().requires_grad_(i == needed) for i, t in enumerate(tensors(entry))]
        with _Recorder() as recorder:
            summed(entry)(*inputs).backward()
        assert [t.grad is not None for t in inputs] == [i == needed for i in every(entry)]
        for name, needs, result in recorder.calls:
            of_both_sides = entry == "channel_cs_divergence"  # pairs of p with itself
            assert 1 <= sum(needs) == len(result) <= 1 + of_both_sides, name
        assert sum("backward" in name for name, _, _ in recorder.calls) <= 2
        # Weights of few components are added outside of the operator.
        outside = entry in ("channel_log_overlap", "channel_cs_divergence") and needed in (2, 5)
        assert (not outside) <= len(recorder.calls) <= 3


def test_a_frozen_prior_costs_no_gradient() -> None:
    inputs = tensors("cs_regularizer")
    with _Recorder() as recorder:
        function("cs_regularizer")(*inputs[:2], *(t.detach() for t in inputs[2:])).sum().backward()
    assert [(name, needs) for name, needs, _ in recorder.calls] == [
        ("csdiv::regularizer_forward", [True, True, False, False, False, False])
    ]

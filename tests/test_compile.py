"""torch.compile, export and tracing: one opaque operator, no graph break, right values and gradients."""

import dataclasses

import pytest
import torch
from entries import ENTRIES, function, summed, tensors
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx

import csdiv
from csdiv import testing

on_every_entry = pytest.mark.parametrize("entry", sorted(ENTRIES))
close = torch.testing.assert_close


def check_compiled(entry: str, backend: str, dynamic: bool | None = None) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(summed(entry), fullgraph=True, backend=backend, dynamic=dynamic)
    for scale in (1.0, 2.0):
        inputs = tuple((t * scale).detach().requires_grad_() for t in tensors(entry))
        value = compiled(*inputs)
        expected = summed(entry, "reference")(*inputs)
        close(value, expected)
        close(torch.autograd.grad(value, inputs), torch.autograd.grad(expected, inputs))


@on_every_entry
def test_compile_fullgraph(entry: str) -> None:
    check_compiled(entry, "aot_eager")


def test_compile_inductor() -> None:
    check_compiled("cs_divergence", "inductor")


@on_every_entry
def test_compile_keeps_dynamic_shapes(entry: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(summed(entry), fullgraph=True, backend=counter, dynamic=True)
    for _, rows in enumerate((3, 7, 11)):
        inputs = [t.detach().repeat(rows, *(1,) * (t.ndim - 1)).requires_grad_() for t in tensors(entry)]
        value, expected = compiled(*inputs), summed(entry, "reference")(*inputs)
        close(value, expected)
        close(torch.autograd.grad(value, inputs), torch.autograd.grad(expected, inputs))
    assert counter.frame_count == 1


class _Call(torch.nn.Module):
    def __init__(self, entry: str) -> None:
        super().__init__()
        self.entry = entry

    def forward(self, *t: Tensor) -> Tensor:
        return function(self.entry)(*t)


def test_export_and_compile_take_and_give_mixtures() -> None:
    class Doubled(torch.nn.Module):
        def forward(self, p: csdiv.GaussianMixture) -> tuple[csdiv.GaussianMixture, Tensor]:
            return dataclasses.replace(p, means=2.0 * p.means), csdiv.cs_divergence(p, p.to(torch.float64))

    p = csdiv.GaussianMixture(torch.randn(5, 2), torch.ones(1, 2), log_weights=torch.zeros(5))
    torch._dynamo.reset()
    compiled = torch.compile(Doubled(), fullgraph=True, backend="aot_eager")
    for call in (torch.export.export(Doubled(), (p,)).module(), compiled):
        doubled, value = call(p)
        assert isinstance(doubled, csdiv.GaussianMixture)
        close(doubled.means, 2.0 * p.means)
        close(value, torch.zeros((), dtype=torch.float64))


@on_every_entry
def test_export(entry: str) -> None:
    inputs = tensors(entry, requires_grad=False)
    exported = torch.export.export(_Call(entry), inputs)
    close(exported.module()(*inputs), function(entry, "reference")(*inputs))


@on_every_entry
@pytest.mark.parametrize("mode", ["fake", "symbolic"])
def test_make_fx(entry: str, mode: str) -> None:
    inputs = tensors(entry, requires_grad=False)
    graph = make_fx(function(entry), tracing_mode=mode)(*inputs)
    assert any("csdiv" in str(node.target) for node in graph.graph.nodes)
    close(graph(*inputs), function(entry, "reference")(*inputs))


@on_every_entry
def test_meta_and_fake_tensors_give_shapes(entry: str) -> None:
    inputs = tensors(entry, torch.float32, requires_grad=False)
    expected = function(entry)(*inputs)
    found = function(entry)(*(t.to("meta") for t in inputs))
    assert found.is_meta
    with torch._subclasses.FakeTensorMode() as mode:
        fake = function(entry)(*(mode.from_tensor(t) for t in inputs))
    for t in (found, fake):
        assert (t.shape, t.dtype, t.stride()) == (expected.shape, expected.dtype, expected.stride())


def test_gradients_of_fake_tensors() -> None:
    """They have no values, so whether all rows have one upstream gradient is not asked."""
    with torch._subclasses.FakeTensorMode():
        leaves = [torch.ones(5, 3, requires_grad=True) for _ in range(4)]
        rows = csdiv.component_log_overlap(testing.mixture_of(*leaves[:2]), testing.mixture_of(*leaves[2:]))
        grads = torch.autograd.grad(rows.sum(), leaves)
    assert [g.shape for g in grads] == [t.shape for t in leaves]

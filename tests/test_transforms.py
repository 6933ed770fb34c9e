"""What csdiv asks of torch's private names, and what it does where a release of torch lacks them."""

import importlib.util
import sys
from types import ModuleType

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap

import csdiv
from csdiv import testing, transforms


def fresh() -> ModuleType:
    """csdiv.transforms as a process imports it now."""
    spec = importlib.util.spec_from_file_location("fresh_transforms", transforms.__file__)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def seen(module: ModuleType) -> list[tuple[bool, bool]]:
    """Whether a call looks transformed, and in need of the reference: plain, under vmap, grad, two grads, and jvp."""
    found = []

    def look(x: torch.Tensor) -> torch.Tensor:
        transformed = module.transforms_active() or module.forward_level() >= 0
        found.append((transformed, module.higher_derivatives()))
        return x.sum()

    x = torch.ones(3)
    look(x)
    vmap(look)(x)
    grad(look)(x)
    grad(lambda y: grad(look)(y).sum())(x)
    jvp(look, (x,), (x,))
    with forward_ad.dual_level():
        look(x)
    return found


def test_transforms_are_told_apart() -> None:
    expected = [(False, False), (True, False), (True, False), (True, True), (True, True), (True, True)]
    assert seen(transforms) == seen(fresh()) == expected


def test_without_the_list_of_transforms_all_take_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch._functorch.pyfunctorch", None)
    assert seen(transforms) == [(False, False), *[(True, True)] * 5]
    p, q = (testing.random_mixture(k, 2, dtype=torch.float64) for k in (3, 4))
    found = grad(lambda m: csdiv.cs_divergence(csdiv.GaussianMixture(m, p.variances, log_weights=p.log_weights), q))(
        p.means
    )
    p = p.map(lambda t: t.requires_grad_())
    (expected,) = torch.autograd.grad(csdiv.cs_divergence(p, q, backend="reference"), p.means)
    torch.testing.assert_close(found, expected)


def test_without_the_names_of_what_is_active_calls_look_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch._C, "_are_functorch_transforms_active")
    monkeypatch.delattr(forward_ad, "_current_level", raising=False)
    module = fresh()
    assert module.transforms_active() is False
    assert module.forward_level() == -1
    assert module.higher_derivatives() is False


def test_a_call_that_wrongly_looks_plain_is_refused_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transforms, "transforms_active", bool)
    p = testing.random_mixture(3, 2)
    with pytest.raises(RuntimeError, match="setup_context"):
        grad(lambda m: csdiv.log_overlap(csdiv.GaussianMixture(m, p.variances)))(p.means)


def test_autograd_without_the_guard_is_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_SetExcludeDispatchKeyGuard", "DispatchKey"):
        monkeypatch.delattr(torch._C, name)
    x = torch.ones(3, requires_grad=True)
    with torch.no_grad(), transforms.autograd_enabled():
        (found,) = torch.autograd.grad((x * x).sum(), x)
    assert torch.equal(found, 2 * torch.ones(3))


def test_values_may_decide_on_plain_tensors_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeTensorMode():
        fake = torch.ones(3)

    def answers() -> list[bool]:
        found = [transforms.has_values(t) for t in (torch.ones(3), torch.nn.Parameter(torch.ones(3)), fake)]
        found.append(transforms.has_values(torch.ones(3, device="meta")))
        vmap(lambda x: found.append(transforms.has_values(x)) or x)(torch.ones(3))
        return found

    assert answers() == [True, True, False, False, False]
    monkeypatch.setitem(sys.modules, "torch._subclasses.fake_tensor", None)
    assert answers() == [True, True, False, False, False]

"""What torch has under way around a call. torch says it in private names alone: this is the one place that has them.

Each has a fallback for a release that lacks the name, tested in tests/test_transforms.py. Without
``transforms_active`` and ``forward_level`` a call looks like a plain one, which torch itself refuses under a transform;
without the list of transforms every transformed call takes the reference formula, which has derivatives of any order;
without ``graph_is_kept`` gradients are copied that need not be.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch.autograd import forward_ad

transforms_active: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", bool)
"""Whether a ``torch.func`` transform is under way."""
forward_level: Callable[[], int] = functools.partial(getattr, forward_ad, "_current_level", -1)
"""The level of forward-mode differentiation, -1 outside of it."""

_keeps_graph: Callable[[], bool] = getattr(
    getattr(torch._C, "_autograd", None), "_get_current_graph_task_keep_graph", lambda: True
)


_hooks: Callable[[bool], object] = getattr(
    getattr(torch._C, "_autograd", None), "_top_saved_tensors_default_hooks", lambda _: True
)


def saved_tensors_are_hooked() -> bool:
    """Whether a hook gets the tensors that are saved from now on, and may keep them."""
    return torch.compiler.is_compiling() or _hooks(False) is not None


def graph_is_kept() -> bool:
    """Whether the backward pass under way may be followed by another through the same graph."""
    return torch.compiler.is_compiling() or _keeps_graph()


_watchers: tuple[Callable[[], object] | None, ...] = (
    getattr(torch._C, "_len_torch_dispatch_stack", None),
    getattr(torch._C, "_len_torch_function_stack", None),
    getattr(torch._C, "_get_tracing_state", None),
    getattr(torch.autograd, "_profiler_enabled", None),
)
_is_wrapped: Callable[[torch.Tensor], bool] | None = getattr(
    getattr(torch._C, "_functorch", None), "is_functorch_wrapped_tensor", None
)


def watched(tensors: Sequence[torch.Tensor | None]) -> bool:
    """Whether anything but autograd has to see an operator on these tensors: a mode of torch, a trace, a profiler, or
    what makes a tensor more than its memory. Other calls go to the backend at once, past torch's dispatcher."""
    if torch.compiler.is_compiling() or _is_wrapped is None or any(s is None or s() for s in _watchers):
        return True
    for t in tensors:
        if t is not None and (
            type(t) not in (torch.Tensor, torch.nn.Parameter)
            or t.is_neg()
            or t._is_zerotensor()
            or _is_wrapped(t)
            or torch._is_functional_tensor(t)
        ):
            return True
    return False


def higher_derivatives() -> bool:
    """Whether derivatives are under way that only the reference has: forward mode, or a grad within a grad."""
    if forward_level() >= 0:
        return True
    if not transforms_active():
        return False
    try:
        from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters as interpreters
    except ImportError:
        return True
    names = [str(i.key()).rsplit(".", 1)[-1] for i in interpreters()]
    return "Jvp" in names or names.count("Grad") > 1


@contextlib.contextmanager
def autograd_enabled() -> Iterator[None]:
    """Autograd inside an operator, also below a ``TorchDispatchMode``, which excludes it from dispatch."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        key, include = (getattr(torch._C, name, None) for name in ("DispatchKey", "_SetExcludeDispatchKeyGuard"))
        if key is not None and include is not None:
            stack.enter_context(include(key.AutogradFunctionality, False))
            stack.enter_context(include(key.ADInplaceOrView, False))
        yield


def full_like_device(like: torch.Tensor, shape: Sequence[int], value: float) -> torch.Tensor:
    """``value`` in the dtype and on the device of ``like``, without its batch: new_full would have that under vmap."""
    return torch.full(shape, value, dtype=like.dtype, device=like.device)


def has_values(t: torch.Tensor) -> bool:
    """Whether the values of ``t`` may decide anything: not while tracing, transforming or on the meta device."""
    if torch.compiler.is_compiling() or t.is_meta or transforms_active():
        return False
    try:
        from torch._subclasses.fake_tensor import FakeTensor
    except ImportError:
        return type(t) in (torch.Tensor, torch.nn.Parameter)
    return not isinstance(t, FakeTensor)

"""D_CS of components from a mixture: "regularizer" and "component_divergence" as operators, of codes and of points."""

import math
from collections.abc import Sequence

import interpreter
import pytest
import torch
from entries import BACKENDS
from torch import Tensor

from csdiv import backends, pairs, testing
from csdiv.backends.base import Backend, Tensors
from csdiv.backends.reference import formula
from csdiv.operators import OPERATORS

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")  # NumPy's, of infinities and NaN

EVERYWHERE = tuple(dict.fromkeys((*BACKENDS, *(name for name in backends.NAMES if name == interpreter.NAME))))
"""The interpreter as well: it has few pairs here."""
Shape = tuple[int, ...]
BATCHES: list[tuple[Shape, Shape, Shape | None]] = [
    ((), (), None),
    ((), (), ()),
    ((3,), (), None),
    ((3,), (), (3,)),
    ((), (3,), None),
    ((3,), (3,), (3,)),
    ((2, 1), (1, 3), None),
    ((2, 1), (3,), (2, 3)),
    ((), (), (2,)),
    ((0,), (), None),
]
"""Of codes, of the prior, and of its self term, if that is known."""


class Older(Backend):
    """A user's, from before these operators."""

    def __init__(self, inner: Backend) -> None:
        self.inner, self.calls = inner, list[str]()

    def forward(self, name: str, tensors: Tensors, needs: Sequence[bool]) -> tuple[list[Tensor], list[Tensor]]:
        assert name in ("overlap_lse", "self_overlap")
        self.calls.append(name)
        return self.inner.forward(name, tensors, needs)

    def backward(
        self, name: str, grad: Tensor, tensors: Tensors, outputs: Sequence[Tensor], needs: Sequence[bool]
    ) -> list[Tensor]:
        assert name in ("overlap_lse", "self_overlap")
        self.calls.append(f"{name} backward")
        return self.inner.backward(name, grad, tensors, outputs, needs)

    def assign(self, name: str, tensors: Tensors) -> Tensor:
        return self.inner.assign(name, tensors)


def operands(
    name: str,
    p_batch: Shape = (),
    q_batch: Shape = (),
    known: Shape | None = None,
    dtype: torch.dtype = torch.float64,
    structure: str = "diagonal",
) -> list[Tensor | None]:
    g = torch.Generator().manual_seed(3)
    p = testing.random_mixture(4, 3, structure=structure, batch_shape=p_batch, dtype=dtype, generator=g)
    q = testing.random_mixture(5, 3, structure=structure, batch_shape=q_batch, dtype=dtype, generator=g)
    spread = p.variances.expand(p.means.shape).log() if name == "regularizer" else p.variances
    given = None if known is None else torch.randn(known, dtype=torch.float64, generator=g)
    return [t if t is None else t.clone() for t in (p.means, spread, q.means, q.variances, q.log_weights, given)]


def evaluate(name: str, backend: str, tensors: list[Tensor | None], needs: list[bool]) -> tuple[Tensor, list[Tensor]]:
    """The value and the gradients of a weighted sum of it; of the exact formula in float64 for "exact"."""
    exact = backend == "exact"
    leaves = [
        None if t is None else (t.double() if exact else t).detach().requires_grad_(need)
        for t, need in zip(tensors, needs, strict=True)
    ]
    value = formula(name, leaves) if exact else pairs.component_divergence(name, backend, *leaves)
    wanted = [t for t in leaves if t is not None and t.requires_grad]
    upstream = torch.arange(1.0, value.numel() + 1.0, dtype=torch.float64).sin().view(value.shape).to(value.dtype)
    upstream[..., :1] = 0.0
    return value.detach(), list(torch.autograd.grad(value, wanted, upstream)) if wanted else []


def check(name: str, backend: str, tensors: list[Tensor | None], needs: list[bool] | None = None) -> None:
    needs = [True] * 6 if needs is None else needs
    dtype = tensors[0].dtype
    (value, grads), (exact, exact_grads) = (evaluate(name, b, tensors, needs) for b in (backend, "exact"))
    tolerance = {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 3e-5, "atol": 3e-5}
    assert value.dtype == dtype
    torch.testing.assert_close(value, exact.to(dtype), **tolerance)
    for found, right in zip(grads, exact_grads, strict=True):
        torch.testing.assert_close(found, right.to(found.dtype), **tolerance)


on_every_operator = pytest.mark.parametrize("name", ["regularizer", "component_divergence"])
on_every_backend = pytest.mark.parametrize("backend", EVERYWHERE)


@pytest.mark.parametrize(
    ("backend", "p_batch", "q_batch", "known"),
    [(b, *batch) for b in EVERYWHERE for batch in (BATCHES if b != interpreter.NAME else BATCHES[3:7:3])],
)
@on_every_operator
def test_batches_and_known_self_terms(
    name: str, backend: str, p_batch: Shape, q_batch: Shape, known: Shape | None
) -> None:
    check(name, backend, operands(name, p_batch, q_batch, known))


@on_every_backend
@on_every_operator
@pytest.mark.parametrize("structure", ["spherical", "tied diagonal", "tied spherical"])
def test_shared_variances(name: str, backend: str, structure: str) -> None:
    for dtype in (torch.float32, torch.float64) if backend != interpreter.NAME else (torch.float32,):
        check(name, backend, operands(name, (2,), (), None, dtype, structure))


@on_every_backend
@on_every_operator
@pytest.mark.parametrize("known", [None, ()])
def test_each_gradient_alone(name: str, backend: str, known: Shape | None) -> None:
    for wanted in range(7) if backend != interpreter.NAME else (1, 3):
        check(name, backend, operands(name, (2,), (), known), [k == wanted for k in range(6)])


@on_every_backend
def test_points_and_negative_variances(backend: str) -> None:
    """A component with a zero among its variances is infinitely far, and its own term has no gradient."""
    means, variances, *rest = operands("component_divergence")
    variances[1, 2] = 0.0
    variances[2, 0] = -0.5
    value, grads = evaluate("component_divergence", backend, [means, variances, *rest], [True] * 6)
    assert value.isfinite().tolist() == [True, False, False, True]
    assert value[1] == math.inf
    assert value[2].isnan()
    exact, exact_grads = evaluate("component_divergence", "exact", [means, variances, *rest], [True] * 6)
    rows = [0, 1, 3]
    torch.testing.assert_close(value[rows], exact[rows])
    for found, right in zip(grads[:2], exact_grads[:2], strict=True):
        torch.testing.assert_close(found[rows], right[rows])


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_variances_about_the_cap(backend: str, dtype: torch.dtype) -> None:
    """Above it the derivative is a quarter, that of ½ log s − ¼ log s, and NaN stays NaN."""
    means, logs, *rest = operands("regularizer", dtype=dtype)
    cap = 85.0 if dtype == torch.float32 else 700.0
    logs[:] = torch.tensor([cap - 1.0, cap + 1.0, 3.0 * cap, math.nan])[:, None]
    value, (grad,) = evaluate("regularizer", backend, [means, logs, *rest], [k == 1 for k in range(6)])
    assert value.isfinite().tolist() == [True, True, True, False]
    upstream = torch.tensor([0.0, 2.0, 3.0]).sin()
    torch.testing.assert_close(grad[:3], (0.25 * upstream).unsqueeze(-1).expand(3, 3).to(dtype))
    exact, _ = evaluate("regularizer", "exact", [means, logs, *rest], [False] * 6)
    torch.testing.assert_close(value[:3], exact[:3].to(dtype))


@on_every_backend
def test_one_log_variance_beyond_the_cap_changes_no_other(backend: str) -> None:
    means, logs, *rest = operands("regularizer", dtype=torch.float64)
    logs[1] = torch.tensor([701.0, -1.0, 0.5])  # the first has no upstream gradient
    wanted = [k == 1 for k in range(6)]
    value, (grad,) = evaluate("regularizer", backend, [means, logs, *rest], wanted)
    exact, (exact_grad,) = evaluate("regularizer", "exact", [means, logs, *rest], wanted)
    torch.testing.assert_close(value, exact.to(value.dtype))
    torch.testing.assert_close(grad, exact_grad.to(grad.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_upstream_gradient_gives_none_whatever_the_variances_are(dtype: torch.dtype) -> None:
    """Of the backend itself: autograd.py would put zeros there as well."""
    means, logs, *rest = operands("regularizer", dtype=dtype)
    logs[1] = math.nan
    tensors = [means, logs, *rest[:3], None]
    needs = [False, True, False, False, False, False]
    cpu = backends.resolve("cpu", means.device)
    outputs, _ = cpu.forward("regularizer", tensors, [False] * 6)
    upstream = torch.arange(1.0, len(means) + 1.0).to(dtype)
    upstream[1] = 0.0
    saved = [outputs[k] for k in OPERATORS["regularizer"].saved]
    (grad,) = cpu.backward("regularizer", upstream, tensors, saved, needs)
    assert grad[1].tolist() == [0.0] * 3
    assert bool(grad[2:].isfinite().all())


@on_every_backend
@on_every_operator
def test_gradients_where_one_side_is_mapped(name: str, backend: str) -> None:
    """The backward pass then has a prior for each mapped item, where the forward pass had one for all."""
    tensors = operands(name, (2,), dtype=torch.float32)

    def loss(means: Tensor, spread: Tensor, *q: Tensor | None) -> Tensor:
        return pairs.component_divergence(name, backend, means, spread, *q, None).sin().sum()

    every = (0, 1, 2, 3, 4)
    found = torch.func.vmap(torch.func.grad(loss, every), (0, 0, None, None, None))(*tensors[:5])
    one_by_one = [torch.func.grad(loss, every)(tensors[0][i], tensors[1][i], *tensors[2:5]) for i in range(2)]
    for together, alone in zip(found, zip(*one_by_one, strict=True), strict=True):
        torch.testing.assert_close(together, torch.stack(alone), rtol=3e-5, atol=3e-5)


@on_every_operator
@pytest.mark.parametrize(("p_batch", "q_batch", "known"), BATCHES)
def test_older_backends_of_users_have_them(name: str, p_batch: Shape, q_batch: Shape, known: Shape | None) -> None:
    """They are made of what these have, float32 offsets and all."""
    with backends.registrations_restored():
        older = Older(backends.resolve("cpu", torch.device("cpu")))
        backends.register("older", lambda: older)
        check(name, "older", operands(name, p_batch, q_batch, known, torch.float32))
        assert ("self_overlap" in older.calls) == (known is None)

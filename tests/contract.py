"""The contract's cases, what they are made of, and how a backend is held to one."""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import gpu
import interpreter
import pytest
import torch
from entries import BACKENDS
from torch import Tensor

import csdiv
from csdiv import GaussianMixture, testing

NATIVE = tuple(name for name in BACKENDS if name != "reference")
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
RELATIVE_L2 = 3e-5

P, Q = ("p_means", "p_variances", "p_log_weights"), ("q_means", "q_variances", "q_log_weights")
INPUTS = {
    "cs_divergence": P + Q,
    "log_overlap": P + Q,
    "self_overlap": P,
    "component_log_overlap": P[:2] + Q,
    "pairwise_log_overlap": P[:2] + Q[:2],
    "cs_regularizer": P[:2] + Q,
    "log_prob": P[:1] + Q,
    "responsibilities": P[:1] + Q,
}
"""The inputs of each entry; p has the codes or points. p_variances are log variances for cs_regularizer."""


class Case(NamedTuple):
    entry: str
    dtype: torch.dtype = torch.float32
    n: int = 17
    m: int = 31
    dim: int = 5
    structures: tuple[str, str] = ("diagonal", "diagonal")
    layout: str = "contiguous"
    batch: tuple[tuple[int, ...], ...] = ((),) * 6  # of each of P + Q
    needs: tuple[str, ...] | None = None  # None: every input
    scale: str = "plain"

    def __str__(self) -> str:
        changed = [
            "+".join(map(str, value)) if isinstance(value, tuple) else str(value).removeprefix("torch.")
            for value, default in zip(self[1:], Case("")[1:], strict=True)
            if value != default
        ]
        return "-".join((self.entry, *changed)).replace(" ", "")

    @property
    def wanted(self) -> tuple[str, ...]:
        return INPUTS[self.entry] if self.needs is None else self.needs


SIZES = [
    (1, 1, 1),
    (1, 513, 2),
    (2, 15, 3),
    (15, 16, 7),
    (16, 17, 16),
    (17, 33, 15),
    (33, 31, 64),
    (511, 2, 4),
    (513, 33, 9),
]
LAYOUTS = ("contiguous", "strided", "transposed", "expanded", "misaligned")
DIAGONAL = ("diagonal", "spherical", "tied diagonal", "tied spherical")
FULL = ("full", "tied full")
SPHERICAL = ("spherical", "tied spherical")
BATCHES = [
    ((3,),) * 3 + ((),) * 3,
    ((),) * 3 + ((3,),) * 3,
    ((3, 1),) * 3 + ((1, 4),) * 3,
    ((0,),) * 3 + ((),) * 3,
    ((2, 1),) * 3 + ((2, 0),) * 3,
    ((1,),) * 3 + ((3,),) * 3,
    ((3,), (), (), (), (3,), ()),
    ((), (3,), (), (2, 1), (), ()),
    ((), (), (3,), (3,), (), (2, 1)),
]
SCALES = ("-inf weights", "unnormalised", "variances 1e±30", "spread 30", "shifted 1e4")


def subsets(inputs: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Each input alone, all but each, none, and the two sides."""
    alone = [(name,) for name in inputs]
    sides = [tuple(n for n in inputs if n.startswith(side)) for side in "pq"]
    but_one = [tuple(n for n in inputs if n != name) for name in inputs]
    return sorted({(), *alone, *but_one, *sides})


def row_structures(entry: str) -> tuple[str, ...]:
    """Codes have a variance for each dimension, points none."""
    return DIAGONAL + FULL if "p_variances" in INPUTS[entry] and entry != "cs_regularizer" else DIAGONAL[:1]


def full_pairs(entry: str) -> list[tuple[str, str]]:
    """Pairs of structures with a full one among them; of a mixture with itself the first is both."""
    pairs = itertools.product(row_structures(entry), DIAGONAL + FULL)
    return [(s, t) for s, t in pairs if s in FULL or (t in FULL and entry != "self_overlap")]


def batches(entry: str) -> list[tuple[tuple[int, ...], ...]]:
    """Codes have means and log variances of one shape."""
    return [b for b in BATCHES if entry != "cs_regularizer" or b[0] == b[1]]


def needs_at(entry: str, scale: str) -> tuple[str, ...] | None:
    """Of a single pair with tiny variances, which has no weight in a sum, the gradient itself overflows."""
    return () if (entry, scale) == ("pairwise_log_overlap", "variances 1e±30") else None


CASES = list(
    dict.fromkeys(
        case
        for entry in INPUTS
        for case in (
            *(Case(entry, dtype=dtype) for dtype in DTYPES),
            *(Case(entry, n=n, m=m, dim=dim) for n, m, dim in SIZES),
            Case(entry, torch.float64, 33, 513, 3),
            *(Case(entry, layout=layout) for layout in LAYOUTS),
            Case(entry, torch.float64, layout="strided"),
            Case(entry, torch.bfloat16, layout="transposed"),
            *(Case(entry, structures=(s, t)) for s in row_structures(entry) if s in DIAGONAL for t in DIAGONAL),
            *(
                Case(entry, dtype, 5, 20, 17, structures=(s, t))  # where matrix products and their like take over
                for s in row_structures(entry)
                for t in SPHERICAL
                if s in SPHERICAL or entry == "log_prob"
                for dtype in (torch.float32, torch.float64)
                if dtype == torch.float32 or entry == "log_overlap"
            ),
            *(
                Case(entry, dtype, 5, 11, 3, structures=pair)
                for pair in full_pairs(entry)
                for dtype in (torch.float32, torch.float64)
            ),
            *(
                Case(entry, n=4, m=6, dim=2, structures=(structure, "full"), needs=(name,))
                for structure in row_structures(entry)[-2:]
                for name in INPUTS[entry]
            ),
            *(
                Case(entry, structures=("points", t))
                for t in DIAGONAL + FULL
                if entry in ("component_log_overlap", "log_overlap")
            ),
            *(Case(entry, batch=batch, n=4, m=6) for batch in batches(entry)),
            Case(entry, torch.float64, 4, 6, batch=BATCHES[2]),
            *(Case(entry, needs=needs) for needs in subsets(INPUTS[entry])),
            *(Case(entry, scale=scale, needs=needs_at(entry, scale)) for scale in SCALES),
            Case(entry, torch.float64, scale="variances 1e±30"),
        )
    )
)


def make_bases(case: Case) -> dict[str, Tensor]:
    """The tensors that a user holds, one for each input, in the case's dtype; ``lay_out`` makes views of them."""
    g = torch.Generator().manual_seed(sum(map(ord, str(case))))
    decades = 30.0 if case.scale == "variances 1e±30" else 0.3
    kind, _, amount = case.scale.partition(" ")
    spread = float(amount) if kind == "spread" else 1e3 if kind == "variances" else 1.0
    bases = {}
    for side, size, structure, batch in zip(
        "pq", (case.n, case.m), case.structures, (case.batch[:3], case.batch[3:]), strict=True
    ):
        made = [
            testing.random_mixture(
                size,
                case.dim,
                batch_shape=b,
                structure=structure,
                dtype=torch.float64,
                spread=spread,
                decades=decades,
                generator=g,
            )
            for b in batch
        ]
        spreads = made[1].variances if made[1].scale_tril is None else made[1].scale_tril
        values = {"means": made[0].means, "variances": spreads, "log_weights": made[2].log_weights}
        if case.scale == "-inf weights":
            values["log_weights"][..., torch.arange(0, size - 1, 2)] = -math.inf
        if case.scale == "unnormalised":
            values["log_weights"] += 7.0
        if kind == "shifted":
            values["means"] += float(amount)
        if case.entry == "cs_regularizer" and side == "p":
            values["variances"] = values["variances"].log()
        bases |= {f"{side}_{name}": spread_out(t, case.layout).to(case.dtype) for name, t in values.items()}
    return bases


def spread_out(t: Tensor, layout: str) -> Tensor:
    """A contiguous tensor of which ``lay_out`` makes a view with the shape of ``t``."""
    if layout == "strided":
        return torch.stack([t, torch.full_like(t, math.nan)], -1).flatten(-2)
    if layout == "transposed":
        return t.mT.contiguous() if t.ndim > 1 else torch.stack([t, torch.full_like(t, math.nan)], -1)
    if layout == "misaligned":
        return torch.cat([t.new_full((1,), math.nan), t.flatten()])
    return t[..., :1].clone() if layout == "expanded" else t


def lay_out(base: Tensor, layout: str, shape: tuple[int, ...]) -> Tensor:
    if layout == "strided":
        return base[..., ::2]
    if layout == "transposed":
        return base.mT if len(shape) > 1 else base[:, 0]
    if layout == "misaligned":
        return base[1:].view(shape)
    return base.expand(shape) if layout == "expanded" else base


class Evaluation(NamedTuple):
    p: GaussianMixture
    q: GaussianMixture
    leaves: list[Tensor]
    value: Tensor
    grads: list[Tensor | None]


def evaluate(
    case: Case,
    bases: dict[str, Tensor],
    dtype: torch.dtype,
    function: Callable[..., Tensor],
    grad: Tensor | None = None,
) -> Evaluation:
    """The entry's value and, with the upstream ``grad``, the gradients of the bases converted to ``dtype``."""
    leaves = {name: base.to(dtype, copy=True).requires_grad_(name in case.wanted) for name, base in bases.items()}
    shapes = {name: plain_shape(case, name) for name in leaves}
    p, q = ([lay_out(leaves[n], case.layout, shapes[n]) for n in names] for names in (P, Q))
    for t in (*p, *q):
        assert case.layout not in ("strided", "expanded") or t.numel() < 2 or not t.is_contiguous()
        assert case.layout != "misaligned" or t.data_ptr() % 16
    if case.entry == "cs_regularizer":
        value = function(p[0], p[1], mixture(*q))
        p[1] = p[1].exp()
    elif case.entry in ("log_prob", "responsibilities"):
        value = function(p[0], mixture(*q))
        p[1] = torch.zeros_like(p[0])
    else:
        value = function(mixture(*p), mixture(*q))
    wanted = [leaves[name] for name in case.wanted]
    grads = []
    if grad is not None and wanted:
        grads = list(torch.autograd.grad(value, wanted, grad.to(value.dtype)))
    return Evaluation(mixture(*p), mixture(*q), wanted, value, grads)


def mixture(means: Tensor, spreads: Tensor, log_weights: Tensor) -> GaussianMixture:
    """Of variances, or of factors, which are square matrices."""
    if spreads.ndim > 2 and spreads.shape[-2:] == 2 * means.shape[-1:]:
        return GaussianMixture(means, scale_tril=spreads.tril(), log_weights=log_weights)
    return GaussianMixture(means, spreads, log_weights=log_weights)


@functools.cache
def lacks(backend: str, structure: str) -> bool:
    """Whether the backend says that it has no mixtures of this structure, as Triton's may say of full covariances."""
    p = testing.random_mixture(2, 3, structure=structure)
    try:
        csdiv.component_log_overlap(p, p, backend=backend)
    except NotImplementedError:
        assert backend in (interpreter.NAME, gpu.TRITON_NAME), f"{backend} refuses {structure}"
        return True
    return False


def plain_shape(case: Case, name: str) -> tuple[int, ...]:
    index = (*P, *Q).index(name)
    batch, size, structure = case.batch[index], (case.n, case.m)[index // 3], case.structures[index // 3]
    if name.endswith("log_weights"):
        return (*batch, size)
    if name.endswith("means"):
        return (*batch, size, case.dim)
    if structure == "points":
        return (1, 1)
    rows = 1 if structure.startswith("tied") else size
    if structure in FULL:
        return (*batch, rows, case.dim, case.dim)
    return (*batch, rows, 1 if structure.endswith("spherical") else case.dim)


def call(entry: str, backend: str) -> Callable[..., Tensor]:
    if entry == "self_overlap":
        return lambda p, q: csdiv.log_overlap(p, backend=backend)
    if entry in ("log_prob", "responsibilities"):
        return lambda x, q: getattr(q, entry)(x, backend=backend)
    return lambda *arguments: getattr(csdiv, entry)(*arguments, backend=backend)


def eager_call(entry: str) -> Callable[..., Tensor]:
    if entry == "cs_regularizer":
        return lambda m, v, q: testing.eager(entry, GaussianMixture(m, v.exp()), q)
    if entry in ("log_prob", "responsibilities"):
        return lambda x, q: testing.eager(entry, GaussianMixture(x, x.new_zeros(1, 1)), q)
    return lambda p, q: testing.eager(entry, p, q)


def conditioned(case: Case, name: str, exact: Tensor, band: Tensor) -> bool:
    """Whether the relative error of the gradient means anything.

    The weight of a lone component, or one for all, has a gradient that is zero by cancellation; that of a variance for
    all components and dimensions is one sum of both signs, and may cancel until its band is wider than the bound; and
    far from every component eps S, the relative error of a share, exceeds the bound.
    """
    shape = plain_shape(case, name)
    lone = name.endswith("log_weights") and (case.layout == "expanded" or shape[-1] == 1)
    one_sum = name.endswith("variances") and shape[-2:] == (1, 1)
    cancelled = one_sum and bool(band.norm() > RELATIVE_L2 * exact.norm())
    return not lone and not cancelled and not case.scale.startswith("spread")


def check(case: Case, backend: str, common_grad: float | None = None) -> None:
    bases = make_bases(case)
    computed = torch.float64 if case.dtype == torch.float64 else torch.float32
    # Exact is the reference in float64, and for the reference itself the plain formula.
    formula = eager_call(case.entry) if backend == "reference" else call(case.entry, "reference")
    shape = evaluate(case, bases, torch.float64, formula).value.shape
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=computed)
    if common_grad is not None:
        grad = torch.full_like(grad, common_grad)
    exact = evaluate(case, bases, torch.float64, formula, grad)
    eager = evaluate(case, bases, computed, eager_call(case.entry), grad)
    if any(structure in FULL and lacks(backend, structure) for structure in case.structures):
        with pytest.raises(NotImplementedError, match=f'backend "{backend}" has no full covariances'):
            evaluate(case, bases, case.dtype, call(case.entry, backend))
        return
    actual = evaluate(case, bases, case.dtype, call(case.entry, backend), grad)

    # float64 is compared with formulas that take no scale out, and so is the reference.
    options = {"dtype": computed, "scaled": backend != "reference" and computed == torch.float32}
    assert actual.value.dtype == computed
    band = testing.band(case.entry, exact.p, exact.q, **options)
    testing.assert_within_budget(actual.value, eager.value, exact.value, band)
    bands = testing.gradient_bands(case.entry, exact.p, exact.q, grad, exact.leaves, **options) if exact.leaves else []
    for name, a, e, x, b in zip(case.wanted, actual.grads, eager.grads, exact.grads, bands, strict=True):
        assert a.dtype == case.dtype, name
        try:
            testing.assert_within_budget(a, e, x, b, relative_l2=RELATIVE_L2 if conditioned(case, name, x, b) else None)
        except AssertionError as error:
            raise AssertionError(f"gradient of {name}: {error}") from None
    if not exact.leaves:
        assert not actual.value.requires_grad


SCALARS = ("cs_divergence", "log_overlap", "self_overlap")
"""Entries whose gradients come with the value where no compiler or transform is at work."""


def gradients_later() -> Any:
    """Within this context the gradients of scalars are left to the backward pass."""
    return mock.patch.object(csdiv.autograd, "_has_all_items", return_value=False)

"""How many kernels Triton compiles and launches for the backend, by its own binder: none anew for another shape."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
import triton_ptx
from torch import Tensor
from triton_marks import needs_triton

import csdiv
from csdiv import GaussianMixture

SIZES = ((2, 3), (16, 16), (5, 128), (64, 33), (3, 1200))
"""Components of p and q; one alone would be a tied form."""
ALONE: tuple[tuple[int, ...], ...] = ((), ())
Structures = tuple[str, str]
FORMS: list[tuple[Structures, tuple[int, ...]]] = [
    (("diagonal", "diagonal"), (2, 16, 40, 100)),
    *(
        (pair, dims)
        for pair in (("spherical",) * 2, ("tied",) * 2, ("tied", "diagonal"))
        for dims in ((2, 15), (16, 40))
    ),
]
"""Structures of p and q, with dimensions in which all terms take the same forms in float32; see configurations.py."""


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    with triton_ptx.process() as found:
        yield found


def tensor(*shape: int, dtype: torch.dtype, aligned: bool) -> Tensor:
    base = torch.ones(math.prod(shape) + 1, dtype=dtype)
    return base[0 if aligned else 1 :][: math.prod(shape)].view(shape).requires_grad_()


def side(
    k: int, dim: int, structure: str, batch: tuple[int, ...], dtype: torch.dtype, aligned: bool
) -> GaussianMixture:
    shape = {"diagonal": (k, dim), "spherical": (k, 1), "tied": (1, dim)}[structure]
    means, variances, log_weights = (tensor(*batch, *s, dtype=dtype, aligned=aligned) for s in ((k, dim), shape, (k,)))
    return GaussianMixture(means, variances, log_weights=log_weights)


def call_everything(p: GaussianMixture, q: GaussianMixture, *, aligned: bool) -> None:
    """Every operator with gradients, whose upstream ones are aligned or not as the rest."""
    values = [
        function(*sides, backend=triton_ptx.NAME)
        for function, sides in (
            (csdiv.cs_divergence, (p, q)),
            (csdiv.log_overlap, (p, q)),
            (csdiv.log_overlap, (p,)),
            (csdiv.component_log_overlap, (p, q)),
            (csdiv.pairwise_log_overlap, (p, q)),
        )
    ]
    grads = [tensor(*value.shape, dtype=value.dtype, aligned=aligned).detach() for value in values]
    torch.autograd.backward(values, grads)
    q.assign(p, backend=triton_ptx.NAME)


def variants(
    structures: Structures, dims: tuple[int, ...], dtype: torch.dtype, batches: tuple[tuple[int, ...], ...]
) -> list[list[str]]:
    """The kernels that were compiled for the first shape, and those for each later one."""
    added, seen = [], set[tuple[str, str]]()
    with triton_ptx.variants() as found:
        for sizes, dim, aligned in itertools.product(SIZES, dims, (True, False)):
            kinds = zip(sizes, structures, batches, strict=True)
            p, q = (side(k, dim, structure, batch, dtype, aligned) for k, structure, batch in kinds)
            call_everything(p, q, aligned=aligned)
            added.append(sorted(name for name, _ in found - seen))
            seen |= found
    return added


@needs_triton
@pytest.mark.parametrize(
    ("structures", "dims", "dtype", "batches"),
    [
        *((*form, torch.float32, ALONE) for form in FORMS),
        (*FORMS[0], torch.float64, ALONE),
        *((*FORMS[0], torch.float32, batches) for batches in (((3,), (3,)), ((2, 1), (3,)))),
    ],
)
def test_another_shape_compiles_nothing(
    pool: ProcessPoolExecutor,
    structures: Structures,
    dims: tuple[int, ...],
    dtype: torch.dtype,
    batches: tuple[tuple[int, ...], ...],
) -> None:
    """Whatever sizes and strides are, and wherever tensors and upstream gradients begin."""
    first, *later = pool.submit(variants, structures, dims, dtype, batches).result()
    assert {"scale_kernel", "pack_kernel", "row_sums_kernel", "gradient_sweep_kernel", "assign_kernel"} <= {*first}
    assert [names for names in later if names] == []
    for kernel in ("scale_kernel", "cs_divergence_kernel", "assign_kernel", "combine_rows_kernel"):
        assert first.count(kernel) == 1


P, Q = [(128, 40), (128, 40), (128,)], [(500, 40), (500, 40), (500,)]


@needs_triton
@pytest.mark.parametrize(
    ("name", "shapes", "backward", "kernels", "operations"),
    [
        ("cs_divergence", P + Q, False, 11, 16),
        ("cs_divergence", P + Q, True, 7, 29),
        ("log_overlap", P + Q, False, 7, 12),
        ("self_overlap", P, False, 5, 9),
        ("overlap_lse", P[:2] + Q, True, 5, 17),
        ("pairwise", P[:2] + Q[:2], True, 5, 8),
        ("cs_divergence", [(7, *shape) for shape in P] + Q, False, 11, 18),
    ],
)
def test_few_launches(
    pool: ProcessPoolExecutor,
    name: str,
    shapes: list[tuple[int, ...]],
    backward: bool,
    kernels: int,
    operations: int,
) -> None:
    """Of Triton's kernels, and of torch around them, with all gradients; or of the backward pass."""
    counts = pool.submit(triton_ptx.launches, name, shapes, backward=backward).result()
    of_triton = sum(count for key, count in counts.items() if key.endswith("_kernel"))
    assert of_triton == kernels
    assert sum(counts.values()) - of_triton <= operations, counts

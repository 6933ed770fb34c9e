"""How kernels are launched: one static table, so that results do not depend on a search at run time."""

from typing import Any, NamedTuple

import torch

OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
"""Of every kernel: multiplications and additions contract. Four warps are device.TILE threads."""
PACK_OPTIONS = OPTIONS | {"num_warps": 16}

STRUCTURES = ("diagonal", "spherical", "tied", "tied rows")
"""Of the variances of both sides: any, one for each component, in each dimension one for all components of a side, and
the latter of the side whose components are the rows of tiles."""
PRODUCTS = ("spherical", "tied")
"""Those for which there are matrix products (squares.py)."""
FORMS = (*STRUCTURES, *(f"{structure} matrix" for structure in PRODUCTS))
"""Of the pair term: one for each structure, and those by matrix products."""
MATRIX_DIM = 16
"""From so many dimensions on products are taken in float32; research puts the gain there, nothing has been measured."""


class Tile(NamedTuple):
    """Rows of a tile of pairs, and how its program is compiled."""

    block_n: int
    num_warps: int = 4
    num_stages: int = 1

    @property
    def options(self) -> dict[str, Any]:
        """For a launch. The registers that ptxas takes by itself may be less than there are, and spill."""
        return OPTIONS | {"num_warps": self.num_warps, "num_stages": self.num_stages, "maxnreg": 255}


Table = dict[tuple[str, bool, torch.dtype], Tile]
"""By kernel, by whether the form takes matrix products, and by dtype. "rows" are sums of rows, assignments and
densities; "sweep" are gradients, which add to the sums of a column once for so many rows."""
TILES: Table = {
    ("rows", False, torch.float32): Tile(16),
    ("rows", False, torch.float64): Tile(4),
    ("rows", True, torch.float32): Tile(32, 8),
    ("sweep", False, torch.float32): Tile(16),
    ("sweep", False, torch.float64): Tile(4),
    ("sweep", True, torch.float32): Tile(16),
}
"""From counts of registers and instructions of a few tiles, without spills, compiled for 8.0, 9.0 and 10.0: nothing in
it has been timed, on any GPU, so no D, structure or architecture has a line of its own. ``python -m bench tune`` prints
such a table for the GPU at hand."""

ROW_PROGRAMS, SWEEP_PROGRAMS = 16, 4
"""Programs for each multiprocessor, where there are rows or columns enough: several waves; sums cost memory."""
PART_TILES = 1024
"""Column tiles of a part of a row at most: terms that a thread adds up in one number."""


class Shared(NamedTuple):
    """What the variances of a side share."""

    same_dims: bool  # each component has one, and those of the other side
    tied: bool  # all components have the same


def structure_of(rows: Shared, columns: Shared) -> str:
    """One of :data:`STRUCTURES`."""
    if rows.same_dims and columns.same_dims:
        return "spherical"
    return "diagonal" if not rows.tied else "tied" if columns.tied else "tied rows"


def form_of(structure: str, dtype: torch.dtype, dim: int, *, exact: bool = False) -> str:
    """One of :data:`FORMS`; ``exact``: equal pairs give equal bits."""
    products = structure in PRODUCTS and dtype == torch.float32 and dim >= MATRIX_DIM and not exact
    return f"{structure} matrix" if products else structure


def takes_products(form: str) -> bool:
    """Whether a form is one by matrix products."""
    return form.endswith(" matrix")


def tile_of(kernel: str, form: str, dtype: torch.dtype) -> Tile:
    """What the table has."""
    return TILES[kernel, takes_products(form), dtype]


def cut(wanted_programs: int, programs: int, tiles: int) -> int:
    """In how many parts to cut ``tiles`` tiles, at least two each, where there are ``programs`` programs without."""
    return max(1, min(-(-wanted_programs // max(programs, 1)), tiles // 2))

"""How kernels are launched: one static table, so that results do not depend on a search at run time."""

from typing import Any, NamedTuple

import torch

OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
"""Of every kernel: multiplications and additions contract. Four warps are device.TILE threads."""
PACK_OPTIONS = OPTIONS | {"num_warps": 16}
TILE_OPTIONS = OPTIONS | {"maxnreg": 255}
"""Of those that go through tiles of pairs: what ptxas takes by itself may be less, and spill."""

FORMS = ("diagonal", "spherical", "matrix")
"""Of the pair term: of any variances, of one for each component, and the latter by matrix products (spherical.py)."""
MATRIX_DIM = 16
"""From so many dimensions on "matrix" is taken in float32; research puts the gain there, nothing has been measured."""


class Tile(NamedTuple):
    """Rows of a tile of pairs, and the compiler's options."""

    block_n: int
    options: dict[str, Any]


ROW_TILES = {
    ("diagonal", torch.float32): Tile(16, TILE_OPTIONS),
    ("diagonal", torch.float64): Tile(4, TILE_OPTIONS),
    ("spherical", torch.float32): Tile(16, TILE_OPTIONS),
    ("spherical", torch.float64): Tile(4, TILE_OPTIONS),
    ("matrix", torch.float32): Tile(32, TILE_OPTIONS | {"num_warps": 8}),
}
"""Of row sums, assignments and densities, by form and dtype: the same for every architecture until one is measured."""
SWEEP_TILES = ROW_TILES | {("matrix", torch.float32): Tile(16, TILE_OPTIONS)}
"""Of gradients, which add to the sums of a column once for so many rows."""

ROW_PROGRAMS, SWEEP_PROGRAMS = 16, 4
"""Programs for each multiprocessor, where there are rows or columns enough: several waves; sums cost memory."""
PART_TILES = 1024
"""Column tiles of a part of a row at most: terms that a thread adds up in one number."""


def form_of(spherical: bool, dtype: torch.dtype, dim: int, *, exact: bool = False) -> str:
    """One of :data:`FORMS`. ``spherical``: every component has one variance; ``exact``: equal pairs give equal bits."""
    if not spherical:
        return "diagonal"
    return "matrix" if dtype == torch.float32 and dim >= MATRIX_DIM and not exact else "spherical"


def cut(wanted_programs: int, programs: int, tiles: int) -> int:
    """In how many parts to cut ``tiles`` tiles, at least two each, where there are ``programs`` programs without."""
    return max(1, min(-(-wanted_programs // max(programs, 1)), tiles // 2))

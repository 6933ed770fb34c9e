"""How kernels are launched: one static table, so that results do not depend on a search at run time."""

import torch

BLOCK_N = {torch.float32: 16, torch.float64: 4}
"""Rows of a tile of pairs: each thread has so many pairs in registers."""
SWEEP_BLOCK_N = {torch.float32: 16, torch.float64: 4}
"""The same for gradients, which add to the sums of a column once for so many rows."""
OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
"""Of every kernel: multiplications and additions contract. Four warps are device.TILE threads."""
PACK_OPTIONS = OPTIONS | {"num_warps": 16}
TILE_OPTIONS = OPTIONS | {"maxnreg": 255}
"""Of those that go through tiles of pairs: what ptxas takes by itself may be less, and spill."""

ROW_PROGRAMS, SWEEP_PROGRAMS = 16, 4
"""Programs for each multiprocessor, where there are rows or columns enough: several waves; sums cost memory."""
PART_TILES = 1024
"""Column tiles of a part of a row at most: terms that a thread adds up in one number."""


def cut(wanted_programs: int, programs: int, tiles: int) -> int:
    """In how many parts to cut ``tiles`` tiles, at least two each, where there are ``programs`` programs without."""
    return max(1, min(-(-wanted_programs // max(programs, 1)), tiles // 2))

"""Triton kernels, installed as csdiv.kernels: the files of csrc/cuda once more, on packed torch tensors.

Nothing is imported here: the files import triton, and are imported where an operator runs; but for configurations.py,
which the rest of csdiv reads as well.
"""

"""Which kernels the host code of the CUDA backend would launch for a call, and how; nothing is computed."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from typing import NamedTuple
from unittest import mock

import emulation
import ptx

from bench import static


class Launch(NamedTuple):
    """A launch: the kernel as ``bench.static.readable`` names it, and its blocks."""

    kernel: str
    blocks: int


_FUNCTION = ctypes.CFUNCTYPE(
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.c_int64,
    ctypes.c_int,
    ctypes.c_uint64,
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.c_int,
)


@contextlib.contextmanager
def recorded(processors: int) -> Iterator[list[Launch]]:
    """What the backend "emulation" launches on a GPU of so many multiprocessors; results are not written."""
    found: list[Launch] = []

    def launch(name: bytes, blocks: int, *_: object) -> None:
        found.append(Launch(static.readable(name.decode()), blocks))

    backend = emulation.backend()
    function = _FUNCTION(launch)
    address = ctypes.cast(function, ctypes.c_void_p).value
    backend.native.use_ptx(address, 0, ptx._addresses(backend.native))
    try:
        with mock.patch.object(type(backend), "processors", return_value=processors):
            yield found
    finally:
        backend.native.use_ptx(0, 0, {})

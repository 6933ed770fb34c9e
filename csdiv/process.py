"""Forks of this process, which can use PyTorch's threads as it does.

A fork copies the calling thread alone. GNU's OpenMP library does not notice, and the child's first parallel operator,
csdiv's or PyTorch's own, would wait for threads that are gone. So the library ends its idle threads before the fork,
and starts new ones, here and in the child, for the next parallel operator: once for each fork, in tens of
microseconds. LLVM's and Intel's libraries look after forks themselves.
"""

import os

_PAUSE_SOFT = 1  # omp_pause_soft: settings are kept


def _release_openmp_threads() -> None:
    import ctypes  # which an import of csdiv need not wait for

    library = ctypes.CDLL(None)  # what the process has loaded
    if hasattr(library, "omp_pause_resource_all") and not hasattr(library, "__kmpc_fork_call"):
        library.omp_pause_resource_all(_PAUSE_SOFT)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_release_openmp_threads)

"""The process that imported csdiv: a fork of it does not have PyTorch's threads any more."""

import os

IMPORTED_IN = os.getpid()

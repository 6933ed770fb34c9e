"""Whether Triton's kernels can be interpreted or compiled here."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

import interpreter
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
HAS_TRITON = importlib.util.find_spec("triton") is not None
NAME = interpreter.NAME
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="no triton")
interpreted = pytest.mark.skipif(not HAS_TRITON or torch.cuda.is_available(), reason="no triton, or a GPU for it")

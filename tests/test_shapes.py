"""Batch shapes that broadcast."""

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import csdiv
from csdiv.shapes import broadcast

SHAPES = [(), (1,), (0,), (3,), (2, 1), (2, 3), (1, 0), (4, 1, 3), (4, 2, 1), (5,)]


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_broadcast_is_torchs(count: int) -> None:
    refused = 0
    for shapes in itertools.product(SHAPES, repeat=count):
        try:
            expected = torch.broadcast_shapes(*shapes)
        except RuntimeError:
            refused += 1
            with pytest.raises(RuntimeError, match=r"shapes do not broadcast: \("):
                broadcast(*shapes)
        else:
            assert broadcast(*shapes) == expected, shapes
            assert isinstance(broadcast(*shapes), torch.Size)
    assert (refused > 0) == (count > 1)


def test_a_batched_call_does_not_import_sympy() -> None:
    """It takes a second. Batches broadcast here within a side, between sides and in gradients."""
    code = """
import sys, torch, csdiv
before = "sympy" in sys.modules
means, ones = torch.randn(4, 1, 3, 2, requires_grad=True), torch.ones(3, 2)
p, q = csdiv.GaussianMixture(means, ones), csdiv.GaussianMixture(torch.randn(5, 3, 2), ones)
full = csdiv.GaussianMixture(means, covariance_matrix=torch.eye(2).expand(5, 1, 2, 2), log_weights=torch.zeros(3))
for backend in ("auto", "reference"):
    for side in (p, full):
        csdiv.cs_divergence(side, q, backend=backend).sum().backward()
        side.log_prob(torch.zeros(1, 2), backend=backend), side.sample(2)
csdiv.channel_log_overlap(p, q, torch.zeros(2, 3), torch.zeros(2, 3))
csdiv.cs_regularizer(torch.randn(6, 2), torch.zeros(6, 2), q)
print("sympy" in sys.modules and not before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout == "False\n", done.stderr


def test_nothing_calls_torchs() -> None:
    """One call that a test above does not reach would bring the second back."""
    for path in Path(csdiv.__file__).parent.rglob("*.py"):
        assert "broadcast_shapes(" not in path.read_text(), path

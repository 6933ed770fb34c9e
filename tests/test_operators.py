"""An operator is a row of the table and a formula: one that takes a tensor of neither side, in a process of its own."""

import subprocess
import sys

import pytest
import torch

from csdiv import testing
from csdiv.backends.arrays import Call
from csdiv.operators import OPERATORS, Other, _operator

PADDED = """
import pytest, torch
from csdiv.operators import OPERATORS, Other, _operator

row = OPERATORS["log_overlap"]
OPERATORS["padded_overlap"] = _operator(  # before csdiv.ops defines what the table has
    "padded_overlap", " ".join(row.p), " ".join(row.q), row.outputs, "value row_lse", "scalars",
    (Other("extra_variances", "1D"),),
)

import csdiv
from csdiv import GaussianMixture, pairs, reference, testing
from csdiv.backends.cpu import Cpu

def padded(p, extra):
    return p._replace(variances=p.variances + extra)

reference.FORMULAS["padded_overlap"] = lambda p, q, extra: reference.log_overlap(padded(p, extra), q)
reference.ROW_LSE["padded_overlap"] = lambda p, q, extra: reference.overlap_lse(padded(p, extra), q)
Cpu.lacks = frozenset({"padded_overlap"})

p, q = (testing.random_mixture(k, 2, dtype=torch.float64) for k in (3, 4))
e = torch.rand(5, 1, 2, dtype=torch.float64)

def function(backend="auto"):
    def value(means, extra):
        side = GaussianMixture(means, p.variances, log_weights=p.log_weights)
        return pairs.route(side, q, backend).value("padded_overlap", extra)
    return value

wide = GaussianMixture(p.means, p.variances + e, log_weights=p.log_weights)
expected = csdiv.log_overlap(wide, q)
torch.testing.assert_close(function()(p.means, e), expected)
torch.testing.assert_close(function("reference")(p.means, e), expected)
inputs = [t.clone().requires_grad_() for t in (p.means, e)]
assert torch.autograd.gradcheck(function(), inputs)
assert torch.autograd.gradgradcheck(function(), inputs)
torch.testing.assert_close(torch.func.vmap(function(), (None, 0))(p.means, e), expected)
tangents = torch.func.jvp(function(), (p.means, e), (torch.ones_like(p.means), torch.zeros_like(e)))[1]
assert tangents.shape == (5,)
compiled = torch.compile(function(), fullgraph=True, backend="aot_eager")
torch.testing.assert_close(compiled(p.means, e), expected)
sides = [p.means, p.variances, p.log_weights, q.means, q.variances, q.log_weights]
for arguments in ((*sides, e[0], [True] * 7, "auto"), (*sides, e, [False] * 7, "auto")):
    results = torch.library.opcheck(torch.ops.csdiv.padded_overlap_forward.default, arguments)
    assert set(results.values()) == {"SUCCESS"}
for backend, side, message in (("cpu", p, "has no padded_overlap"), ("auto", None, "diagonal covariances expected")):
    side = side or testing.random_mixture(3, 2, structure="tied full", dtype=torch.float64)
    with pytest.raises(NotImplementedError, match=message):
        pairs.route(side, q, backend).value("padded_overlap", e)
print("right")
"""


def test_a_row_and_a_formula_make_an_operator() -> None:
    done = subprocess.run([sys.executable, "-c", PADDED], capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout.endswith("right\n"), done.stderr


@pytest.mark.parametrize("batch", [(), (2,), (5, 1)])
def test_tensors_of_neither_side_follow_the_outputs(batch: tuple[int, ...]) -> None:
    """As a native function gets them: of full shape, each with its gradient, and of the batch as well."""
    row = OPERATORS["log_overlap"]
    others = (Other("extra_variances", "1D"), Other("temperatures", "N"))
    operator = _operator("toy", " ".join(row.p), " ".join(row.q), row.outputs, "value row_lse", "scalars", others)
    p, q = (testing.random_mixture(k, 2, batch_shape=b) for k, b in ((3, ()), (4, (2,))))
    tensors = [p.means, p.variances, p.log_weights, q.means, q.variances, q.log_weights]
    extra, temperatures = torch.rand(*batch, 1, 1), torch.rand(3)
    call = Call(operator, [*tensors, extra, temperatures], [False] * 6 + [True, False])
    assert call.problem.batch == torch.broadcast_shapes((2,), batch)
    outputs = call.outputs()
    full, grad, spread, nothing = call._others
    assert call.arguments(outputs)[3] == tuple(t.data_ptr() for t in (*outputs, full, grad, spread, nothing))
    assert full.shape == grad.shape == (*call.problem.batch, 1, 2)
    assert torch.equal(full, extra.expand(full.shape))
    assert torch.equal(spread, temperatures.expand(*call.problem.batch, 3))
    assert nothing.data_ptr() == 0
    grad.fill_(1.0)
    (found,) = call.gradients()
    assert torch.equal(found, torch.full_like(extra, grad.numel() / extra.numel()))

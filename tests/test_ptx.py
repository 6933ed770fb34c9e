"""The PTX of the built CUDA kernels, executed: held to the contract, and without a finding; see ptx.py."""

import functools
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import contract
import emulation
import ptx
import pytest
import test_full_contract as full
import torch
from contract import BATCHES, Case

import csdiv
from bench import static
from csdiv import backends, testing

pytestmark = pytest.mark.skipif(bool(ptx.missing()), reason=ptx.missing())

TYPES = (torch.float32, torch.float64)
CASES = {
    "cs_divergence": [
        *(Case("cs_divergence", dtype, dim=dim) for dtype in TYPES for dim in (5, 12, 32)),
        Case("cs_divergence", n=70, m=130, dim=5),
        Case("cs_divergence", n=4, m=6, batch=BATCHES[2]),
        *(Case("cs_divergence", dtype, n=1540, m=3, dim=1, needs=()) for dtype in TYPES),  # rows in two steps
    ],
    "log_overlap": [
        *(Case("log_overlap", dtype, scale="-inf weights") for dtype in TYPES),
        *(Case("log_overlap", dtype, n=8500, m=3, dim=1, needs=()) for dtype in TYPES),
    ],
    "self_overlap": [Case("self_overlap", dtype, n=67) for dtype in TYPES],
    "component_log_overlap": [
        *(Case("component_log_overlap", dtype, scale="variances 1e±30") for dtype in TYPES),
        Case("component_log_overlap", structures=("points", "diagonal")),
        Case("component_log_overlap", n=4, m=6, batch=BATCHES[3]),
    ],
    "pairwise_log_overlap": [Case("pairwise_log_overlap", dtype, layout="strided") for dtype in TYPES],
    "cs_regularizer": [Case("cs_regularizer", dtype, 5, 7, needs=n) for dtype in TYPES for n in (None, ())],
    "full": [full.Case("component_log_overlap", dtype=torch.float64, dim=d, n=3, m=5) for d in full.DIMS]
    + [full.Case(entry) for entry in full.ENTRIES],
    "assign": [],
}
"""At least one for each kernel."""


def check(case: Case | full.Case, name: str = ptx.NAME) -> None:
    if isinstance(case, full.Case):
        full.test_full_contract(case, name)
    else:
        contract.check(case, name)


def assigns() -> None:
    for dtype in TYPES:
        for dim, structure in ((5, "diagonal"), (3, "full"), (12, "full")):
            x, q = (testing.random_mixture(n, dim, structure=structure, dtype=dtype) for n in (9, 70))
            assert torch.equal(q.assign(x, backend=ptx.NAME), q.assign(x, backend="reference"))


def executed() -> Counter[str]:
    """Instructions of warps since this was last asked, by the kernels that ran."""
    machine = ptx.machine()
    found = machine.executed()
    machine.clear_counts()
    return found


@functools.cache
def kernels_of(kind: str) -> dict[str, list[Case | full.Case]]:
    """The cases of a kind pass; which of them each kernel ran in."""
    ptx.backend()
    executed()
    if kind == "assign":
        assigns()
        return {name: [] for name in executed()}
    ran = dict[str, list[Case | full.Case]]()
    for case in CASES[kind]:
        check(case)
        for name in executed():
            ran.setdefault(name, []).append(case)
    return ran


@pytest.mark.parametrize("kind", CASES)
def test_contract(kind: str) -> None:
    assert kernels_of(kind)


def test_every_kernel_ran() -> None:
    ran = {name for kind in CASES for name in kernels_of(kind)}
    known = {name for name in ptx.machine().kernels if "csdiv" in name}
    assert len(known) >= 40
    assert known - ran == set()


def test_all_kernels_of_the_emulation_have_ptx() -> None:
    """A kernel that has none would be an error of its launch alone."""
    ptx.backend()
    assert set(ptx._addresses(emulation.backend().native).values()) == {
        n for n in ptx.machine().kernels if "csdiv" in n
    }


@pytest.mark.parametrize("order", ptx.ORDERS[1:])
def test_the_order_of_warps_and_blocks_changes_no_bit(order: str) -> None:
    p, q = (testing.random_mixture(k, 5).map(lambda t: t.clone().requires_grad_()) for k in (70, 140))

    def bits() -> list[torch.Tensor]:
        value = csdiv.cs_divergence(p, q, backend=ptx.NAME)
        return [value.detach(), *torch.autograd.grad(value, [p.means, p.variances, q.log_weights])]

    first = bits()
    with ptx.machine().set(order):
        assert all(torch.equal(a, b) for a, b in zip(first, bits(), strict=True))


def everything() -> list[Case | full.Case]:
    return [*contract.CASES, *(case for case in full.CASES if full.is_checked(case, emulation.NAME))]


@pytest.mark.slow
@pytest.mark.parametrize("order", ptx.ORDERS)
@pytest.mark.parametrize("case", everything(), ids=str)
def test_whole_contract(case: Case | full.Case, order: str) -> None:
    with ptx.machine().set(order):
        check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", everything(), ids=str)
def test_whole_contract_with_products_and_sums_contracted(case: Case | full.Case) -> None:
    """As ptxas may contract them; approximations are exact here."""
    name = "ptx contracted"
    with backends.registrations_restored():
        backends.register(name, contracted, full=True)
        try:
            with ptx.machine().set(exact=True):
                check(case, name)
        finally:
            ptx.add_kernels(ptx.modules())


@functools.cache
def contracted() -> ptx.Ptx:
    return ptx.Ptx(emulation.backend().native, ptx.modules(), contract=True)


# Faults that the host's compiler cannot see: (file, before, after, flags of nvcc, what is said).
FAULTS = {
    "another instruction": ("device.h", "ex2.approx.ftz.f32", "lg2.approx.ftz.f32", "out of budget|relative"),
    "an operand that is only written": ("device.h", '"+r"(x)', '"=r"(x)', "a register that nothing writes"),
    "a guard is missing": ("row_sums.cu", "< kThreadRows && row < n", "< kThreadRows", "write out of the bounds"),
    "half of a warp in the mask": ("row_sums.h", "__shfl_xor_sync(~0u, own", "__shfl_xor_sync(0xffffu, own", "mask"),
    "a load that is not aligned": ("device.h", "(from + k)", "(from + k + 1)", "misaligned access"),
}


def check_with(text: str) -> None:
    ptx.backend()
    ptx.add_kernels([text])
    contract.check(Case("component_log_overlap", n=70, m=300, dim=33), ptx.NAME)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_that_only_a_gpu_would_show(fault: str, tmp_path: Path) -> None:
    file, before, after, message = FAULTS[fault]
    cuda = shutil.copytree(emulation.ROOT / "csrc", tmp_path / "csrc") / "cuda"
    text = (cuda / file).read_text()
    assert before in text
    (cuda / file).write_text(text.replace(before, after, 1))
    command = [static.tool("nvcc"), "-std=c++17", "-O3", f"-I{cuda.parent}", "-DCSDIV_GROUP=4", "-arch=compute_90"]
    subprocess.run([*command, "-ptx", cuda / "row_sums.cu", "-o", tmp_path / "row_sums.ptx"], check=True)
    try:
        with pytest.raises((AssertionError, ValueError), match=message):
            check_with((tmp_path / "row_sums.ptx").read_text())
    finally:
        ptx.machine().findings()
        ptx.add_kernels(ptx.modules())


NOTICED = 0.6
"""The share of barriers whose absence shows, at least: others order what the cases have no second tile or block for."""


@pytest.mark.slow
def test_barriers_that_are_left_out_are_noticed() -> None:
    machine = ptx.machine()
    cases = dict[str, list[Case | full.Case]]()
    for kind in CASES:
        for name, ran in kernels_of(kind).items():
            cases.setdefault(name, []).extend(ran)
    unnoticed, count = list[str](), 0
    for name, ran in cases.items():
        lines = [row.line for row in machine.kernels[name].rows if row.name in ("bar", "bar.warp.sync")]
        for number, line in enumerate(lines):
            count += 1
            machine.skip(name, line)
            if not any(noticed(case, order) for order in ptx.ORDERS[:2] for case in ran):
                unnoticed.append(f"{static.readable(name)} {number}")
            machine.skip("", 0)
    assert count - len(unnoticed) >= NOTICED * count, unnoticed


def noticed(case: Case | full.Case, order: str) -> bool:
    with ptx.machine().set(order):
        try:
            check(case)
        except AssertionError:
            return True
        finally:
            ptx.machine().findings()
    return False


def test_the_names_of_kernels_are_those_of_the_host() -> None:
    names = [m[1] for text in ptx.modules() for m in re.finditer(r"\.entry\s+([\w$]+)", text)]
    assert len(set(map(ptx.host_name, names))) == len(names)

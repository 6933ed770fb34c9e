"""The Triton kernels' machine code, made in processes of their own, where kernels are not interpreted."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from triton_marks import ROOT, needs_triton

from csdiv.kernels import configurations

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")  # NumPy's, of infinities and NaN


# Machine code


def compiled(
    capability: int, scalar: str, forms: str = "[:1]", batches: str = "(static_triton.ALONE,)", only: str = ""
) -> list[dict[str, Any]]:
    """What the launches cost whose names match ``only``; more shared memory than there is would be an error."""
    code = f"""if True:
        import json, re
        from bench import static, static_triton
        launches = static_triton.launches(({scalar!r},), {batches}, static_triton.FORMS{forms})
        launches = [launch for launch in launches if re.search({only!r}, launch.name)]
        print(json.dumps(static.records([static_triton.compiled(launch, {capability}) for launch in launches])))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


KERNELS = {
    "scale_kernel", "pack_kernel", "row_sums_kernel", "combine_rows_kernel", "total_kernel", "cs_divergence_kernel",
    "gradient_sweep_kernel", "pairwise_forward_kernel", "assign_kernel",
}  # fmt: skip


@needs_triton
def test_what_an_element_costs_in_float32() -> None:
    rows = compiled(90, "float")
    assert {row["kernel"].removeprefix("triton ").split("<")[0] for row in rows} == KERNELS
    assert [row for row in rows if row["local_memory_bytes"] or row["registers"] > 255] == []
    loops = [row for row in rows if "loop" in row]
    assert {row["kernel"].removeprefix("triton ").split("<")[0] for row in loops} == {
        "row_sums_kernel", "gradient_sweep_kernel", "pairwise_forward_kernel", "assign_kernel",
    }  # fmt: skip
    for row in loops:
        limit = {"logits": 7.5, "gradients": 9.5}[row["loop"]]
        assert row["instructions_per_element"] <= limit, row
        assert row["special_per_element"] == {"logits": 0.5, "gradients": 1.0}[row["loop"]]


@needs_triton
@pytest.mark.slow
def test_every_kernel_compiles_without_local_memory() -> None:
    """For three architectures, and with the variants of a batch for one of them."""
    alone = [(80, "float"), (80, "double"), (90, "double"), (100, "float"), (100, "double")]
    with ThreadPoolExecutor(2) as pool:
        batches = pool.submit(compiled, 90, "float", "[:1]", "static_triton.SHARED")
        found = list(pool.map(lambda kind: compiled(*kind), alone))
    for rows in found:
        assert {row["kernel"].removeprefix("triton ").split("<")[0] for row in rows} == KERNELS
    for row in (row for rows in (*found, batches.result()) for row in rows):
        assert row["local_memory_bytes"] == 0, row
        assert row["registers"] <= 255, row


FORM_LIMITS = {
    "spherical": {"spherical matrix logits": 1.3, "spherical logits": 3.3, "spherical gradients": 2.9},
    "tied": {"tied matrix logits": 1.6, "tied logits": 4.8, "tied gradients": 6.1},
    "tied rows": {"tied rows logits": 4.4, "tied rows gradients": 6.1},
}
"""Instructions of an element, as docs/kernels.md has them."""


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("structure", FORM_LIMITS)
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_kernels_of_other_forms_compile_without_local_memory(capability: int, structure: str) -> None:
    """Of each form the kernels, one variant each: all of them would take minutes for an architecture."""
    form, plain = f"float, {structure}( matrix)?(?! rows)", "(row_sums|assign|pairwise_forward)"
    only = rf"{plain}_kernel<{form}>|gradient_sweep_kernel<{form}, DIMENSIONS, no factors, no given>"
    rows = compiled(capability, "float", "[1:]", only=only)
    names = sorted({row["kernel"].removeprefix("triton ") for row in rows})
    kernels = ("assign", "gradient_sweep", "pairwise_forward", "row_sums")
    with_products = kernels[1::2] if structure in configurations.PRODUCTS else ()
    assert {tuple(name.rstrip(">").split(", ")[:2]) for name in names} == {
        *((f"{kernel}_kernel<float", structure) for kernel in kernels),
        *((f"{kernel}_kernel<float", f"{structure} matrix") for kernel in with_products),
    }
    assert [row for row in rows if row["local_memory_bytes"] or row["registers"] > 255] == []
    for row in (row for row in rows if "loop" in row):
        assert row["instructions_per_element"] <= FORM_LIMITS[structure][row["loop"]], row
    if capability == 90:
        assert {row["loop"] for row in rows if "loop" in row} == set(FORM_LIMITS[structure])

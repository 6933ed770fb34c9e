"""Every operator of torch.ops.csdiv keeps what torch expects of its schema, its fake and its place below autograd."""

from typing import Any

import pytest
import torch
from entries import BACKENDS
from torch import Tensor

from csdiv import backends, ops, testing


def operator_samples(backend: str) -> dict[str, list[tuple[Any, ...]]]:
    """Arguments for each operator of csdiv: plain, and batched with a permuted view and uniform weights."""

    def samples() -> list[tuple[Tensor | None, ...]]:
        sides = [testing.random_mixture(k, 2, generator=torch.Generator().manual_seed(k)) for k in (3, 4)]
        plain = tuple(t for side in sides for t in (side.means, side.variances, side.log_weights))
        batched = [t.expand(2, *t.shape).contiguous() for t in plain]
        batched[0] = batched[0].mT.contiguous().mT
        batched[2] = None
        return [plain, tuple(batched)]

    result: dict[str, list[tuple[Any, ...]]] = {}

    def add(name: str, *arguments: Any) -> Any:
        result.setdefault(name, []).append((*arguments, backend))
        return getattr(ops, name)(*arguments, backend)

    def add_full(*pair: Tensor, q_log_weights: Tensor) -> None:
        pm, pc, qm, qc, qw = (t.double() for t in (*pair, q_log_weights))
        rows = add("full_overlap_lse_forward", pm, pc, qm, qc, qw)
        add("full_overlap_lse_backward", rows.cos(), [pm, pc, qm, qc, qw], rows, [True, False, True, True, True])
        own, terms = add("full_self_overlap_forward", qm, qc, qw)
        add("full_self_overlap_backward", own.cos(), [qm, qc, qw], [own, terms], [True, True, False])
        pairs = add("full_pairwise_forward", pm, pc, qm, qc)
        add("full_pairwise_backward", pairs.cos(), [pm, pc, qm, qc], [True, True, False, True])
        add("full_assign", pm, pc, qm, qc, qw)
        add_channels(pm, pc, qm, qc, full=True)

    def add_channels(*pair: Tensor, full: bool) -> None:
        weights = [t.new_zeros(c, t.shape[-2]) for t, c in zip(pair[::2], (2, 3), strict=True)]
        value, _, rows = add("channel_overlap_forward", *pair, *weights, full)
        needs = [True, True, False, True, True, True]
        add("channel_overlap_backward", value.cos(), [*pair, *weights], [value, rows], needs, full)

    for t in samples():
        pm, pv, pw, qm, qv, qw = t
        for needs in ([False] * 5, [True, False, True, True, qw is not None]):
            *rows, _ = add("overlap_lse_forward", pm, pv, qm, qv, qw, needs)
        add("overlap_lse_backward", rows[0].cos(), [pm, pv, qm, qv, qw], rows, needs)
        for needs in ([False] * 3, [True, True, pw is not None]):
            own, _, _ = add("self_overlap_forward", pm, pv, pw, needs)
        add("self_overlap_backward", own.cos(), [pm, pv, pw], own, needs)
        for needs in ([False] * 6, [True, True, pw is not None, True, False, qw is not None]):
            total, _, terms, _ = add("log_overlap_forward", *t, needs)
            value, *saved, _ = add("cs_divergence_forward", *t, needs)
        add("log_overlap_backward", total.cos(), list(t), [total, terms], needs)
        add("cs_divergence_backward", value.cos(), list(t), saved, [True, True, pw is not None, False, True, True])
        pairs = add("pairwise_forward", pm, pv, qm, qv)
        add("pairwise_backward", pairs.cos(), [pm, pv, qm, qv], [True, True, False, True])
        add("assign", pm, pv, qm, qv, qw)
        add_channels(pm, pv, qm, qv, full=False)
        if backend in ("auto", "reference", *backends.FULL):
            add_full(pm, pv.diag_embed(), qm, qv.diag_embed(), q_log_weights=torch.zeros(qm.shape[:-1]))
    return result


def test_every_operator_has_samples() -> None:
    defined = {
        name.removeprefix("csdiv::") for name in torch._C._dispatch_get_all_op_names() if name.startswith("csdiv::")
    }
    assert defined == set(operator_samples("auto"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str) -> None:
    for name, samples in operator_samples(backend).items():
        for arguments in samples:
            results = torch.library.opcheck(getattr(torch.ops.csdiv, name).default, arguments)
            assert set(results.values()) == {"SUCCESS"}, name

"""Every operator of torch.ops.csdiv keeps what torch expects of its schema, its fake and its place below autograd."""

from typing import Any

import pytest
import torch
from entries import BACKENDS, WITH_FULL
from torch import Tensor

from csdiv import backends, ops, testing
from csdiv.operators import OPERATORS, Operator


def side_tensors(names: tuple[str, ...], k: int, batched: bool, full: bool) -> list[Tensor | None]:
    """Tensors of k components; batched ones with a permuted view and uniform weights where these may be left out."""
    p = testing.random_mixture(k, 2, generator=torch.Generator().manual_seed(k))
    given = {"means": p.means, "variances": p.variances, "log_weights": p.log_weights}
    given["log_variances"] = p.variances.log()
    if batched:
        given = {name: t.expand(2, *t.shape).contiguous() for name, t in given.items()}
        given["means"] = given["means"].mT.contiguous().mT
    if full:
        given = {name: t.double() for name, t in given.items()}
        given["covariances"] = given["factors"] = given["variances"].diag_embed()
    return [given[name] for name in names]


def operator_tensors(operator: Operator, batched: bool) -> list[Tensor | None]:
    sizes, batch = {"1": 1, "N": 3, "M": 4, "D": 2}, (2,) * batched
    tensors = [
        t for names, k in ((operator.p, 3), (operator.q, 4)) for t in side_tensors(names, k, batched, operator.full)
    ]
    for other in operator.others:
        tensors.append(torch.rand((*batch, *(sizes[letter] for letter in other.sizes)), dtype=other.dtype))
    for k, name in enumerate(operator.names):
        if name.endswith("log_weights") and operator.channels:
            tensors[k] = torch.stack([tensors[k], 2.0 * tensors[k]], -2)
        elif name == "p_log_weights" and batched and not operator.full:
            tensors[k] = None
    return tensors


def lacking(backend: str) -> frozenset[str]:
    return backends.resolve(backend, torch.device("cpu")).lacks


def operator_samples(backend: str) -> dict[str, list[tuple[Any, ...]]]:
    """Arguments for each operator of csdiv."""
    result: dict[str, list[tuple[Any, ...]]] = {}

    def call(name: str, operator: Any, *arguments: Any) -> Any:
        result.setdefault(name, []).append((*arguments, backend))
        return operator(*arguments, backend)

    for name, operator in OPERATORS.items():
        if (operator.full and backend not in ("auto", *WITH_FULL)) or name in lacking(backend):
            continue
        for batched in (False, True):
            tensors = operator_tensors(operator, batched)
            if name in ops.ASSIGN:
                call(name, ops.ASSIGN[name], *tensors)
                continue
            nothing = [False] * len(tensors)
            needs = [t is not None and k != 2 for k, t in enumerate(tensors)]
            rows = operator.at_once == "rows" and backend in ("auto", "cpu", "reference")
            if operator.at_once == "nothing":
                found = call(f"{name}_forward", ops.FORWARD[name], *tensors)
                outputs = [found] if isinstance(found, Tensor) else found
            else:
                for wanted in (nothing, needs) if operator.at_once == "scalars" or rows else (nothing,):
                    *outputs, _ = call(f"{name}_forward", ops.FORWARD[name], *tensors, wanted)
            saved = [outputs[k] for k in operator.saved]
            call(f"{name}_backward", ops.BACKWARD[name], outputs[0].cos(), saved, tensors, needs)
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

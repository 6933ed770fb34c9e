"""One side of ``python -m bench ab``: times calls of the csdiv of its interpreter, as the other process asks for them.

It stands alone, so that a checkout whose bench knows nothing of it can be measured: torch and csdiv's public functions.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import csdiv
from csdiv import GaussianMixture


def mixture(means: Tensor, variances: Tensor, log_weights: Tensor | None = None) -> GaussianMixture:
    return GaussianMixture(means, variances, log_weights=log_weights)


ENTRIES: dict[str, Callable[..., Any]] = {
    "rows": lambda mu, s, *q: csdiv.component_log_overlap(mixture(mu, s), mixture(*q)),
    "self": lambda *q: csdiv.log_overlap(mixture(*q)),
    "divergence": lambda mu, s, *q: csdiv.cs_divergence(mixture(mu, s), mixture(*q)),
    "regularizer": lambda mu, log_s, *q: csdiv.cs_regularizer(mu, log_s, mixture(*q)),
    "log_prob": lambda x, *q: mixture(*q).log_prob(x),
    "pointwise": lambda x, *q: mixture(*q).pointwise_log_prob(x),
    "mixture": lambda mu, s, *q: mixture(*q),
}
"""The calls by the name of a case's entry, on its inputs."""


def prepare(entry: str, backward: bool, inputs: list[Tensor]) -> Callable[[], object]:
    """The call that is timed; what it needs gradients of is made once."""
    function = ENTRIES[entry]
    if not backward:
        return lambda: function(*inputs)
    leaves = [t.requires_grad_() for t in inputs]
    return lambda: torch.autograd.grad(function(*leaves).sum(), leaves)


def microseconds(call: Callable[[], object], repeat: int) -> float:
    """Time of a call, averaged over a block of them; one before it, not timed, brings back what the caches lost."""
    call()
    start = time.perf_counter()
    for _ in range(repeat):
        call()
    return 1e6 * (time.perf_counter() - start) / repeat


def serve() -> None:
    """A line of JSON for each line of JSON: first what is measured here, then times."""
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no reply
    print(json.dumps({"csdiv": csdiv.__file__, "threads": torch.get_num_threads()}), file=replies)
    gc.disable()
    call: Callable[[], object] = list
    for line in sys.stdin:
        request = json.loads(line)
        if "entry" in request:
            gc.collect()
            call = prepare(request["entry"], request["backward"], torch.load(request["inputs"]))
            microseconds(call, 3)
        print(json.dumps(microseconds(call, request["repeat"])), file=replies)


if __name__ == "__main__":
    if sys.argv[1:]:
        torch.set_num_threads(int(sys.argv[1]))
    serve()

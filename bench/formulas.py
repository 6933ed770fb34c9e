"""The entries that are measured: as people write them, in eager torch, and with csdiv.

Each takes the tensors of :func:`bench.cases.make_inputs` and returns the values whose sum is differentiated.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import csdiv
from csdiv import GaussianMixture, testing

LOG_2PI, LOG_4PI = math.log(2.0 * math.pi), math.log(4.0 * math.pi)
Formula = Callable[..., Tensor]


def pairs(mu: Tensor, s: Tensor, nu: Tensor, t: Tensor) -> Tensor:
    """log N(μ_i; ν_j, S_i + T_j), (*batch, N, M); (N, M, D) temporaries. Factors for variances: (N, M, D, D) ones."""
    if is_full(mu, s):
        return full_pairs(mu, s, nu, t)
    c = s[..., :, None, :] + t[..., None, :, :]
    delta = mu[..., :, None, :] - nu[..., None, :, :]
    return -0.5 * (delta * delta / c + c.log() + LOG_2PI).sum(-1)


def is_full(means: Tensor, spreads: Tensor) -> bool:
    """Whether ``spreads`` are the factors of full covariances, not variances."""
    return spreads.ndim > means.ndim


def full_pairs(mu: Tensor, r: Tensor, nu: Tensor, t: Tensor) -> Tensor:
    """:func:`pairs` of covariances R Rᵀ and T Tᵀ, both lower triangular, by torch.linalg on all sums."""
    r, t = r.tril(), t.tril()  # so that gradients are
    c = (r @ r.mT)[..., :, None, :, :] + (t @ t.mT)[..., None, :, :, :]
    delta = mu[..., :, None, :] - nu[..., None, :, :]
    factor = torch.linalg.cholesky(c)
    z = torch.linalg.solve_triangular(factor, delta[..., None], upper=False)[..., 0]
    return -0.5 * (z * z + LOG_2PI).sum(-1) - factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def rows(mu: Tensor, s: Tensor, nu: Tensor, t: Tensor, log_b: Tensor) -> Tensor:
    """ℓ_i = log Σ_j b_j N(μ_i; ν_j, S_i + T_j), (*batch, N)."""
    return torch.logsumexp(log_b[..., None, :] + pairs(mu, s, nu, t), -1)


def self_overlap(nu: Tensor, t: Tensor, log_b: Tensor, rows: Formula = rows) -> Tensor:
    """log V(q, q), (*batch,)."""
    return torch.logsumexp(log_b + rows(nu, t, nu, t, log_b), -1)


def divergence(mu: Tensor, s: Tensor, nu: Tensor, t: Tensor, log_b: Tensor, rows: Formula = rows) -> Tensor:
    """D_CS(p, q) with uniform weights of p, (*batch,)."""
    log_a = mu.new_full(mu.shape[:-1], -math.log(mu.shape[-2]))
    cross = torch.logsumexp(log_a + rows(mu, s, nu, t, log_b), -1)
    return -cross + 0.5 * self_overlap(mu, s, log_a, rows) + 0.5 * self_overlap(nu, t, log_b, rows)


def regularizer(mu: Tensor, log_s: Tensor, nu: Tensor, t: Tensor, log_b: Tensor, rows: Formula = rows) -> Tensor:
    """D_CS of each N(μ_i, S_i) from q, (N,); takes log S, which encoders return."""
    own = -0.5 * (log_s + LOG_4PI).sum(-1)
    return -rows(mu, log_s.exp(), nu, t, log_b) + 0.5 * own + 0.5 * self_overlap(nu, t, log_b, rows)


def log_prob(x: Tensor, nu: Tensor, t: Tensor, log_b: Tensor, rows: Formula = rows) -> Tensor:
    """log q(x_i), (N,)."""
    return rows(x, x.new_zeros(1, 1), nu, t, log_b)


def pointwise(x: Tensor, nu: Tensor, t: Tensor, log_b: Tensor) -> Tensor:
    """log q_k(x_k) of each mixture q_k of the batch at its own point, (batch,); takes factors of full covariances."""
    delta = x[:, None] - nu
    if not is_full(nu, t):
        return torch.logsumexp(log_b - 0.5 * (delta * delta / t + t.log() + LOG_2PI).sum(-1), -1)
    factor = t.tril()  # so that gradients are
    z = torch.linalg.solve_triangular(factor, delta[..., None], upper=False)[..., 0]
    log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return torch.logsumexp(log_b - 0.5 * (z * z + LOG_2PI).sum(-1) - log_det, -1)


def rows_in_chunks(size: int) -> Formula:
    """:func:`rows` of ``size`` rows at a time, computed again in the backward pass: temporaries stay small."""

    def chunked(mu: Tensor, s: Tensor, *q: Tensor) -> Tensor:
        parts = []
        for i in range(0, mu.shape[-2], size):
            axis = mu.ndim - 2
            length = min(size, mu.shape[axis] - i)
            some = mu.narrow(axis, i, length), s if s.shape[axis] == 1 else s.narrow(axis, i, length)
            parts.append(checkpoint(rows, *some, *q, use_reentrant=False))
        return torch.cat(parts, -1)

    return chunked


FORMULAS: dict[str, Formula] = {
    "rows": lambda *x, rows=rows: rows(*x),
    "self": self_overlap,
    "divergence": divergence,
    "regularizer": regularizer,
    "log_prob": log_prob,
    "pointwise": pointwise,
}


def with_csdiv(entry: str, backend: str) -> Formula:
    """The entry as a call of csdiv."""

    def mixture(means: Tensor, spreads: Tensor, *log_weights: Tensor) -> GaussianMixture:
        if is_full(means, spreads):
            return testing.mixture_of(means, None, *log_weights, scale_tril=spreads)
        return testing.mixture_of(means, spreads, *log_weights)

    def sides(mu: Tensor, s: Tensor, *q: Tensor) -> tuple[GaussianMixture, GaussianMixture]:
        return mixture(mu, s), mixture(*q)

    entries: dict[str, Formula] = {
        "rows": lambda *x: csdiv.component_log_overlap(*sides(*x), backend=backend),
        "self": lambda *q: csdiv.log_overlap(mixture(*q), backend=backend),
        "divergence": lambda *x: csdiv.cs_divergence(*sides(*x), backend=backend),
        "regularizer": lambda mu, log_s, *q: csdiv.cs_regularizer(mu, log_s, mixture(*q), backend=backend),
        "log_prob": lambda x, *q: mixture(*q).log_prob(x, backend=backend),
        "pointwise": lambda x, *q: mixture(*q).pointwise_log_prob(x, backend=backend),
    }
    return entries[entry]

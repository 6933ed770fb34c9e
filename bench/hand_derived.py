"""Values and gradients derived by hand, in torch: what an expert writes who writes no kernel.

Each function takes the tensors of :func:`bench.cases.make_inputs`, with variances (N, D) unless it says otherwise, and
returns the values of :mod:`bench.formulas` and the gradients of their sum. They are put together from ``stages``, which
:mod:`bench.peers` compiles one by one, so that no stage stores an (N, M, D) array, or all in one graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .formulas import LOG_2PI, LOG_4PI, is_full, pairs

Gradients = tuple[Tensor, list[Tensor]]


def row_weights(mu: Tensor, s: Tensor, nu: Tensor, t: Tensor, log_b: Tensor) -> tuple[Tensor, Tensor]:
    """ℓ_i and the shares of the columns in it, (*batch, N) and (*batch, N, M)."""
    logits = log_b[..., None, :] + pairs(mu, s, nu, t)
    lse = torch.logsumexp(logits, -1)
    return lse, (logits - lse[..., None]).exp()


def pair_gradients(weights: Tensor, mu: Tensor, s: Tensor, nu: Tensor, t: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Weighted sums over ``dim`` of the derivatives of log N(μ_i; ν_j, S_i + T_j) to ν_j and to S_i, which is T_j's."""
    precisions = 1.0 / (s[..., :, None, :] + t[..., None, :, :])
    u = (mu[..., :, None, :] - nu[..., None, :, :]) * precisions
    return (weights[..., None] * u).sum(dim), 0.5 * (weights[..., None] * (u * u - precisions)).sum(dim)


class Stages(NamedTuple):
    """The two functions of pairs, plain or compiled."""

    weights: Callable[..., tuple[Tensor, Tensor]] = row_weights
    gradients: Callable[..., tuple[Tensor, Tensor]] = pair_gradients


ROWS, COLUMNS = -3, -2  # what gradients to columns are summed over, and those to rows


def rows(stages: Stages, mu: Tensor, s: Tensor, nu: Tensor, t: Tensor, log_b: Tensor) -> Gradients:
    lse, r = stages.weights(mu, s, nu, t, log_b)
    grad_mu, grad_s = stages.gradients(r, mu, s, nu, t, COLUMNS)
    grad_nu, grad_t = stages.gradients(r, mu, s, nu, t, ROWS)
    return lse, [-grad_mu, grad_s, grad_nu, grad_t, r.sum(-2)]


def spherical_rows(stages: Stages, mu: Tensor, s: Tensor, nu: Tensor, t: Tensor, log_b: Tensor) -> Gradients:
    """:func:`rows` of variances (N, 1) and (M, 1): distances and gradients by products of matrices."""
    precisions = 1.0 / (s + t.mT)
    squares = (mu * mu).sum(-1, keepdim=True) + (nu * nu).sum(-1) - 2.0 * (mu @ nu.mT)
    dim = mu.shape[-1]
    logits = log_b - 0.5 * (squares * precisions - dim * (precisions.log() - LOG_2PI))
    lse = torch.logsumexp(logits, -1)
    r = (logits - lse[:, None]).exp()
    weights = r * precisions
    grad_variances = 0.5 * weights * (squares * precisions - dim)
    grad_mu = weights @ nu - mu * weights.sum(1, keepdim=True)
    grad_nu = weights.mT @ mu - nu * weights.sum(0)[:, None]
    return lse, [grad_mu, grad_variances.sum(1)[:, None], grad_nu, grad_variances.sum(0)[:, None], r.sum(0)]


def tied_rows(stages: Stages, mu: Tensor, s: Tensor, nu: Tensor, t: Tensor, log_b: Tensor) -> Gradients:
    """:func:`rows` of variances (1, D) and (1, D), likewise."""
    precisions = 1.0 / (s + t)
    scaled = nu * precisions
    constant = log_b - 0.5 * ((nu * scaled).sum(-1) - (precisions.log() - LOG_2PI).sum())
    logits = constant - 0.5 * (mu * mu * precisions).sum(-1, keepdim=True) + mu @ scaled.mT
    lse = torch.logsumexp(logits, -1)
    r = (logits - lse[:, None]).exp()
    total, mean = r.sum(0), r @ nu  # rows of r sum to one
    squares = (mu * (mu - 2.0 * mean)).sum(0) + (nu * nu * total[:, None]).sum(0)
    grad_variances = 0.5 * precisions * (squares * precisions - len(mu))
    grad_nu = precisions * (r.mT @ mu - nu * total[:, None])
    return lse, [precisions * (mean - mu), grad_variances, grad_nu, grad_variances, total]


def self_overlap(stages: Stages, nu: Tensor, t: Tensor, log_b: Tensor) -> Gradients:
    """Gradients to rows and to columns are the same."""
    lse, r = stages.weights(nu, t, nu, t, log_b)
    value = torch.logsumexp(log_b + lse, -1)
    shares = (log_b + lse - value[..., None]).exp()
    weights = 2.0 * shares[..., None] * r
    grad_nu, grad_t = stages.gradients(weights, nu, t, nu, t, COLUMNS)
    return value, [-grad_nu, grad_t, 2.0 * shares]


def divergence(stages: Stages, mu: Tensor, s: Tensor, nu: Tensor, t: Tensor, log_b: Tensor) -> Gradients:
    log_a = mu.new_full(mu.shape[:-1], -math.log(mu.shape[-2]))
    lse, r = stages.weights(mu, s, nu, t, log_b)
    cross = torch.logsumexp(log_a + lse, -1)
    weights = (log_a + lse - cross[..., None]).exp()[..., None] * r
    grad_mu, grad_s = stages.gradients(weights, mu, s, nu, t, COLUMNS)
    grad_nu, grad_t = stages.gradients(weights, mu, s, nu, t, ROWS)
    own, (own_mu, own_s, _) = self_overlap(stages, mu, s, log_a)
    prior, (prior_nu, prior_t, prior_b) = self_overlap(stages, nu, t, log_b)
    gradients = [
        0.5 * own_mu + grad_mu,
        0.5 * own_s - grad_s,
        0.5 * prior_nu - grad_nu,
        0.5 * prior_t - grad_t,
        0.5 * prior_b - weights.sum(-2),
    ]
    return -cross + 0.5 * own + 0.5 * prior, gradients


def regularizer(stages: Stages, mu: Tensor, log_s: Tensor, nu: Tensor, t: Tensor, log_b: Tensor) -> Gradients:
    s = log_s.exp()
    cross, (cross_mu, cross_s, cross_nu, cross_t, cross_b) = rows(stages, mu, s, nu, t, log_b)
    prior, (prior_nu, prior_t, prior_b) = self_overlap(stages, nu, t, log_b)
    half = 0.5 * len(mu)  # each row has the prior's self term
    own = -0.5 * (log_s + LOG_4PI).sum(-1)
    gradients = [
        -cross_mu,
        -0.25 - cross_s * s,
        half * prior_nu - cross_nu,
        half * prior_t - cross_t,
        half * prior_b - cross_b,
    ]
    return -cross + 0.5 * own + 0.5 * prior, gradients


def log_prob(stages: Stages, x: Tensor, nu: Tensor, t: Tensor, log_b: Tensor) -> Gradients:
    """By products of matrices, which distances divided by T_j alone allow: no array has three axes."""
    w = 1.0 / t
    constant = log_b - 0.5 * (nu * nu * w + t.log() + LOG_2PI).sum(-1)
    logits = constant + x @ (nu * w).mT - 0.5 * (x * x) @ w.mT
    lse = torch.logsumexp(logits, -1)
    r = (logits - lse[:, None]).exp()
    total = r.sum(0)
    first, second = r.mT @ x, r.mT @ (x * x)
    squares = second - 2.0 * nu * first + nu * nu * total[:, None]
    grad_nu = w * (first - nu * total[:, None])
    grad_t = 0.5 * w * (squares * w - total[:, None])
    return lse, [r @ (nu * w) - x * (r @ w), grad_nu, grad_t, total]


def pointwise(stages: Stages, x: Tensor, nu: Tensor, t: Tensor, log_b: Tensor) -> Gradients:
    delta = x[:, None] - nu
    if is_full(nu, t):
        z = torch.linalg.solve_triangular(t, delta[..., None], upper=False)
        y = torch.linalg.solve_triangular(t.mT, z, upper=True)[..., 0]
        z = z[..., 0]
        diagonal = t.diagonal(dim1=-2, dim2=-1)
        logits = log_b - 0.5 * (z * z + LOG_2PI).sum(-1) - diagonal.log().sum(-1)
    else:
        y = delta / t
        logits = log_b - 0.5 * (delta * y + t.log() + LOG_2PI).sum(-1)
    lse = torch.logsumexp(logits, -1)
    r = (logits - lse[:, None]).exp()
    grad_nu = r[..., None] * y
    if is_full(nu, t):
        grad_t = (
            r[..., None, None] * (y[..., :, None] * z[..., None, :]).tril() - (r[..., None] / diagonal).diag_embed()
        )
    else:
        grad_t = 0.5 * r[..., None] * (y * y - 1.0 / t)
    return lse, [-grad_nu.sum(-2), grad_nu, grad_t, r]


VALUES_AND_GRADIENTS: dict[str, Callable[..., Gradients]] = {
    "rows": rows,
    "rows spherical": spherical_rows,
    "rows tied": tied_rows,
    "self": self_overlap,
    "divergence": divergence,
    "regularizer": regularizer,
    "log_prob": log_prob,
    "pointwise": pointwise,
}
STAGED = {rows, self_overlap, divergence, regularizer}
"""Those that use their stages."""


def of(entry: str, structure: str) -> Callable[..., Gradients]:
    """The function of an entry for covariances of this structure."""
    return VALUES_AND_GRADIENTS[entry if structure == "diagonal" or entry == "pointwise" else f"{entry} {structure}"]

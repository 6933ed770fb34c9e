"""Full covariances on their way to an operator: triangular factors, and coordinates in which one is the identity.

All is float64. What a user gives as a factor is not multiplied out where one factor is needed alone, or two have one
sum: a product has half the digits.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from csdiv import reference
from csdiv.reference import Components
from csdiv.shapes import broadcast
from csdiv.transforms import full_like_device, has_values, transforms_active

if TYPE_CHECKING:
    from csdiv.mixture import GaussianMixture

FAR = 2.0**16
"""Standard deviations from the centre up to which whitened means are used: differences of them err by 2⁻³⁶ at most."""
SAMPLE = 512
"""Components that a centre is the median of."""


def lower_factor(p: GaussianMixture) -> Tensor:
    """L with S = L Lᵀ, lower triangular, (*batch, K or 1, D, D); NaN where a covariance is not positive definite."""
    if p.scale_tril is not None:
        return _lower(p.scale_tril)
    if p.factor is not None:
        return triangular(p.factor)
    return cholesky(reference.matrices(components(p)))


def sum_factor(p: GaussianMixture, q: GaussianMixture) -> Tensor:
    """L with S + T = L Lᵀ for sides of which one has one covariance, (*batch, K or 1, D, D).

    Above the diagonal there may be anything, which has no gradient.
    """
    if is_points(p) or is_points(q):
        side = q if is_points(p) else p
        return lower_factor(side) if side.scale_tril is None else side.scale_tril
    if p is q and p.covariance_matrix is None:
        return math.sqrt(2.0) * lower_factor(p)
    if (has_factor(p) and not _has_edge(q)) or (has_factor(q) and not _has_edge(p)):
        given = [_roots(side) if side.matrices is None else lower_factor(side) for side in (p, q)]
        shape = broadcast(*(t.shape for t in given))
        return triangular(torch.cat([t.expand(shape) for t in given], -1))
    return cholesky(reference.matrices(components(p)) + reference.matrices(components(q)))


def _has_edge(p: GaussianMixture) -> bool:
    """Whether p has variances of zero that want a gradient, which their square roots do not have."""
    if p.variances is None or not (p.variances.requires_grad or transforms_active()):
        return False
    return not (p.device.type == "cpu" and has_values(p.variances) and bool((p.variances > 0.0).all()))


def _roots(p: GaussianMixture) -> Tensor:
    """The diagonal factor of variances."""
    assert p.variances is not None
    roots = reference.nan_if_negative(p.variances).sqrt()
    return torch.diag_embed(roots.expand(*roots.shape[:-1], p.dim))


def _lower(matrices: Tensor) -> Tensor:
    """The lower triangles; torch.tril takes several times as long on CPUs."""
    mask = torch.ones(matrices.shape[-2:], dtype=torch.bool, device=matrices.device).tril()
    return torch.where(mask, matrices, 0.0)


def triangular(factor: Tensor) -> Tensor:
    """L with R Rᵀ = L Lᵀ for R (..., D, n), n ≥ D, by a QR decomposition of Rᵀ; its diagonal is positive."""
    upper = torch.linalg.qr(factor.mT).R
    signs = torch.where(upper.diagonal(dim1=-2, dim2=-1) < 0.0, -1.0, 1.0)
    return (upper * signs.unsqueeze(-1)).mT


def cholesky(covariances: Tensor) -> Tensor:
    """The Cholesky factor, NaN where a covariance is not positive definite."""
    factor, info = torch.linalg.cholesky_ex(covariances)
    return torch.where((info == 0)[..., None, None], factor, math.nan)


def is_points(p: GaussianMixture) -> bool:
    """Whether p has points, made as such or with variances of zero, as far as these may decide: not if they want a
    gradient."""
    if p.structure == "points" or p.variances is None or p.variances.requires_grad:
        return p.structure == "points"
    return p.device.type == "cpu" and has_values(p.variances) and not bool(p.variances.any())


def has_factor(p: GaussianMixture) -> bool:
    """Whether the covariances of p were given by factors."""
    return p.scale_tril is not None or p.factor is not None


def components(p: GaussianMixture) -> Components:
    """p as the reference takes it, factors multiplied out."""
    covariances = p.covariance_matrix
    factor = p.factor if p.scale_tril is None else _lower(p.scale_tril)
    if factor is not None:
        with torch.autocast(p.device.type, enabled=False):
            covariances = factor @ factor.mT
    return Components(p.means, p.variances, covariances, p.log_weights)


def without_absent(p: GaussianMixture) -> GaussianMixture:
    """p with N(0, I) for its components of weight zero, so that their parameters take no part in what is to come.

    A covariance that components share is the identity where all of them have weight zero.
    """
    if p.log_weights is None:
        return p
    absent = p.log_weights == -math.inf
    if p.device.type == "cpu" and has_values(absent) and not bool(absent.any()):
        return p
    values = {name: getattr(p, name) for name in ("means", "weights", "log_weights")}
    values["means"] = torch.where(absent.unsqueeze(-1), 0.0, p.means)
    if has_one_covariance(p):
        absent = absent.all(-1, keepdim=True)
    if p.variances is not None:
        return p._unchecked(**values, variances=torch.where(absent.unsqueeze(-1), 1.0, p.variances))
    eye = torch.eye(p.dim, dtype=p.dtype, device=p.device)
    spreads = {name: t for name in ("scale_tril", "factor", "covariance_matrix") if (t := getattr(p, name)) is not None}
    return p._unchecked(**values, **{n: torch.where(absent[..., None, None], eye, t) for n, t in spreads.items()})


def matrices(p: GaussianMixture) -> Components:
    """p with covariance matrices and given log weights, as the operators for full covariances take them."""
    wide = components(p)
    return Components(wide.means, None, reference.matrices(wide), reference.log_weights(wide))


def log_weights(p: GaussianMixture) -> Tensor:
    """(*batch, K), −log K each if none were given."""
    return reference.log_weights(Components(p.means, log_weights=p.log_weights))


def factored(p: GaussianMixture, q: GaussianMixture) -> tuple[Components, Components]:
    """The rows of p, which have one covariance, as points; q with a factor of each sum S + T_j."""
    rows = Components(p.means, log_weights=p.log_weights)
    return rows, Components(q.means, None, None, log_weights(q), sum_factor(p, q))


def has_one_covariance(p: GaussianMixture) -> bool:
    """Whether all components have the same, as points have."""
    if p.variances is not None:
        return p.variances.shape[-2] == 1 or is_points(p)
    assert p.matrices is not None
    return p.matrices.shape[-3] == 1


def can_be_whitened(p: GaussianMixture, q: GaussianMixture) -> bool:
    """Not if a side has several covariances, or if a batch of them shares means, which would be copied for each."""
    return has_one_covariance(p) and has_one_covariance(q) and shares_no_means(p, q, p) and shares_no_means(p, q, q)


def shares_no_means(p: GaussianMixture, q: GaussianMixture, side: GaussianMixture) -> bool:
    """Whether the means of ``side`` have all batch dimensions that the covariances of p and q have."""
    spreads = [(p.variances, p.matrices), (q.variances, q.matrices)]
    items = [t.shape[:-event] for both in spreads for t, event in zip(both, (2, 3), strict=True) if t is not None]
    own = side.means.shape[:-2]
    return not any(items) or broadcast(own, *items) == own


def whitened(p: GaussianMixture, q: GaussianMixture) -> tuple[Components, Components, Tensor] | None:
    """Both sides, each of one covariance, in coordinates where S + T = L Lᵀ is the identity.

    Equation (18): means become L⁻¹ (μ − centre), variances ½. The third result is log |L|, (*batch,). None where a
    component that counts is further from the centre than ``FAR``, as far as values may decide.
    """
    factor = sum_factor(p, q).squeeze(-3)
    log_det = factor.diagonal(dim1=-2, dim2=-1).abs().log().sum(-1)
    centre = _centre(p, q)
    white, far = _whiten(p, factor, centre)
    other, other_far = (white, far) if p is q else _whiten(q, factor, centre)
    if p.device.type == "cpu" and has_values(p.means) and bool(far | other_far):
        return None
    return white, other, log_det


def _whiten(side: GaussianMixture, factor: Tensor, centre: Tensor) -> tuple[Components, Tensor]:
    """``side`` in the coordinates, and whether any component that counts is far from the centre."""
    # A mean that is not finite stays so, and stays out of L's gradient.
    finite = side.means.isfinite().all(-1, keepdim=True)
    centred = torch.where(finite, side.means - centre, 0.0)
    white = torch.linalg.solve_triangular(factor, centred.mT, upper=False).mT
    far = ((white.detach().abs() > FAR).any(-1, keepdim=True) & _counts(side)).any()
    means = torch.where(finite, white, side.means)
    return Components(means, full_like_device(means, (1, 1), 0.5), None, log_weights(side)), far


def _counts(p: GaussianMixture) -> Tensor:
    """Which components have a weight in any mixture of the batch that has their means, (*batch, K, 1)."""
    if p.log_weights is None:
        return torch.ones(1, 1, dtype=torch.bool, device=p.means.device)
    return reference.somewhere(p.log_weights != -math.inf, p.means.shape[:-1]).unsqueeze(-1)


def _centre(p: GaussianMixture, q: GaussianMixture) -> Tensor:
    """The median of components that count, (*batch, 1, D): for each item of the side with fewer, if each of the other's
    items has one; else of all. Neither side is copied for it."""
    few, many = sorted((q, p), key=lambda side: side.means.shape[:-2].numel())
    means, stride = few.means.detach(), -(-few.num_components // SAMPLE)
    if means.numel() == 0:
        return full_like_device(means, (1, few.dim), 0.0)
    means = torch.where(_counts(few) & means.isfinite(), means, math.nan)[..., ::stride, :]
    batch = many.means.shape[:-2]
    if broadcast(means.shape[:-2], batch) != batch:
        means = means.reshape(-1, few.dim)
    return means.nanmedian(-2, keepdim=True).values.nan_to_num(0.0)

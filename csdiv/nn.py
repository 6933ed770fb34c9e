"""Modules: the divergence as a loss, and a mixture with learnable parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from csdiv import functional
from csdiv.mixture import GaussianMixture

_REDUCTIONS = ("none", "mean", "sum")
_COVARIANCES = {
    "diag": (True, True),
    "spherical": (True, False),
    "tied": (False, True),
    "tied_spherical": (False, False),
}


class CSDivergenceLoss(nn.Module):
    """Cauchy–Schwarz divergence as a loss module.

    Args:
        reduction: "none", "mean" (default) or "sum" over the batch dimensions.
        backend: see :mod:`csdiv.functional`.

    Shape:
        p, q: mixtures, modules that return one, or torch distributions, batch shapes broadcast. A batch of single
        Gaussians, ``Independent(Normal(m, s), 1)`` with m (B, D), against one prior gives B values.
        Output: () or, for "none", (*batch,), nats.

    Raises:
        ValueError: an unknown reduction or backend; the rest as :func:`csdiv.cs_divergence`.

    Example:
        >>> loss = CSDivergenceLoss()(GaussianMixture(x, v), prior)
    """

    def __init__(self, reduction: str = "mean", backend: str = "auto") -> None:
        super().__init__()
        if reduction not in _REDUCTIONS:
            raise ValueError(f"reduction: one of {', '.join(map(repr, _REDUCTIONS))} expected, got {reduction!r}")
        functional.backends.check_name(backend)
        self.reduction, self.backend = reduction, backend

    def forward(self, p: functional.MixtureLike, q: functional.MixtureLike) -> Tensor:
        value = functional.cs_divergence(p, q, backend=self.backend)
        if self.reduction == "none":
            return value
        return value.mean() if self.reduction == "mean" else value.sum()

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}, backend={self.backend!r}"


class GaussianMixturePrior(nn.Module):
    """A mixture whose means, log variances and logits are parameters; calling it gives its GaussianMixture.

    Means start as standard normal draws, variances at 1, weights uniform.

    Args:
        num_components: K ≥ 1.
        dim: D ≥ 1.
        covariance: "diag" (K, D), "spherical" (K, 1), "tied" (1, D) or "tied_spherical" (1, 1) variances.

    Attributes:
        means (K, D), log_variances as the covariance says, logits (K,): parameters, float32 by default.

    Raises:
        ValueError: sizes below 1, or an unknown covariance.
    """

    def __init__(self, num_components: int, dim: int, covariance: str = "diag") -> None:
        super().__init__()
        if num_components < 1 or dim < 1:
            raise ValueError(f"num_components and dim of at least 1 expected, got {num_components} and {dim}")
        if covariance not in _COVARIANCES:
            raise ValueError(f"covariance: one of {', '.join(map(repr, _COVARIANCES))} expected, got {covariance!r}")
        self.num_components, self.dim, self.covariance = num_components, dim, covariance
        per_component, per_dimension = _COVARIANCES[covariance]
        shape = (num_components if per_component else 1, dim if per_dimension else 1)
        self.means = nn.Parameter(torch.randn(num_components, dim))
        self.log_variances = nn.Parameter(torch.zeros(shape))
        self.logits = nn.Parameter(torch.zeros(num_components))

    def forward(self) -> GaussianMixture:
        return GaussianMixture(self.means, self.log_variances.exp(), logits=self.logits)

    @torch.no_grad()
    def initialize_(self, means: Tensor, variances: Tensor, weights: Tensor | None = None) -> GaussianMixturePrior:
        """Copies values in, from a clustering of codes for example.

        Args:
            means: (K, D). variances: > 0, broadcastable to the shape of ``log_variances``.
            weights: (K,) > 0, normalised; default uniform.
        """
        self.means.copy_(means)
        self.log_variances.copy_(variances.log().expand_as(self.log_variances))
        self.logits.copy_(torch.zeros_like(self.logits) if weights is None else weights.log().log_softmax(-1))
        return self

    def extra_repr(self) -> str:
        return f"num_components={self.num_components}, dim={self.dim}, covariance={self.covariance!r}"

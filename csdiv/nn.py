"""Modules: the divergence as a loss, a mixture with learnable parameters, and its self term at a lower price.

A module may return or take mixtures and be wrapped by DistributedDataParallel (``find_unused_parameters`` and
``static_graph`` too) or by ``torch.distributed.fsdp.fully_shard``: torch finds a mixture's tensors. A module that is
sharded for itself must not return a mixture of its own parameters, whose memory is freed: return clones, as
:class:`GaussianMixturePrior` does. ``nn.DataParallel`` neither scatters nor gathers mixtures: return tensors from it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from csdiv import functional
from csdiv.checks import computing_dtype
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
        p, q: as :func:`csdiv.cs_divergence` takes them, batch shapes broadcast. A batch of single
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
        dtype = computing_dtype(self.log_variances.dtype)
        # A sharded parameter's memory is freed after this call, and the mixture lives on: its means are a copy.
        return GaussianMixture(self.means.clone(), self.log_variances.to(dtype).exp(), logits=self.logits)

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


class SelfOverlapExpansion:
    """log V(p, p) of a mixture under training: computed every n calls, expanded to first order between.

    log V(θ) ≈ log V(θ₀) + ∇log V(θ₀) · (θ − θ₀), θ the means, log variances, log weights or matrices of p, and θ₀ those
    of the last call that computed it, where value and gradient are exact. Between, a call costs O(K D), not K² pairs.
    A detached value instead leaves the self term out of the prior's gradient, which then points elsewhere.

    Args:
        interval: n ≥ 1; 1 is exact. 10 suits steps that move the prior by less than its standard deviations.

    Call:
        p: one mixture, or a module or distribution that stands for one, without batch dimensions.
        Returns: () nats, with gradients to p's tensors.

    Raises:
        ValueError: an interval below 1, or a batch of mixtures.

    Example:
        >>> self_overlap = csdiv.nn.SelfOverlapExpansion(interval=10)
        >>> for x in batches:
        ...     means, log_variances = encoder(x)
        ...     p = prior()
        ...     own = self_overlap(p)
        ...     regularizer = csdiv.cs_regularizer(means, log_variances, p, prior_self_overlap=own)
        ...     loss = (reconstruction(means, log_variances, x) + regularizer).mean()
        ...     optimizer.zero_grad()
        ...     loss.backward()
        ...     optimizer.step()
    """

    def __init__(self, interval: int) -> None:
        if interval < 1:
            raise ValueError(f"interval: at least 1 expected, got {interval}")
        self.interval, self._uses = interval, 0

    def refresh(self) -> None:
        """The next call computes log V(p, p), whatever the interval; after a checkpoint is loaded, for example."""
        self._uses = 0

    def __call__(self, p: functional.MixtureLike) -> Tensor:
        p = functional.as_mixture(p, "p")
        if self._uses % self.interval == 0:
            self._expand(p)
        self._uses += 1
        moved = zip(self._slopes, _coordinates(p), self._origin, strict=True)
        # Components of weight zero have no slope, and their log weights no difference.
        terms = [(slope * torch.where(slope == 0.0, 0.0, t - origin)).sum() for slope, t, origin in moved]
        return self._value + torch.stack(terms).sum()

    def _expand(self, p: GaussianMixture) -> None:
        if p.batch_shape:
            raise ValueError(f"p: one mixture expected, got a batch {tuple(p.batch_shape)}")
        leaves = p.map(lambda t: t.detach().clone().requires_grad_())
        with torch.enable_grad():
            value = functional.log_overlap(leaves)
        slopes, origin = torch.autograd.grad(value, leaves._tensors(), materialize_grads=True), leaves.detach()
        self._value, self._origin = value.detach(), _coordinates(origin)
        self._slopes = [s * t if t is origin.variances else s for s, t in zip(slopes, origin._tensors(), strict=True)]


def _coordinates(p: GaussianMixture) -> list[Tensor]:
    """The tensors of p, log variances for variances, 0 where one is zero."""
    return [torch.where(t > 0.0, t, 1.0).log() if t is p.variances else t for t in p._tensors()]

"""λ as the multiplier of a constraint on the mean divergence."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from csdiv import GaussianMixture


class ConstraintMultiplier(nn.Module):
    """λ of: minimise the reconstruction subject to mean D_CS ≤ ε, by ascent in log λ.

    log λ ← log λ + rate · min(A / ε − 1, 1),  A ← 0.95 A + 0.05 mean D_CS of the batch,  λ ≤ max_weight

    Until ε is set, the weight stays as it is, and A is what ε can be set to.

    Args:
        weight: λ at the start, > 0.
        target: ε in nats, > 0; None: set later by :meth:`set_target_`.
        rate: of the ascent, per step.
        max_weight: cap of λ. An ε that no encoder reaches drives λ there: see :meth:`at_cap`.
    """

    weight: Tensor
    target: Tensor
    average: Tensor

    def __init__(
        self, weight: float = 2.0, target: float | None = None, *, rate: float = 0.02, max_weight: float = 100.0
    ) -> None:
        super().__init__()
        if not (0 < weight <= max_weight and rate > 0 and (target is None or target > 0)):
            raise ValueError(
                "positive weight, rate and target, and a weight of at most max_weight expected, "
                f"got {weight}, {rate}, {target}, {max_weight}"
            )
        self.rate, self.max_weight = rate, max_weight
        self.register_buffer("weight", torch.tensor(float(weight)))
        self.register_buffer("target", torch.tensor(math.nan if target is None else float(target)))
        self.register_buffer("average", torch.tensor(math.nan))

    @torch.no_grad()
    def update_(self, regularizer: Tensor) -> Tensor:
        """One step of the ascent, after a training step with the D_CS (B,) of its batch. Returns λ."""
        mean = regularizer.mean().to(self.average)
        self.average.copy_(torch.where(self.average.isnan(), mean, torch.lerp(self.average, mean, 0.05)))
        risen = self.weight * (self.rate * (self.average / self.target - 1).clamp(-1, 1)).exp()
        self.weight.copy_(torch.where(self.target.isnan(), self.weight, risen.clamp(max=self.max_weight)))
        return self.weight

    def set_target_(self) -> None:
        """ε becomes the average D_CS reached so far."""
        self.target.copy_(self.average)

    @property
    def at_cap(self) -> bool:
        """Whether λ is at its cap and the constraint still not met: ε is infeasible for this model."""
        return bool((self.weight >= self.max_weight) & (self.average > self.target))


@torch.no_grad()
def least_divergence(prior: GaussianMixture) -> float:
    """The least D_CS that a code can have to a prior of separated components: ½ log of their effective number.

    A code on a component of weight π_k with its variance has D_CS = −log π_k + ½ log Σ_l π_l² for equal self overlaps;
    the mean over codes in proportion to π is at least ½ log K for K equal components.
    """
    if prior.log_weights is None:
        return 0.5 * math.log(prior.num_components)
    weights = prior.log_weights.double().log_softmax(-1)
    return float(-(weights.exp() * weights).nan_to_num(0.0).sum() + 0.5 * (2 * weights).logsumexp(-1))

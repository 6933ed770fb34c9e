"""For 3-D vision: a rigid motion between two point sets without correspondences, from many starts at once.

Points become kernel density estimates, compared by their cosine in L2. The 16 starting rotations are a batch, the fixed
set is shared by it. The bandwidth falls from the size of the cloud to below the spacing of the points, so what has no
counterpart on the other side (a fifth of the points here) does not pull at the end, and half of the starts are dropped
each time.
"""

import math

import torch

import csdiv


def rotation(vectors: torch.Tensor) -> torch.Tensor:
    """Rotation matrices (*, 3, 3) of rotation vectors (*, 3)."""
    zero = torch.zeros_like(vectors[..., 0])
    x, y, z = vectors.unbind(-1)
    rows = [torch.stack(row, -1) for row in ((zero, -z, y), (z, zero, -x), (-y, x, zero))]
    return torch.linalg.matrix_exp(torch.stack(rows, -2))


def register(moving: torch.Tensor, fixed: torch.Tensor, starts: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """The rotation (3, 3) and translation (3,) that move ``moving`` (n, 3) onto ``fixed`` (m, 3)."""
    centre, target = moving.mean(0), fixed.mean(0)
    size = (fixed - target).square().sum(-1).mean().sqrt().item()
    axes = torch.nn.functional.normalize(torch.randn(starts, 3), dim=-1)
    spins, shifts = (math.pi * torch.rand(starts, 1) * axes).to(fixed), fixed.new_zeros(starts, 3)

    for bandwidth in (size * torch.logspace(-0.5, -2.5, 5)).tolist():
        q = csdiv.GaussianMixture.from_samples(fixed, bandwidth)
        leaves = [t.clone().requires_grad_() for t in (spins, shifts)]
        optimizer = torch.optim.LBFGS(leaves, max_iter=30, line_search_fn="strong_wolfe")

        def similarity(leaves=leaves, q=q, bandwidth=bandwidth) -> torch.Tensor:
            points = (moving - centre) @ rotation(leaves[0]).mT + (target + leaves[1]).unsqueeze(-2)
            return csdiv.cosine_similarity(csdiv.GaussianMixture.from_samples(points, bandwidth), q)  # (starts,)

        def closure(optimizer=optimizer, similarity=similarity) -> torch.Tensor:
            optimizer.zero_grad()
            loss = -similarity().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        with torch.no_grad():
            best = similarity().topk(max(1, len(spins) // 2)).indices  # the better half of the starts goes on
            spins, shifts = (t[best] for t in leaves)
    found = rotation(spins.detach()[0])
    return found, target + shifts.detach()[0] - found @ centre


def main() -> float:
    torch.manual_seed(0)
    shape = torch.randn(100, 3, dtype=torch.float64) * torch.tensor([3.0, 2.0, 1.0])
    planted = rotation(torch.tensor([0.5, -1.5, 2.0], dtype=torch.float64))
    shift = torch.tensor([4.0, -2.0, 1.0], dtype=torch.float64)
    fixed = (shape @ planted.mT + shift)[torch.randperm(100)[:80]]  # no order, a fifth missing
    found, translation = register(shape, fixed)
    error = max((found - planted).abs().max().item(), (translation - shift).abs().max().item())
    print(f"largest error of the rotation matrix and the translation {error:.1e}")
    return error


if __name__ == "__main__":
    main()

"""For domain adaptation: features whose distribution is the same in a labelled and an unlabelled domain.

The Cauchy–Schwarz divergence between kernel density estimates of a source and a target batch of features is added to
the classification loss of the source. The target here is the source, two moons, turned by 30 degrees. The bandwidth
follows the spread of the features, so that shrinking them does not help. The divergence knows no labels: with another
seed, or larger angles, it may match the wrong halves of the moons.
"""

import math

import torch
from sklearn.datasets import make_moons
from torch import nn

import csdiv


def domains(n: int, degrees: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Source points and labels, target points and labels (for the score alone)."""
    (x, y), (u, v) = (make_moons(n, noise=0.08, random_state=seed) for seed in (0, 1))
    angle = math.radians(degrees)
    turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    x, u = (torch.tensor(t, dtype=torch.float32) - torch.tensor([0.5, 0.25]) for t in (x, u))
    return x, torch.tensor(y), u @ turn.mT, torch.tensor(v)


def divergence(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """D_CS of two batches of features (n, D)."""
    with torch.no_grad():
        bandwidth = 0.7 * torch.cat([p, q]).std(0).mean().item()
    estimates = (csdiv.GaussianMixture.from_samples(t, bandwidth) for t in (p, q))
    return csdiv.cs_divergence(*estimates)


def train(weight: float, steps: int = 400) -> float:
    """Accuracy on the target after training with ``weight`` times the divergence."""
    torch.manual_seed(0)
    x, y, u, v = domains(600, 30.0)
    features = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    head = nn.Linear(4, 2)
    optimizer = torch.optim.Adam([*features.parameters(), *head.parameters()], 3e-3)
    for step in range(steps):
        i, j = torch.randint(len(x), (2, 128))
        source, target = features(x[i]), features(u[j])
        loss = nn.functional.cross_entropy(head(source), y[i])
        loss = loss + weight * min(1.0, step / 200) * divergence(source, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return (head(features(u)).argmax(-1) == v).float().mean().item()


def main() -> tuple[float, float]:
    plain, adapted = train(0.0), train(3.0)
    print(f"accuracy on the target {plain:.3f} without adaptation, {adapted:.3f} with it")
    return plain, adapted


if __name__ == "__main__":
    main()

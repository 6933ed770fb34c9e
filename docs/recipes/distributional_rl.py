"""For reinforcement learning: return distributions as Gaussian mixtures, 4096 transitions in one call.

A critic gives 16 components per state; the Bellman target r + γ Z' of a mixture is a mixture, and the loss is the
integrated squared error of the two (the Jensen–Tsallis divergence up to a constant) in closed form, without samples
and without projection to fixed atoms. Both sides are a batch of 4096 problems of 16 by 16 components in one dimension.
"""

import time

import torch
from torch import nn

import csdiv

BATCH, COMPONENTS, STATES = 4096, 16, 4


class Critic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(STATES, 64), nn.Tanh(), nn.Linear(64, 3 * COMPONENTS))
        nn.init.normal_(self.body[-1].bias[:COMPONENTS])  # means that differ

    def forward(self, states: torch.Tensor) -> csdiv.GaussianMixture:
        means, log_variances, logits = self.body(states).chunk(3, -1)
        variances = log_variances.exp() + 1e-2
        return csdiv.GaussianMixture(means.unsqueeze(-1), variances.unsqueeze(-1), logits=logits)  # batch (B,)


def bellman(rewards: torch.Tensor, discount: float, following: csdiv.GaussianMixture) -> csdiv.GaussianMixture:
    """The distribution of r + γ Z', Z' ~ following."""
    means = rewards[:, None, None] + discount * following.means
    return csdiv.GaussianMixture(means, discount**2 * following.variances, log_weights=following.log_weights)


def main() -> tuple[float, float]:
    """The mean loss at the start and after 30 steps."""
    torch.manual_seed(0)
    critic, target = Critic(), Critic()
    optimizer = torch.optim.Adam(critic.parameters(), 1e-2)
    losses, start = [], time.perf_counter()
    for _ in range(30):
        states, following = torch.randn(2, BATCH, STATES)
        rewards = states[:, 0] + 0.1 * torch.randn(BATCH)
        with torch.no_grad():
            goal = bellman(rewards, 0.9, target(following))
        loss = csdiv.ise(critic(states), goal).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    milliseconds = 1e3 * (time.perf_counter() - start) / len(losses)
    print(f"loss {losses[0]:.4f} at first, {losses[-1]:.4f} after {len(losses)} steps of {milliseconds:.1f} ms")
    return losses[0], losses[-1]


if __name__ == "__main__":
    main()

"""For people who train VAEs: a learned Gaussian mixture as prior, in closed form, by changing one line of the loss.

The Kullback–Leibler divergence of the posterior N(m, diag s) from a mixture has no closed form, the Cauchy–Schwarz
divergence has: ``csdiv.cs_regularizer``. λ = 2 weighs it about as an ELBO does. Data are scikit-learn's digits, 8 by 8.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

import csdiv

LATENT, COMPONENTS, WEIGHT, EPOCHS = 8, 20, 1.0, 8


class Autoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 2 * LATENT))
        self.decoder = nn.Sequential(nn.Linear(LATENT, 128), nn.ReLU(), nn.Linear(128, 64))
        self.prior = csdiv.nn.GaussianMixturePrior(COMPONENTS, LATENT)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Reconstruction error and divergence, (B,) nats each."""
        means, log_variances = self.encoder(x).chunk(2, -1)
        z = means + (0.5 * log_variances).exp() * torch.randn_like(means)
        logits = self.decoder(z)
        error = nn.functional.binary_cross_entropy_with_logits(logits, x, reduction="none").sum(-1)
        # was: divergence = -0.5 * (1 + log_variances - means**2 - log_variances.exp()).sum(-1)
        divergence = csdiv.cs_regularizer(means, log_variances, self.prior)
        return error, divergence


def main() -> tuple[float, float]:
    """The mean loss of the first and of the last epoch."""
    torch.manual_seed(0)
    images = torch.tensor(load_digits().data / 16.0, dtype=torch.float32)
    model = Autoencoder()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for epoch in range(EPOCHS):
        total = 0.0
        for batch in images[torch.randperm(len(images))].split(100):
            error, divergence = model(batch)
            loss = (error + WEIGHT * divergence).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(batch)
        losses.append(total / len(images))
        print(f"epoch {epoch}: {losses[-1]:.2f} nats, of which divergence {divergence.mean().item():.2f}")
    with torch.no_grad():
        drawn = model.decoder(model.prior().sample(5)).sigmoid()
        codes = model.prior().assign(model.encoder(images)[:, :LATENT])
    print(f"{len(drawn)} digits drawn; codes fall into {codes.unique().numel()} of {COMPONENTS} components")
    return losses[0], losses[-1]


if __name__ == "__main__":
    main()

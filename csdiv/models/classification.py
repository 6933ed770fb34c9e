"""Semi-supervised learning with a CSRAE whose components belong to classes, and the baselines that it is held to."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from csdiv import GaussianMixture, pairwise_log_overlap
from csdiv.models.autoencoder import CSRAE
from csdiv.models.data import mix_seed
from csdiv.models.initialisation import initialize_from_codes_
from csdiv.models.networks import BernoulliDecoder, perceptron
from csdiv.nn import GaussianMixturePrior

LABELS_PER_COMPONENT = 4
"""So many labelled codes of its class a component has at least, where there are as many."""
SVM_PENALTIES = (1.0, 10.0, 100.0)


def class_logits(means: Tensor, log_variances: Tensor, prior: GaussianMixture, num_classes: int) -> Tensor:
    """Class scores of codes: each class's share of the overlap with the prior.

    logit_y = LSE_{k ∈ y} ( log π_k + log N(m; ν_k, s + t_k) )

    Args:
        means, log_variances: (B, D) of N(m, diag s).
        prior: K components, those of class y at y K/C … (y + 1) K/C − 1.
        num_classes: C, which divides K.

    Returns:
        (B, C), nats up to a constant; with gradients to codes and prior.

    Raises:
        ValueError: K is not a multiple of C.
    """
    if prior.num_components % num_classes:
        raise ValueError(f"as many components for each of {num_classes} classes expected, got {prior.num_components}")
    rows = pairwise_log_overlap(GaussianMixture(means, log_variances.exp()), prior)
    if prior.log_weights is not None:
        rows = rows + prior.log_weights
    return rows.unflatten(-1, (num_classes, -1)).logsumexp(-1)


@torch.no_grad()
def class_prior(
    means: Tensor, variances: Tensor, labels: Tensor, num_classes: int, components_per_class: int, seed: int = 0
) -> GaussianMixturePrior:
    """A prior seeded from labelled codes: k-means of each class's codes, classes in order, of equal weight.

    Args:
        means, variances: (n, D) of the codes. labels: (n,) with every class 0 … C − 1.
        components_per_class: at most; fewer where the smallest class has under LABELS_PER_COMPONENT codes for each.

    Raises:
        ValueError: a class without a code.
    """
    smallest = int(torch.bincount(labels, minlength=num_classes).min())
    if smallest == 0:
        raise ValueError("a labelled sample of each class expected")
    k = max(1, min(components_per_class, smallest // LABELS_PER_COMPONENT))
    parts = []
    for y in range(num_classes):
        part, own = GaussianMixturePrior(k, means.shape[-1]), labels == y
        initialize_from_codes_(part, means[own].cpu(), variances[own].cpu(), seed=seed)
        parts.append(part())
    whole = GaussianMixturePrior(k * num_classes, means.shape[-1])
    weights = torch.cat([p.log_weights if p.log_weights is not None else torch.zeros(k) for p in parts]).exp()
    variances = torch.cat([p.variances for p in parts if p.variances is not None])
    return whole.initialize_(torch.cat([p.means for p in parts]), variances, weights).to(means.device)


def balanced_rows(labels: Tensor, num_labels: int, num_classes: int, draw: int) -> Tensor:
    """Rows of a labelled subset with num_labels / num_classes samples of each class, by the number of the draw.

    Raises:
        ValueError: not a multiple of the number of classes, or too few samples of one.
    """
    each, rest = divmod(num_labels, num_classes)
    if rest or each < 1 or each > int(torch.bincount(labels, minlength=num_classes).min()):
        raise ValueError(f"num_labels: as many for each of {num_classes} classes, and as there are, got {num_labels}")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(mix_seed(draw, num_labels)))
    return torch.cat([order[labels[order] == y][:each] for y in range(num_classes)])


def finetune(
    model: CSRAE,
    x: Tensor,
    labelled_x: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    weight: float,
    components_per_class: int = 5,
    epochs: int = 5,
    batch_size: int = 256,
    labelled_batch_size: int = 100,
    learning_rate: float = 1e-3,
    seed: int = 0,
) -> CSRAE:
    """Trains a CSRAE on with labels: its loss on all samples + γ · cross-entropy of class logits on labelled ones.

    Args:
        model: trained without labels; its networks are trained on in place, its prior is replaced by
            :func:`class_prior`.
        x: (n, P) all training samples. labelled_x: (L, P), labels: (L,) int64.
        weight: γ ≥ 0, of the mean cross-entropy of a labelled batch, nats.
        epochs: passes over x; every step also sees ``labelled_batch_size`` labelled samples drawn at random.
        learning_rate: peak of a one-cycle schedule.

    Returns:
        the new model, in evaluation mode. Bernoulli samples are binarised anew in each step.
    """
    device = x.device
    torch.manual_seed(mix_seed(seed, 17))
    codes = model.encode(labelled_x)
    assert codes.variances is not None
    prior = class_prior(codes.means, codes.variances, labels, num_classes, components_per_class, seed)
    model = CSRAE(model.encoder, model.decoder, prior, float(model.divergence_weight)).to(device).train()
    binary = isinstance(model.decoder, BernoulliDecoder)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    steps = epochs * -(-len(x) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, steps, pct_start=0.1)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), device=device).split(batch_size):
            picked = torch.randint(len(labels), (min(labelled_batch_size, len(labels)),), device=device)
            some, own = x[rows], labelled_x[picked]
            if binary:
                some, own = some.bernoulli(), own.bernoulli()
            means, log_variances = model.encoder(own)
            logits = class_logits(means, log_variances, model.prior_mixture(), num_classes)
            loss = model(some).loss + weight * F.cross_entropy(logits, labels[picked])
            if not loss.isfinite():
                raise ArithmeticError("fine-tuning: the loss is not finite; a smaller learning rate may help")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def predict(model: CSRAE, x: Tensor, num_classes: int) -> Tensor:
    """The class of greatest logit of each sample: (n, P) -> (n,) int64."""
    prior, found = model.prior_mixture(), []
    for chunk in x.split(4096):
        means, log_variances = model.encoder(chunk)
        found.append(class_logits(means, log_variances, prior, num_classes).argmax(-1))
    return torch.cat(found)


def error_percent(found: Tensor, labels: Tensor) -> float:
    """Share of wrong labels, %."""
    return 100.0 * float((found.cpu() != labels.cpu()).double().mean())


def supervised_network(
    x: Tensor, labels: Tensor, num_classes: int, *, hidden_dim: int, dropout: bool, binary: bool, steps: int, seed: int
) -> nn.Module:
    """The encoder's perceptron as a classifier, trained on the labelled samples alone.

    Args:
        dropout: of 0.2 of the inputs and 0.5 of both hidden layers. binary: inputs are drawn anew in each step.
        steps: of Adam at 1e-3, batches of 100.
    """
    torch.manual_seed(mix_seed(seed, 23))
    network = perceptron([x.shape[-1], hidden_dim, hidden_dim, num_classes])
    if dropout:
        layers = list(network)
        network = nn.Sequential(nn.Dropout(0.2), *layers[:2], nn.Dropout(0.5), *layers[2:4], nn.Dropout(0.5), layers[4])
    network = network.to(x.device).train()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for _ in range(steps):
        picked = torch.randint(len(x), (min(100, len(x)),), device=x.device)
        batch = x[picked].bernoulli() if binary else x[picked]
        optimizer.zero_grad()
        F.cross_entropy(network(batch), labels[picked]).backward()
        optimizer.step()
    return network.eval()


def svm_error_percent(
    train: tuple[Tensor, Tensor], validation: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]
) -> float:
    """Test error of a support vector machine with Gaussian kernels, its penalty chosen on the validation set, %.

    Args:
        train, validation, test: features (n, P) and labels (n,).
    """
    from sklearn.svm import SVC

    arrays = [(x.cpu().numpy(), y.cpu().numpy()) for x, y in (train, validation, test)]
    machines = [SVC(C=penalty).fit(*arrays[0]) for penalty in SVM_PENALTIES]
    best = machines[int(np.argmax([machine.score(*arrays[1]) for machine in machines]))]
    return 100.0 * (1.0 - float(best.score(*arrays[2])))

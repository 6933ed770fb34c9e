"""The autoencoders and their scores, against exact values and laws."""

import json
import math
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import csdiv
from csdiv.models import (
    CSRAE,
    VAE,
    BernoulliDecoder,
    Decoder,
    Encoder,
    MixtureVAE,
    VampPriorVAE,
    initialize_from_codes_,
)
from csdiv.models.networks import perceptron

pytest.importorskip("lightning")

from csdiv import testing
from csdiv.models import checkpoint, data, evaluation, modules, training
from csdiv.models.config import TrainConfig

TINY = TrainConfig(
    epochs=3, warmup_epochs=1, num_components=12, latent_dim=3, hidden_dim=16, batch_size=200, num_threads=1
)


def tiny_networks(num_pixels: int, dim: int) -> tuple[Encoder, Decoder]:
    return Encoder(perceptron([num_pixels, 8, 2 * dim]), dim), BernoulliDecoder(perceptron([dim, 8, num_pixels]))


def tiny_csrae(num_pixels: int = 5, dim: int = 2, k: int = 4) -> CSRAE:
    return CSRAE(*tiny_networks(num_pixels, dim), csdiv.nn.GaussianMixturePrior(k, dim), 0.7)


def tiny_data(validation_fraction: float = 0.1) -> data.Dataset:
    digits = data.load_digits(validation_fraction)
    assert digits.train.labels is not None
    return replace(digits, train=data.Split(digits.train.x[:400], digits.train.labels[:400]))


# the modules


def test_csrae_loss_is_reconstruction_plus_weighted_divergence() -> None:
    model, x = tiny_csrae(), torch.rand(7, 5).round()
    out = model(x)
    means, log_variances = model.encoder(x)
    codes = csdiv.GaussianMixture(means.unsqueeze(1), log_variances.exp().unsqueeze(1))  # 7 mixtures of one component
    torch.testing.assert_close(out.regularizer, csdiv.cs_divergence(codes, model.prior()), rtol=1e-4, atol=1e-5)
    probabilities = model.decoder(out.codes)
    likelihood = torch.distributions.Bernoulli(probabilities).log_prob(x).sum(-1)
    torch.testing.assert_close(out.reconstruction, -likelihood)
    torch.testing.assert_close(out.loss, (out.reconstruction + 0.7 * out.regularizer).mean())
    out.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_vae_divergence_is_the_kl_divergence() -> None:
    model = VAE(*tiny_networks(5, 2))
    means, log_variances = torch.randn(2, 6, 2)
    normal = torch.distributions.Normal(means, (0.5 * log_variances).exp())
    expected = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).sum(-1)
    torch.testing.assert_close(model.divergence(means, log_variances), expected)
    prior = torch.distributions.MultivariateNormal(torch.zeros(2), torch.eye(2))
    torch.testing.assert_close(model.prior_mixture().log_prob(means), prior.log_prob(means))


@pytest.mark.parametrize("kind", [MixtureVAE, VampPriorVAE])
def test_monte_carlo_divergence_is_the_kl_divergence(kind: type) -> None:
    x = torch.rand(3, 5).round()
    start = torch.rand(1, 5) if kind is VampPriorVAE else csdiv.nn.GaussianMixturePrior(1, 2)
    model = kind(*tiny_networks(5, 2), start, 0.7)
    prior = model.prior_mixture()
    assert prior.variances is not None
    means, log_variances = model.encoder(x)
    q = torch.distributions.Normal(means, (0.5 * log_variances).exp())
    expected = torch.distributions.kl_divergence(q, torch.distributions.Normal(prior.means, prior.variances.sqrt()))
    draws = torch.stack([model.divergence(means, log_variances) for _ in range(4000)])
    error = draws.std(0) / math.sqrt(len(draws))
    assert ((draws.mean(0) - expected.sum(-1)).abs() < 5 * error).all()
    model(x).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_autoencoder_shapes() -> None:
    model, x = tiny_csrae(), torch.rand(7, 5).round()
    assert model.encode(x).means.shape == (7, 2)
    assert model.reconstruct(x).shape == (7, 5)
    assert model.sample(3).shape == (3, 5)
    assert model.prototypes().shape == (4, 5)
    lines = model.interpolate(x[:3], x[3:6], 9)
    assert lines.shape == (3, 9, 5)
    torch.testing.assert_close(lines[:, 0], model.reconstruct(x[:3]))
    torch.testing.assert_close(lines[:, -1], model.reconstruct(x[3:6]))


VAE_STEP = """
hidden = F.relu(fc1(x))
mu, logvar = fc21(hidden), fc22(hidden)
z = mu + torch.randn_like(mu) * torch.exp(0.5 * logvar)
recon = torch.sigmoid(fc4(F.relu(fc3(z))))
BCE = F.binary_cross_entropy(recon, x, reduction="sum")
KLD = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
loss = BCE + KLD
optimizer.zero_grad()
loss.backward()
optimizer.step()
"""


@pytest.mark.parametrize("line", [None, "KLD = csdiv.cs_regularizer(mu, logvar, prior).sum()"])
def test_vae_step_becomes_csrae_step_by_one_line(line: str | None) -> None:
    """A step as in PyTorch's own VAE example."""
    step = VAE_STEP
    if line is not None:
        step = "\n".join(line if old.startswith("KLD") else old for old in VAE_STEP.splitlines())
        assert sum(a != b for a, b in zip(step.splitlines(), VAE_STEP.splitlines(), strict=True)) == 1
    layers = {"fc1": (9, 16), "fc21": (16, 2), "fc22": (16, 2), "fc3": (2, 16), "fc4": (16, 9)}
    scope = {name: nn.Linear(*sizes) for name, sizes in layers.items()}
    scope["prior"] = prior = csdiv.nn.GaussianMixturePrior(6, 2)
    optimizer = torch.optim.Adam([p for module in scope.values() for p in module.parameters()], lr=1e-2)
    before, x = prior.means.detach().clone(), (torch.rand(1, 9) < 0.5).float().expand(32, 9)
    losses = []
    for _ in range(60):
        names = {"torch": torch, "F": nn.functional, "csdiv": csdiv, "x": x, "optimizer": optimizer, **scope}
        exec(step, names)
        losses.append(names["loss"].item())
    assert losses[-1] < 0.5 * losses[0]
    assert torch.equal(prior.means, before) == (line is None)


# initialisation


def test_initialize_from_codes_keeps_the_codes_moments() -> None:
    """Law of total expectation and variance: the prior's first two moments are those of the mixture of all codes."""
    means, variances = torch.randn(300, 3) * 2 + 1, torch.rand(300, 3)
    prior = csdiv.nn.GaussianMixturePrior(7, 3)
    initialize_from_codes_(prior, means, variances)
    weights = prior.logits.softmax(-1).unsqueeze(-1)
    mean = (weights * prior.means).sum(0)
    second = (weights * (prior.log_variances.exp() + prior.means**2)).sum(0)
    torch.testing.assert_close(mean, means.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(second, (variances + means**2).mean(0), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
def test_initialize_from_codes_of_one_place_is_finite() -> None:
    prior = csdiv.nn.GaussianMixturePrior(4, 2)
    initialize_from_codes_(prior, torch.ones(10, 2), torch.zeros(10, 2), variance_floor=0.01)
    assert all(p.isfinite().all() for p in prior.parameters())
    torch.testing.assert_close(prior.log_variances.exp(), torch.full((4, 2), 0.01))


@pytest.mark.parametrize(
    ("means", "message"), [(torch.zeros(3, 2), "at least 4"), (torch.full((5, 2), math.nan), "finite")]
)
def test_initialize_from_codes_refuses(means: Tensor, message: str) -> None:
    prior = csdiv.nn.GaussianMixturePrior(4, 2)
    before = prior.means.detach().clone()
    with pytest.raises(ValueError, match=message):
        initialize_from_codes_(prior, means, torch.ones_like(means))
    assert torch.equal(prior.means, before)


# likelihood


class LinearGaussian(nn.Module):
    """p(x|z) = N(x; z W, v I), whose marginal under a Gaussian mixture prior is known."""

    def __init__(self, weight: Tensor, variance: float) -> None:
        super().__init__()
        self.weight, self.variance = weight, variance

    def negative_log_likelihood(self, z: Tensor, x: Tensor) -> Tensor:
        return -torch.distributions.Normal(z @ self.weight, self.variance**0.5).log_prob(x).sum(-1)


def test_importance_sampled_nll_of_a_linear_gaussian_model() -> None:
    model = tiny_csrae(num_pixels=3, dim=2, k=3)
    model.decoder = LinearGaussian(torch.randn(2, 3), 0.5)
    prior, x = model.prior().detach(), torch.randn(40, 3)
    covariance = model.decoder.weight.T @ torch.diag_embed(prior.variances) @ model.decoder.weight + 0.5 * torch.eye(3)
    marginal = torch.distributions.MultivariateNormal(prior.means @ model.decoder.weight, covariance)
    exact = -(marginal.log_prob(x.unsqueeze(1)) + prior.normalized().log_weights).logsumexp(-1)
    likelihood = evaluation.importance_sampled_nll(model, x, 4000)
    # One image's standard error is about (ess)^-1/2; five of them, and a floor for the most certain ones.
    error = (likelihood.nll - exact).abs()
    assert (error <= 5.0 * likelihood.effective_sample_size.rsqrt() + 0.01).all()
    assert likelihood.effective_sample_size.median() > 200
    assert error.mean() < 0.1


def test_importance_sampled_likelihoods_of_all_images_add_up_to_one() -> None:
    model = tiny_csrae(num_pixels=5)
    x = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 5)
    nll = evaluation.importance_sampled_nll(model, x, 4000).nll
    assert (-nll).exp().sum().item() == pytest.approx(1.0, abs=0.02)


# clustering


def test_merge_components_by_overlap() -> None:
    means = torch.tensor([[0.0, 0.0], [9.0, 0.0], [0.3, 0.0], [9.0, 0.4], [0.0, 30.0]])
    mixture = csdiv.GaussianMixture(means, torch.ones(5, 2), logits=torch.tensor([0.0, 2.0, -3.0, 0.0, 1.0]))
    assert evaluation.merge_components(mixture, 3).tolist() == [0, 1, 0, 1, 2]
    assert evaluation.merge_components(mixture, 2).tolist() == [0, 0, 0, 0, 1]
    assert evaluation.merge_components(mixture, 5).tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="between 1 and 5"):
        evaluation.merge_components(mixture, 6)


def test_merge_components_compares_groups_by_their_divergence() -> None:
    """The pair that is merged is the one of least D_CS between the groups' mixtures, also after a first merge."""
    mixture = csdiv.GaussianMixture(torch.randn(6, 2), torch.rand(6, 2) + 0.3, logits=torch.randn(6))
    for groups in (6, 5, 4, 3):
        before, after = (evaluation.merge_components(mixture, n) for n in (groups, groups - 1))
        parts = [
            testing.mixture_of(*(t[before == g] for t in (mixture.means, mixture.variances, mixture.log_weights)))
            for g in range(groups)
        ]
        pairs = [(a, b) for a in range(groups) for b in range(a + 1, groups)]
        a, b = min(pairs, key=lambda pair: csdiv.cs_divergence(parts[pair[0]], parts[pair[1]]).item())
        assert after[before == a].unique().tolist() == after[before == b].unique().tolist()


def test_match_clusters() -> None:
    clusters = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2])
    labels = torch.tensor([0, 0, 1, 0, 0, 1, 2, 2])
    # Majority gives class 0 to clusters 0 and 1; one-to-one has to give class 1 to one of them.
    majority = evaluation.match_clusters(clusters, labels, 4, 3, one_to_one=False)
    assert majority.tolist() == [0, 0, 2, -1]
    matched = evaluation.match_clusters(clusters, labels, 3, 3, one_to_one=True)
    assert sorted(matched.tolist()) == [0, 1, 2]
    assert (matched[clusters] == labels).sum() == 5
    with pytest.raises(ValueError, match="as many clusters as classes"):
        evaluation.match_clusters(clusters, labels, 4, 3, one_to_one=True)


def test_cluster_finds_components_that_are_the_classes() -> None:
    """Codes on three far-apart places, each shared by two components and one class."""
    digits = data.load_digits()
    labels = torch.arange(60) % 3
    split = data.Split(nn.functional.one_hot(labels, 3).float(), labels)
    three = replace(digits, sample_shape=(3,), class_names=("a", "b", "c"), train=split, validation=split, test=split)
    model = tiny_csrae(num_pixels=3, dim=3, k=6)
    model.encoder.forward = lambda x: (20.0 * x, torch.zeros_like(x))
    model.prior.initialize_(20.0 * torch.eye(3).repeat(2, 1), torch.ones(1, 1))
    result = evaluation.cluster(model, three, split.x, split.x)
    assert result.effective_components == pytest.approx(3.0)  # of two equal components the first is assigned
    assert [(s.num_clusters, s.matching) for s in result.scores] == [(6, "many-to-one"), (3, "one-to-one")]
    assert all(s.accuracy == s.nmi == s.ari == 1.0 for s in result.scores)


def test_time_divergence_leaves_the_model_alone() -> None:
    model, x = tiny_csrae(), torch.rand(7, 5).round()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    times = evaluation.time_divergence(model, x, num_steps=3)
    assert times.divergence_ms > 0
    assert times.step_ms > 0
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


# training


def test_train_same_seed_same_curve(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        training.train(replace(TINY, output_dir=tmp_path / name, seed=seed), tiny_data())
    a, b, c = ((tmp_path / name / training.METRICS).read_bytes() for name in "abc")
    assert a == b != c
    weights = [(tmp_path / name / checkpoint.WEIGHTS).read_bytes() for name in "ab"]
    assert weights[0] == weights[1]


def test_train_keeps_the_weights_of_the_lowest_validation_loss(tmp_path: Path) -> None:
    digits = tiny_data()
    result = training.train(replace(TINY, output_dir=tmp_path, epochs=6, learning_rate=0.02), digits)
    losses = [r["validation_loss"] for r in result.history if r["stage"] == "csrae"]
    with torch.no_grad():
        found = result.model(data.binarize(digits.validation.x, evaluation.VALIDATION_SEED)).loss.item()
    assert found == pytest.approx(min(losses), rel=0.03)  # the codes' noise differs


def test_train_stops_when_the_loss_is_not_finite(tmp_path: Path) -> None:
    config = replace(TINY, output_dir=tmp_path, learning_rate=1e12)
    with pytest.raises(
        modules.TrainingDiverged, match=r"step \d+ .* the \w+ is not finite; smallest variance of a code"
    ):
        training.train(config, tiny_data())
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]  # no temporary file is left


def test_train_refuses_more_components_than_images(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at most 400"):
        training.train(replace(TINY, output_dir=tmp_path / "run", num_components=401), tiny_data())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("epochs", 0),
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("divergence_weight", math.inf),
        ("warmup_epochs", 3),
        ("validation_fraction", 1.0),
        ("num_threads", -1),
        ("model", "gan"),
        ("epochs", 2.5),
        ("overwrite", True),
        ("tensorboard", 1),
        ("batch_size", True),
    ],
)
def test_train_config_refuses(option: str, value: float) -> None:
    with pytest.raises((ValueError, TypeError), match=option):
        replace(TINY, **{option: value})


# checkpoints


def saved(directory: Path) -> CSRAE:
    torch.manual_seed(3)
    model = checkpoint.build_model(**checkpoint.model_options(TINY, data.load_digits()))
    assert isinstance(model, CSRAE)
    checkpoint.save_config(directory, TINY, data.load_digits())
    checkpoint.save_weights(directory, model)
    return model


def test_checkpoint_round_trip(tmp_path: Path) -> None:
    model = saved(tmp_path)
    loaded = checkpoint.load_model(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    assert loaded.divergence_weight == model.divergence_weight


class Malicious:
    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (Path("unpickled"),)


def test_checkpoint_that_is_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    saved(tmp_path)
    weights, config = tmp_path / checkpoint.WEIGHTS, tmp_path / checkpoint.CONFIG
    good = weights.read_bytes()
    for bad in (good[: len(good) // 2], b"", pickle.dumps(Malicious())):
        weights.write_bytes(bad)
        with pytest.raises(ValueError, match="truncated or not safetensors"):
            checkpoint.load_model(tmp_path)
    assert not (tmp_path / "unpickled").exists()
    state = safetensors.torch.load(good)
    weights.write_bytes(safetensors.torch.save({**state, "prior.means": torch.zeros(2, 3)}))
    with pytest.raises(ValueError, match=r"another model \(prior.means differ\)"):
        checkpoint.load_model(tmp_path)
    for content in ("{", "[]", json.dumps({"model": {"latent_dim": 64}})):
        config.write_text(content)
        with pytest.raises(ValueError, match=r"config\.json: not (JSON|a csdiv configuration)"):
            checkpoint.load_model(tmp_path)
    config.unlink()
    with pytest.raises(FileNotFoundError):
        checkpoint.load_model(tmp_path)

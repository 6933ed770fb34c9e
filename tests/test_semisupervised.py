"""Labels for components: class logits, seeded priors, fine-tuning, and the two studies that are made of them."""

import csv
from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("sklearn")

from csdiv import GaussianMixture
from csdiv.models import CSRAE, VAE, build_networks, classification
from csdiv.models.data import Dataset, load_data
from csdiv.nn import GaussianMixturePrior
from csdiv.studies import faces
from csdiv.studies.config import read_study
from csdiv.studies.run import run_study
from csdiv.studies.semisupervised import CSRAE_ROW, SemisupervisedConfig


def test_class_logits_are_sums_over_a_classs_components() -> None:
    means, log_variances = torch.randn(2, 5, 3, dtype=torch.float64)
    prior = GaussianMixture(torch.randn(6, 3).double(), torch.rand(6, 3).double() + 0.5, logits=torch.randn(6).double())
    found = classification.class_logits(means, log_variances, prior, 2)
    for b in range(5):
        for y in range(2):
            total = 0.0
            for k in range(3 * y, 3 * y + 3):
                scale = (log_variances[b].exp() + prior.variances[k]).sqrt()
                density = torch.distributions.Normal(prior.means[k], scale).log_prob(means[b]).sum().exp()
                total += prior.log_weights[k].exp() * density
            assert found[b, y].item() == pytest.approx(total.log().item(), abs=1e-12)
    with pytest.raises(ValueError, match="as many components for each of 4"):
        classification.class_logits(means, log_variances, prior, 4)


def test_a_seeded_prior_knows_its_classes() -> None:
    labels = torch.arange(3).repeat(8)
    means = 10.0 * torch.nn.functional.one_hot(labels, 3) + 0.1 * torch.randn(24, 3)
    variances = torch.full((24, 3), 0.01)
    prior = classification.class_prior(means, variances, labels, 3, 5)
    assert prior.num_components == 6  # two for a class of eight labelled codes
    logits = classification.class_logits(means, variances.log(), prior(), 3)
    assert torch.equal(logits.argmax(-1), labels)
    torch.testing.assert_close(logits.new_tensor(1.0), prior().log_weights.exp().sum())
    with pytest.raises(ValueError, match="of each class"):
        classification.class_prior(means, variances, labels.clamp(max=1), 3, 5)


def test_labelled_subsets_are_balanced_and_differ() -> None:
    labels = torch.randint(4, (400,))
    rows = classification.balanced_rows(labels, 40, 4, 0)
    assert torch.bincount(labels[rows]).tolist() == [10] * 4
    assert rows.unique().numel() == 40
    assert not torch.equal(rows, classification.balanced_rows(labels, 40, 4, 1))
    for bad in (42, 0, 4000):
        with pytest.raises(ValueError, match="num_labels"):
            classification.balanced_rows(labels, bad, 4, 0)


def test_finetuning_beats_chance_by_far_and_is_reproducible() -> None:
    digits = load_data("digits")
    x, labels = digits.train.x, digits.train.labels
    rows = classification.balanced_rows(labels, 200, 10, 0)

    def train() -> torch.Tensor:
        torch.manual_seed(0)
        networks = build_networks("mlp", "bernoulli", digits.sample_shape, 8, 64)
        model = CSRAE(*networks, GaussianMixturePrior(10, 8))
        warmup = VAE(model.encoder, model.decoder, 0.5)  # codes of random networks seed components that say little
        optimizer = torch.optim.Adam(warmup.parameters(), 3e-3)
        for batch in x[torch.randint(len(x), (600, 64))].bernoulli():
            optimizer.zero_grad()
            warmup(batch).loss.backward()
            optimizer.step()
        model = classification.finetune(model, x, x[rows], labels[rows], 10, weight=100.0, epochs=8, batch_size=64)
        assert model.prior.num_components == 50
        return classification.predict(model, digits.test.x, 10)

    found = train()
    assert classification.error_percent(found, digits.test.labels) < 30.0  # of 90 by chance
    assert torch.equal(found, train())


def test_baselines_learn() -> None:
    digits = load_data("digits")
    own = [(split.x, split.labels) for split in (digits.train, digits.validation, digits.test)]
    assert classification.svm_error_percent(*own) < 4.0
    for dropout in (False, True):
        network = classification.supervised_network(
            *own[0], 10, hidden_dim=64, dropout=dropout, binary=False, steps=150, seed=0
        )
        assert sum(isinstance(layer, torch.nn.Dropout) for layer in network) == 3 * dropout
        found = network(digits.test.x).argmax(-1)
        assert classification.error_percent(found, digits.test.labels) < 30.0  # of 90 by chance


TINY = """
data = "digits"
[train]
latent_dim = 4
hidden_dim = 16
batch_size = 256
epochs = 3
warmup_epochs = 1
max_variance_ratio = 0.0
num_threads = 1
[semisupervised]
labels = [40, 100]
first_draws = 2
gammas = [1.0, 10.0]
components = 10
components_per_class = 2
finetune_epochs = 1
supervised_steps = 20
[faces]
shrink = 2
components = 6
latent_dim = 3
hidden_dim = 16
steps = 20
warmup_steps = 5
"""


@pytest.mark.parametrize("name", ["semisupervised", "faces"])
def test_a_study_runs_resumes_and_reports(name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "tiny.toml").write_text(TINY)
    arguments = (name, str(tmp_path / "tiny.toml"), {"output_dir": tmp_path / "out"})
    run_study(*arguments, publish=tmp_path / "docs", only_report=False)
    table = {"semisupervised": "errors", "faces": "identities"}[name]
    first = (tmp_path / "docs" / f"{table}.csv").read_text()
    rows = list(csv.reader(first.splitlines()))
    assert all(cell for cell in rows[1][:2]), rows
    assert rows[1][0] == {"semisupervised": CSRAE_ROW, "faces": "CSRAE"}[name]
    report = (tmp_path / "out" / name / "report.html").read_text()
    assert "data:image/png;base64," in report
    capsys.readouterr()
    run_study(*arguments, publish=None, only_report=False)
    assert " 0 to do" in capsys.readouterr().out
    assert (tmp_path / "out" / name / f"{table}.csv").read_text() == first


def test_gamma_is_chosen_by_validation_labels(tmp_path: Path) -> None:
    from csdiv.studies.semisupervised import SemisupervisedStudy

    (tmp_path / "tiny.toml").write_text(TINY)
    config = read_study(SemisupervisedConfig, "semisupervised", str(tmp_path / "tiny.toml"), {})
    study = SemisupervisedStudy(config, load_data("digits"))
    low, high = (study.labelled_cell(40, 0, gamma).name for gamma in config.gammas)
    results = {low: {"validation_error": 20.0, "test_error": 1.0}, high: {"validation_error": 10.0, "test_error": 9.0}}
    assert study.gamma(40, results) == 10.0
    assert study.errors(results)[CSRAE_ROW] == {40: [9.0]}


def test_identities_are_split_by_seed() -> None:
    x = torch.rand(12, 4, 6)
    data = Dataset.from_tensors(x, [f"person {i % 3}" for i in range(12)])
    split = faces.split_identities(data, 2, 0, shrink=2)
    assert split.shape == (1, 2, 3)
    assert torch.bincount(split.train_labels).tolist() == torch.bincount(split.test_labels).tolist() == [2, 2, 2]
    everything = torch.cat([split.train_x, split.test_x])
    blocks = x.unflatten(1, (2, 2)).unflatten(-1, (3, 2)).mean((2, 4)).flatten(1)
    torch.testing.assert_close(everything.sort(0).values, blocks.sort(0).values)
    assert not torch.equal(split.train_x, faces.split_identities(data, 2, 1, shrink=2).train_x)
    with pytest.raises(ValueError, match="more than train_per_identity"):
        faces.split_identities(data, 4, 0)


def test_the_likelihoods_variance_stays_as_stated() -> None:
    data = Dataset.from_tensors(torch.rand(40, 3, 4), [i % 4 for i in range(40)])
    config = faces.FacesConfig(components=4, latent_dim=2, hidden_dim=8, steps=6, warmup_steps=2, shrink=1)
    split = faces.split_identities(data, 5, 0)
    model = faces.fit(faces.build(config, "csrae", split), split.train_x, config, 0)
    z = torch.zeros(1, 2)
    expected = -torch.distributions.Normal(model.decoder(z), config.noise).log_prob(split.test_x).sum(-1)
    torch.testing.assert_close(model.decoder.negative_log_likelihood(z, split.test_x), expected)


def test_nearest_neighbours_and_principal_components() -> None:
    train, labels = torch.tensor([[0.0], [1.0]]), torch.tensor([0, 1])
    assert faces.nearest_neighbour_error(
        train, labels, torch.tensor([[0.1], [0.8], [0.7]]), torch.tensor([0, 1, 0])
    ) == (pytest.approx(100 / 3))
    x = torch.randn(9, 2) @ torch.randn(2, 5)
    mean, directions = faces.principal_components(x, 2)
    torch.testing.assert_close(mean + (x - mean) @ directions @ directions.T, x)

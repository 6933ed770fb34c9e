"""report.html: one file with everything in it."""

from __future__ import annotations

import base64
import platform
from dataclasses import fields
from html import escape
from pathlib import Path
from string import Template

import torch

import csdiv
from csdiv.models import folder
from csdiv.models.autoencoder import Autoencoder
from csdiv.models.checkpoint import versions
from csdiv.models.config import TrainConfig
from csdiv.models.data import Dataset
from csdiv.models.evaluation import Evaluation
from csdiv.models.folder import FIGURES, REPORT
from csdiv.models.networks import BernoulliDecoder
from csdiv.models.readers import printable

Rows = list[tuple[str, str]]

PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; }
body { max-width: 60rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; line-height: 1.2; margin-bottom: .5rem; }
h2 { font-size: 1.2rem; margin-top: 2rem; border-bottom: 1px solid #ddd; }
figure { margin: 1.5rem 0; break-inside: avoid; }
img { width: 100%; height: auto; }
figcaption { color: #555; font-size: .9rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .25rem .75rem .25rem 0; border-bottom: 1px solid #eee; }
th { font-weight: 500; }
td { overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
@media screen and (max-width: 40rem) { figure { overflow-x: auto; } img { width: 44rem; max-width: none; } }
@media print { body { max-width: none; font-size: 11pt; } }
</style>
</head>
<body>
$body
</body>
</html>
""")

BODY = Template("""<h1>$title on $data</h1>
<p>$summary</p>
<h2>Scores on the test split</h2>
$scores
<h2>Protocol</h2>
<p>$protocol</p>
<h2>Figures</h2>
$figures
<h2>Options</h2>
$options
<h2>Versions</h2>
$versions""")

TITLES = {
    "csrae": "Cauchy–Schwarz regularized autoencoder",
    "vae": "Variational autoencoder",
    "mixture_vae": "Variational autoencoder with a mixture prior",
    "vampprior": "Variational autoencoder with a VampPrior",
}
SUMMARIES = {
    "csrae": """A mixture of {components} Gaussians is the prior of {dim}-dimensional codes. The loss is the
reconstruction, summed over features, plus {weight} times the Cauchy–Schwarz divergence from each code to the prior, in
closed form.""",
    "vae": """The standard normal distribution is the prior of {dim}-dimensional codes. The loss is the
reconstruction, summed over features, plus {weight} times the Kullback–Leibler divergence from each code to the
prior.""",
    "mixture_vae": """A learned mixture of {components} Gaussians is the prior of {dim}-dimensional codes. The loss is
the reconstruction, summed over features, plus {weight} times the Kullback–Leibler divergence from each code to the
prior, estimated with one draw.""",
    "vampprior": """The mixture of the codes of {components} learned pseudo-inputs is the prior of {dim}-dimensional
codes. The loss is the reconstruction, summed over features, plus {weight} times the Kullback–Leibler divergence from
each code to the prior, estimated with one draw.""",
}
PROTOCOL = """{train} training, {validation} validation and {test} test samples, split once.{binary} {weights} The
negative log likelihood of the first {likelihood} test samples is importance-sampled with the proposal
0.5 N(m, s) + 0.3 N(m, 2s) + 0.2 N(m, 4s), where N(m, s) is the encoder's code: an upper bound in expectation, close
where the effective sample size is large.{clustering} A code dimension is active if its mean has a variance above
0.01 over the data. The divergence's share is the median time of its forward and backward pass, alone, over that of a
whole step."""
BINARY = """ Pixels are binarised, anew in each training step and once with a fixed seed for validation and test, so
that a Bernoulli decoder has a likelihood."""
CLUSTERING = """ A sample belongs to the component of largest posterior weight of its code. Which label a cluster
stands for is decided on the training samples: each cluster's majority (many-to-one) or, where there are as many
clusters as labels, the best matching that uses each label once (one-to-one). Components are merged by their overlaps,
without labels."""


def score_rows(evaluation: Evaluation, seconds: float | None = None) -> Rows:
    """The scores as (name with unit and K, value); ``seconds`` is the training's time."""
    likelihood, clustering, times = evaluation.likelihood, evaluation.clustering, evaluation.step_time
    rows = [
        ("test NLL (nats per sample)", f"{likelihood.nll.mean():.2f}"),
        ("importance samples", str(likelihood.num_samples)),
        ("median effective sample size", f"{likelihood.effective_sample_size.median():.0f}"),
    ]
    for s in clustering.scores:
        rows += [
            (f"NMI, K = {s.num_clusters} {s.name}", f"{s.nmi:.3f}"),
            (f"ARI, K = {s.num_clusters} {s.name}", f"{s.ari:.3f}"),
            (f"{s.matching} accuracy, K = {s.num_clusters} {s.name}", f"{s.accuracy:.3f}"),
        ]
    rows += [
        ("effective number of components", f"{clustering.effective_components:.1f}"),
        ("active code dimensions", str(clustering.active_units)),
    ]
    if seconds is not None:
        rows.append(("training time (s)", f"{seconds:.1f}"))
    return [
        *rows,
        ("training step (ms)", f"{times.step_ms:.2f}"),
        ("the divergence takes", f"{100 * times.share:.0f} % of a step"),
    ]


def write(config: TrainConfig, data: Dataset, model: Autoencoder, scores: Rows, captions: dict[str, str]) -> None:
    """Writes report.html with the figures of the run embedded."""
    directory, weight = config.output_dir, f"{model.divergence_weight.item():.4g}"
    labelled = data.num_classes > 0 and config.model != "vae"
    body = BODY.substitute(
        data=escape(data.name),
        title=TITLES[config.model],
        summary=SUMMARIES[config.model].format(
            components=config.num_components,
            dim=config.latent_dim,
            weight=f"{weight}, learned," if config.learn_divergence_weight else weight,
        ),
        scores=_table(scores),
        protocol=PROTOCOL.format(
            train=len(data.train.x),
            validation=len(data.validation.x),
            test=len(data.test.x),
            likelihood=min(config.likelihood_samples, len(data.test.x)),
            binary=BINARY if isinstance(model.decoder, BernoulliDecoder) else "",
            weights=f"The weights are {'those of the lowest validation loss' if config.keeps_best else 'the last'}.",
            clustering=CLUSTERING if labelled else "",
        ),
        figures="\n".join(figure_html(directory / FIGURES / name, caption) for name, caption in captions.items()),
        options=_table([(f.name, printable(str(getattr(config, f.name)))) for f in fields(config)]),
        versions=_table(
            [
                *versions().items(),
                ("backends", ", ".join(csdiv.available_backends())),
                ("Python", f"{platform.python_version()}, {platform.machine()}, {platform.system()}"),
                ("threads", str(torch.get_num_threads())),
            ]
        ),
    )
    folder.write(directory, REPORT, document(f"{config.model.upper()} on {data.name}", body))


def _table(rows: Rows) -> str:
    cells = "\n".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows)
    return f"<table>\n{cells}\n</table>"


def document(title: str, body: str) -> str:
    """A page of its own: ``body`` is HTML, ``title`` is not."""
    return PAGE.substitute(title=escape(title), body=body)


def figure_html(path: Path, caption: str) -> str:
    """A PNG file, embedded, with its caption."""
    image, text = base64.b64encode(path.read_bytes()).decode(), escape(caption)
    return f'<figure><img src="data:image/png;base64,{image}" alt="{text}"><figcaption>{text}</figcaption></figure>'

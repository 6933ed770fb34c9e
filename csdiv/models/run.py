"""``csdiv train``: train, evaluate, draw, report."""

from __future__ import annotations

from csdiv.models import report
from csdiv.models.config import TrainConfig
from csdiv.models.data import load_digits
from csdiv.models.evaluation import evaluate
from csdiv.models.figures import save_figures
from csdiv.models.training import FIGURES, REPORT, train


def train_and_report(config: TrainConfig) -> None:
    """Trains on the digits, fills ``config.output_dir`` and prints the scores.

    Raises: see :func:`csdiv.models.training.train`.
    """
    data = load_digits()
    result = train(config, data)
    evaluation = evaluate(
        result.model, data, importance_samples=config.importance_samples, batch_size=config.batch_size
    )
    captions = save_figures(config.output_dir / FIGURES, result.model, data, evaluation, result.history)
    scores = report.score_rows(evaluation, result.seconds)
    report.write(config, data, scores, captions)
    width = max(len(name) for name, _ in scores)
    print("\n".join(f"{name:<{width}}  {value}" for name, value in scores))
    print(f"report: {config.output_dir / REPORT}")

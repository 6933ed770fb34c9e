"""For target trackers: a mixture of ten components reduced to six, by descent on the integrated squared error.

The mixture is Williams'. Keeping the six heaviest components and normalising their weights leaves an ISE of 0.01405,
the plain selection; from there L-BFGS moves weights, means and variances at once. The fixed side has no gradient, so
its self term costs a value only. ``python mixture_reduction.py reduction.png`` also draws the three densities.
"""

import sys

import torch

import csdiv

WEIGHTS = torch.tensor([0.03, 0.18, 0.12, 0.19, 0.02, 0.16, 0.06, 0.10, 0.08, 0.06], dtype=torch.float64)
MEANS = torch.tensor([1.45, 2.20, 0.67, 0.48, 1.49, 0.91, 1.01, 1.42, 2.77, 0.89], dtype=torch.float64)
VARIANCES = torch.tensor(
    [0.0487, 0.0305, 0.1171, 0.0174, 0.0295, 0.0102, 0.0323, 0.0380, 0.0115, 0.0679], dtype=torch.float64
)
Reduction = tuple[csdiv.GaussianMixture, csdiv.GaussianMixture, csdiv.GaussianMixture]


def reduce_mixture(keep: int = 6) -> Reduction:
    """The mixture, its ``keep`` heaviest components, and these after the descent."""
    full = csdiv.GaussianMixture(MEANS[:, None], VARIANCES[:, None], log_weights=WEIGHTS.log())
    kept = WEIGHTS.topk(keep).indices
    selected = full.map(lambda t: t[kept]).normalized()

    leaves = [selected.means, selected.variances.log(), selected.log_weights]
    leaves = [t.clone().requires_grad_() for t in leaves]
    optimizer = torch.optim.LBFGS(leaves, max_iter=500, line_search_fn="strong_wolfe", tolerance_grad=1e-9)

    def reduced() -> csdiv.GaussianMixture:
        means, log_variances, logits = leaves
        return csdiv.GaussianMixture(means, log_variances.exp(), logits=logits)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = csdiv.ise(full, reduced(), log=True)  # the logarithm: steps of the same size however small the error
        loss.backward()
        return loss

    optimizer.step(closure)
    return full, selected, reduced().detach()


def draw(mixtures: Reduction, path: str) -> None:
    from matplotlib import pyplot as plt

    x = torch.linspace(-0.5, 3.5, 400, dtype=torch.float64)[:, None]
    styles = {"10 components": "k-", "6 selected": "C1:", "6 after descent on ISE": "C0--"}
    figure, axes = plt.subplots(figsize=(5, 2.6), layout="constrained")
    for (label, style), mixture in zip(styles.items(), mixtures, strict=True):
        axes.plot(x, mixture.log_prob(x).exp(), style, label=label)
    axes.set(xlabel="x", ylabel="density", ylim=(0, None))
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


def main(path: str | None = None) -> tuple[float, float]:
    """ISE of the selection and after the descent; ``path`` takes the drawing."""
    mixtures = reduce_mixture()
    before, after = (csdiv.ise(mixtures[0], q).item() for q in mixtures[1:])
    print(f"ISE of the selection {before:.5f}, after the descent {after:.7f}, {before / after:.0f} times less")
    if path is not None:
        draw(mixtures, path)
    return before, after


if __name__ == "__main__":
    main(*sys.argv[1:2])

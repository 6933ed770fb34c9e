"""The command ``csdiv``; what a command needs is imported when it runs."""

from __future__ import annotations

import inspect
import io
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

if TYPE_CHECKING:
    from typer import Typer

    from csdiv.models.config import TrainConfig

INTERRUPTED = 130  # the shell's own status after SIGINT


def main() -> None:
    """Entry point of the command; exits with status 2 where the extra ``train`` is not installed."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name or λ that the terminal cannot show ends no command
            stream.reconfigure(errors="backslashreplace")
    try:
        command = app()
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "tomli"):
            raise
        print("csdiv's commands need the extra: pip install 'csdiv[train]'", file=sys.stderr)
        sys.exit(2)
    command()


def app() -> Typer:
    """The typer application."""
    import typer

    application = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
    application.callback()(_describe)
    application.command(help="Train a model and write a report.")(_train_command())
    for command in (evaluate, sample, interpolate, study, info):
        application.command()(command)
    passes_on = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
    application.command(context_settings=passes_on)(_bench_command())
    return application


def _describe() -> None:
    """Closed-form divergences between Gaussian mixtures, and the autoencoder built on them."""


@contextmanager
def _errors() -> Iterator[None]:
    """One line and status 1 for what a user can mend; everything else keeps its traceback."""
    import typer

    try:
        yield
    except (ValueError, TypeError, OSError, ArithmeticError, MemoryError) as error:
        typer.echo(f"error: {error or 'not enough memory'}", err=True)
        raise typer.Exit(1) from error


def _train_command() -> Callable[..., None]:
    """A function with a flag for each option of TrainConfig, in the form that typer reads."""
    import typer

    from csdiv.models.config import TrainConfig, options

    def train(config: Path | None, overwrite: bool, resume: bool, **flags: Any) -> None:
        given = {name: value for name, value in flags.items() if value is not None}
        with _errors():
            _train(config, overwrite, resume, given)

    def parameter(name: str, kind: Any, default: Any, help: str, **extra: Any) -> inspect.Parameter:
        annotation = Annotated[kind, typer.Option(help=help, **extra)]
        return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)

    types, described = get_type_hints(TrainConfig), options()
    parameters = [
        parameter("config", Path | None, None, "TOML file of options; flags win over it."),
        parameter("overwrite", bool, False, "Replace the results of an earlier run in the output directory."),
        parameter("resume", bool, False, "Go on from the last checkpoint in the output directory, with its options."),
    ]
    for field in fields(TrainConfig):
        shown = "no" if field.default is False else str(field.default)
        option = {"show_default": shown}  # None stands for "not given", so that the file's value stays
        parameters.append(parameter(field.name, types[field.name] | None, None, described[field.name].help, **option))
    train.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    train.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return train


def _train(config_file: Path | None, overwrite: bool, resume: bool, given: dict[str, Any]) -> None:
    import typer

    from csdiv.models.config import TrainConfig, read_toml

    if resume:
        config = _resumed(config_file, given)
    else:
        config = TrainConfig(**(read_toml(config_file) if config_file else {}) | given)
    from csdiv.models.run import train_and_report
    from csdiv.models.training import Interrupted

    try:
        train_and_report(config, overwrite=overwrite, resume=resume)
    except (Interrupted, KeyboardInterrupt) as stop:
        again = f"csdiv train --output-dir {config.output_dir} --resume"
        typer.echo(f"interrupted; to go on from the last checkpoint: {again}", err=True)
        raise typer.Exit(INTERRUPTED) from stop


def _resumed(config_file: Path | None, given: dict[str, Any]) -> TrainConfig:
    """The options of the run in the output directory, of which a flag may change those that do not alter the curve."""
    from csdiv.models.checkpoint import load_config
    from csdiv.models.config import TrainConfig

    free = {
        "max_variance_ratio",
        "num_threads",
        "importance_samples",
        "likelihood_samples",
        "checkpoint_interval",
        "data",
    }
    if config_file is not None:
        raise ValueError("--resume takes the options of the run: leave out --config")
    directory = given.pop("output_dir", TrainConfig().output_dir)
    config = load_config(directory)
    changed = sorted(name for name, value in given.items() if name not in free and value != getattr(config, name))
    if changed:
        raise ValueError(f"--resume continues the run as it was: leave out {', '.join(changed)}")
    return replace(config, **given | {"output_dir": Path(directory)})


def evaluate(
    directory: Path,
    data: str | None = None,
    importance_samples: int | None = None,
    likelihood_samples: int | None = None,
    num_threads: int | None = None,
) -> None:
    """Score a trained model on its test split: likelihood, clustering, cost of the divergence.

    DIRECTORY is a run's output directory; options that are not given are the run's. Writes scores.json there.
    """
    from csdiv.models.run import evaluate_run

    with _errors():
        evaluate_run(
            directory,
            data=data,
            importance_samples=importance_samples,
            likelihood_samples=likelihood_samples,
            num_threads=num_threads,
        )


def sample(directory: Path, output: Path = Path("samples.png"), n: int = 96, seed: int = 0) -> None:
    """Decode N draws from a trained model's prior, to a PNG grid or an .npz array.

    DIRECTORY is a run's output directory.
    """
    from csdiv.models.run import sample_run

    with _errors():
        sample_run(directory, n, output, seed)


def interpolate(
    directory: Path, output: Path = Path("interpolations.png"), pairs: int = 8, steps: int = 12, seed: int = 0
) -> None:
    """Decode the lines between the codes of pairs of test samples, to a PNG grid or an .npz array.

    DIRECTORY is a run's output directory.
    """
    from csdiv.models.run import interpolate_run

    with _errors():
        interpolate_run(directory, pairs, steps, output, seed)


def study(
    name: str,
    config: str = "digits",
    data: str | None = None,
    output_dir: Path | None = None,
    seeds: int | None = None,
    publish: Path | None = None,
    only_report: bool = False,
) -> None:
    """Compare models by one protocol: density, clustering, semisupervised, faces.

    NAME is one of these. CONFIG is "digits", "mnist" or a TOML file; DATA, OUTPUT_DIR and SEEDS win over it. What is
    finished is not computed again. PUBLISH is a directory that the tables and figures are copied to.
    """
    import typer

    from csdiv.models.training import Interrupted
    from csdiv.studies.run import run_study

    given = {"data": data, "output_dir": output_dir, "seeds": seeds}
    try:
        with _errors():
            run_study(name, config, {k: v for k, v in given.items() if v is not None}, publish=publish,
                      only_report=only_report)  # fmt: skip
    except (Interrupted, KeyboardInterrupt) as stop:
        typer.echo("interrupted; the same command goes on from here", err=True)
        raise typer.Exit(INTERRUPTED) from stop


def info(shape: tuple[int, int, int] | None = None, structure: str = "diagonal", device: str = "cuda") -> None:
    """Say which backends can run here and, of the others, why not.

    With SHAPE, which is N M D, also what backend="auto" takes for mixtures of these sizes on DEVICE, and why; STRUCTURE
    is that of both sides: diagonal, spherical, "tied diagonal" or "tied spherical".
    """
    import platform

    import torch

    import csdiv

    print(f"csdiv {csdiv.__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    vectors = torch.backends.cpu.get_cpu_capability()
    print(f"{platform.platform()}, {torch.get_num_threads()} threads, torch's vectors: {vectors}")
    for name, status in csdiv.backend_status().items():
        print(f"{name:10} {'available' if status.available else f'not available: {status.reason}'}")
    if shape is not None:
        with _errors():
            _explain(shape, structure, device)


def _explain(sizes: tuple[int, int, int], structure: str, device: str) -> None:
    from csdiv import backends

    structures = ("diagonal", "spherical", "tied diagonal", "tied spherical")
    if structure not in structures or min(sizes) < 1:
        raise ValueError(f"a structure of {', '.join(structures)} and sizes from 1 on expected")
    n, m, d = sizes
    variances = [
        (1 if structure.startswith("tied") else k, 1 if structure.endswith("spherical") else d) for k in (n, m)
    ]
    print(f"N = {n}, M = {m}, D = {d}, {structure}, on {device}:")
    for line in backends.explain(device, d, *variances):
        print(f"  {line}")


def _bench_command() -> Callable[..., None]:
    import typer

    def bench(context: Any) -> None:
        """Measure csdiv beside its peers (bench cpu) and beside float64 (bench accuracy); bench --help says more."""
        from csdiv.bench.__main__ import main as run

        run(context.args)

    bench.__annotations__ = {"context": typer.Context}
    return bench


if __name__ == "__main__":
    main()

"""The command ``csdiv``; what a command needs is imported when it runs."""

from __future__ import annotations

import inspect
import sys
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

if TYPE_CHECKING:
    from typer import Typer


def main() -> None:
    """Entry point of the command; exits with status 2 where the extra ``train`` is not installed."""
    try:
        command = app()
    except ModuleNotFoundError as error:
        if error.name != "typer":
            raise
        print("csdiv's commands need the extra: pip install 'csdiv[train]'", file=sys.stderr)
        sys.exit(2)
    command()


def app() -> Typer:
    """The typer application."""
    import typer

    application = typer.Typer(no_args_is_help=True, add_completion=False)
    application.callback()(_describe)
    application.command(help="Train a CSRAE on handwritten digits and write a report.")(_train_command())
    return application


def _describe() -> None:
    """Closed-form divergences between Gaussian mixtures, and the autoencoder built on them."""


def _train_command() -> Any:
    """A function with a flag for each option of TrainConfig, in the form that typer reads."""
    import typer

    from csdiv.models.config import TrainConfig, options

    def train(**values: Any) -> None:
        from csdiv.models.run import train_and_report

        try:
            train_and_report(TrainConfig(**values))
        except (ValueError, OSError, ArithmeticError) as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from error

    types, described = get_type_hints(TrainConfig), options()
    parameters = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=field.default,
            annotation=Annotated[types[field.name], typer.Option(help=described[field.name].help)],
        )
        for field in fields(TrainConfig)
    ]
    train.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    train.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return train


if __name__ == "__main__":
    main()

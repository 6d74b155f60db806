"""The Typer application behind `dino-exp`, and the mapping of errors to exit codes."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Annotated

import typer

import dino_exp
from dino_exp.cli.show import plain
from dino_exp.config.typed import failure_text
from dino_exp.errors import DinoExpError, of_os
from dino_exp.streams import steady_streams


@dataclass(frozen=True)
class Noun:
    """What commands are about; for each verb "module.function" of this package, imported when it is typed."""

    help: str
    verbs: Mapping[str, str]


NOUNS = {
    "checkpoints": Noun(
        "Look after the checkpoints of a run.",
        {
            "list": "checkpoint_list.list_all",
            "show": "details.show",
            "verify": "verify.verify",
            "pin": "pins.pin",
            "unpin": "pins.unpin",
            "prune": "prune.prune",
            "compare": "analysis.compare",
            "evolution": "analysis.evolution",
            "timeline": "analysis.timeline",
            "report": "report.report",
            "backup": "backup.backup",
            "restore": "backup.restore",
            "export": "export.export",
        },
    ),
    "runs": Noun(
        "Look across runs.",
        {
            "list": "runs.list_all",
            "best": "runs.best",
            "rebuild": "runs.rebuild",
            "doctor": "doctor.doctor",
            "show": "run_details.show",
            "diff": "run_diff.diff",
            "compare": "run_curves.compare",
            "reproduce": "reproduce.reproduce",
            "deliver": "deliver.deliver",
        },
    ),
    "sweeps": Noun(
        "Look after sweeps (`python -m dino_exp.train --multirun ...`).",
        {
            "list": "sweeps.list_all",
            "show": "sweeps.show",
            "resume": "sweeps.resume",
            "report": "sweeps.report",
        },
    ),
}


def train(context: typer.Context) -> None:
    """Train: the same as `python -m dino_exp.train`; takes Hydra overrides."""
    from dino_exp import train as program

    program.main(context.args)


def evaluate(context: typer.Context) -> None:
    """Evaluate a checkpoint: the same as `python -m dino_exp.evaluate`; takes Hydra overrides."""
    from dino_exp import evaluate as program

    program.main(context.args)


def _version(asked: bool) -> None:
    if asked:
        print(f"dino-exp {dino_exp.__version__}")
        raise typer.Exit


def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options that stand before the noun."""


def application(words: Sequence[str]) -> typer.Typer:
    """What was typed, noun and verb; every noun, and every verb, where it is none of them: for help and completion.

    Each verb takes its time to import.
    """
    app = typer.Typer(
        name="dino-exp",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        help="Look after DINO runs and their checkpoints. Training itself is `python -m dino_exp.train`.",
    )
    app.callback()(root)
    passed_on = {"allow_extra_args": True, "ignore_unknown_options": True}
    for name, program in (("train", train), ("evaluate", evaluate)):
        app.command(name, context_settings=passed_on)(program)
    noun, verb = (*words, "", "")[:2]
    for name in (noun,) if noun in NOUNS else NOUNS:
        app.add_typer(_verbs(NOUNS[name], verb), name=name)
    return app


def _verbs(noun: Noun, asked: str) -> typer.Typer:
    app = typer.Typer(no_args_is_help=True, help=noun.help)
    for verb in (asked,) if asked in noun.verbs else noun.verbs:
        module, _, function = noun.verbs[verb].partition(".")
        app.command(verb)(getattr(import_module(f"dino_exp.cli.{module}"), function))
    return app


def run() -> int:
    """Run the command line; the exit code. An error of the user's or the disk's is one message, no traceback."""
    steady_streams()
    try:
        application(sys.argv[1:])()
    except DinoExpError as error:
        print(f"dino-exp: {plain(failure_text(error), keep=chr(10))}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains at its end
        return 128 + signal.SIGPIPE
    except OSError as error:
        print(f"dino-exp: {plain(str(of_os(error)))}", file=sys.stderr)
        return 1
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    return 0

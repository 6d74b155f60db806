"""`dino-exp runs deliver`: bring the rows of a run to its trackers, without a training."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Annotated

import typer

from dino_exp.attempts.tracking import Told, check_packages, tensorboard_of, wandb_id, wandb_of
from dino_exp.cli.arguments import OUTPUTS, OutputsOption, RunArgument
from dino_exp.cli.owning import own
from dino_exp.cli.show import plain
from dino_exp.config.schema import LoggerConfig
from dino_exp.config.stored import load_stored
from dino_exp.errors import UsageError
from dino_exp.loggers.delivery import Delivery, Tracker
from dino_exp.runs.find import find_run
from dino_exp.runs.following import rows_from
from dino_exp.runs.layout import RunPaths
from dino_exp.runs.record import load_record, save_record
from dino_exp.runs.redact import strip_credentials

FINISH_SECS = 60


def deliver(
    run: RunArgument,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="To TensorBoard's files.")] = False,
    wandb: Annotated[
        str | None, typer.Option("--wandb", metavar="MODE", help="To Weights & Biases: online or offline.")
    ] = None,
    project: Annotated[str | None, typer.Option("--project", help="At W&B; else as in the run's settings.")] = None,
    entity: Annotated[str | None, typer.Option("--entity", help="At W&B; else as in the run's settings.")] = None,
    wait: Annotated[float, typer.Option("--wait", min=1, metavar="SECONDS", help="For all of it.")] = 600.0,
    outputs: OutputsOption = OUTPUTS,
) -> None:
    """Bring the rows that trackers lack to them; of a run that no training is at work on. Exit 1 if some are left.

    Without a choice: to those of the run's settings.

    \b
    Examples:
      dino-exp runs deliver last
      dino-exp runs deliver last --tensorboard
      dino-exp runs deliver vit_nano-67b8 --wandb online --project digits
    """
    paths = RunPaths(find_run(outputs, run).absolute())
    config = load_stored(paths.directory)
    logger = _chosen(config.logger, tensorboard, wandb)
    logger = replace(logger, wandb_project=project or logger.wandb_project, wandb_entity=entity or logger.wandb_entity)
    check_packages(logger)
    with own(paths, "nothing was delivered") as lock:
        record = load_record(paths.run_json)
        if record is None:
            raise UsageError(f"{paths.run_json}: there is no run")
        told = Told(config=replace(config, logger=logger), paths=paths, record=record)
        trackers: list[Tracker] = [tensorboard_of(told)] if logger.tensorboard else []
        if logger.wandb is not None:
            save_record(
                paths.run_json, replace(record, trackers={**record.trackers, "wandb": {"id": wandb_id(record)}})
            )
            trackers.append(wandb_of(told, logger.wandb, FINISH_SECS))
        missing = [_deliver_to(tracker, paths, lock.check, wait, record.state) for tracker in trackers]
    if any(missing):
        raise typer.Exit(1)


def _chosen(logger: LoggerConfig, tensorboard: bool, wandb: str | None) -> LoggerConfig:
    if wandb not in (None, "online", "offline"):
        raise UsageError(f"--wandb {wandb}: expected online or offline")
    if tensorboard or wandb is not None:
        return replace(logger, tensorboard=tensorboard, wandb=wandb)
    if not (logger.tensorboard or logger.wandb):
        raise UsageError("the run's settings name no tracker: say --tensorboard, or --wandb online")
    return logger


def _deliver_to(tracker: Tracker, paths: RunPaths, guard: Callable[[], None], secs: float, state: str) -> int:
    problems: list[str] = []

    def tell(kind: str, text: str) -> None:
        problems.append(kind)
        print(plain(strip_credentials(text)), file=sys.stderr, flush=True)

    delivery = Delivery(tracker, partial(rows_from, paths.metrics), tell=tell, guard=guard)
    delivery.start()
    delivery.ask_to_end(secs, state)
    missing = delivery.finish()
    if not missing and not problems:
        print(f"{tracker.name} has all rows of {plain(str(paths.directory))}")
    return missing or len(problems)

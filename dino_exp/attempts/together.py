"""One attempt by several processes: the first decides, records and prints, the others train along.

torchrun starts them all with the same command. Before anything is decided they compare it: settings, code and torch.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dino_exp.attempts.data_files import apart_from_files
from dino_exp.attempts.member import train_along
from dino_exp.attempts.numerics import choose_device
from dino_exp.attempts.run import logging_to, refuse_odd_log, run_attempt
from dino_exp.config.canonical import config_hash
from dino_exp.config.check import config_from_mapping
from dino_exp.config.compose import touched_keys
from dino_exp.config.schema import Config
from dino_exp.dist.council import LostRankError, OtherRankError
from dino_exp.dist.place import Place
from dino_exp.dist.ranks import ManyRanks, joined
from dino_exp.errors import DinoExpError, RefusedError
from dino_exp.runs.code_identity import PACKAGE_DIR, code_id
from dino_exp.runs.layout import RunPaths
from dino_exp.runs.signals import SignalFlags

if TYPE_CHECKING:
    from rich.console import Console

    from dino_exp.attempts.attempt import Attempt, Command
    from dino_exp.attempts.target import Target

log = logging.getLogger("dino_exp")

_DECISION = "decision"
_PULSE_SECS = 1.0


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train along: with these settings, in this directory. `numerics` are those of the run's first attempt."""

    config: Config
    directory: str
    attempt: int
    numerics: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Leave:
    """There is nothing to do."""

    exit_code: int


def run_together(place: Place, find_target: Callable[[], Target], command: Command, console: Console) -> int:
    """Carry out one attempt in several processes, of which this is one; its exit code.

    Raises as `run_attempt` does, RefusedError where the processes were started with different commands, and
    LostRankError where one does not come.
    """
    composed = command.composed
    if composed["resume"] is not None or composed["fork"] is not None:
        composed, _ = apart_from_files(composed, touched_keys(command.overrides))
    config = config_from_mapping(composed)
    device = choose_device(config.runtime.device, place)
    with joined(place, device, config.runtime.timeout_secs) as ranks:
        compare_commands(ranks, config, command, device)
        if not place.is_first:
            with SignalFlags() as signals:
                return follow(ranks, signals)
        with signs_until_decided(ranks):
            code = run_attempt(find_target, command, console, ranks)
        if not ranks.council.has(_DECISION):
            ranks.council.post(_DECISION, Leave(exit_code=code))
        return code


def compare_commands(ranks: ManyRanks, config: Config, command: Command, device: torch.device) -> None:
    """Raises RefusedError, on all ranks, unless all were asked for the same, with the same code and kind of device."""
    mine = {
        "settings": config_hash(config),
        "overrides": " ".join(command.overrides),
        "code": code_id(PACKAGE_DIR),
        "torch": torch.__version__,
        "device": device.type,  # where `auto` found none on one host
    }
    all_ranks = ranks.council.gather("command", mine)
    for rank, theirs in enumerate(all_ranks):
        for name, value in theirs.items():
            if value != all_ranks[0][name]:
                raise RefusedError(
                    f"rank {rank} was started with {name} {value}, rank 0 with {all_ranks[0][name]}; start all "
                    "processes with the same command, from the same code, on machines of one kind"
                )


def tell_to_train(attempt: Attempt, ranks: ManyRanks) -> None:
    """Let the other ranks know what rank 0 has decided. Their signals reach the loop from here on."""
    decision = Train(
        config=attempt.config,
        directory=str(attempt.paths.directory.resolve()),
        attempt=attempt.number,
        numerics={} if attempt.record is None else attempt.record.numerics,
    )
    ranks.council.post(_DECISION, decision)


@contextlib.contextmanager
def signs_until_decided(ranks: ManyRanks) -> Iterator[None]:
    """Signs of life of rank 0, for as long as it looks through the images and waits for the run's lock.

    By a thread, because what it waits for does not come back meanwhile; no longer, or a training that hangs would seem
    to live.
    """
    connection, over = ranks.connect(), threading.Event()

    def give() -> None:
        with contextlib.suppress(LostRankError):
            while not over.wait(min(_PULSE_SECS, connection.timeout_secs / 8)) and not connection.has(_DECISION):
                connection.give_sign()

    thread = threading.Thread(target=give, name="signs of life", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def follow(ranks: ManyRanks, signals: SignalFlags) -> int:
    """Do as rank 0 decides; the exit code. An error that another rank has is told there, and not here once more."""
    try:
        decision: Train | Leave = ranks.council.take(_DECISION, of=0)
        if isinstance(decision, Leave):
            return decision.exit_code
        log_file = RunPaths(Path(decision.directory)).log(ranks.place.rank)
        refuse_odd_log(log_file)
        with logging_to(log_file, None):
            return follow_training(ranks, decision, signals)
    except OtherRankError as error:
        return error.exit_code


def follow_training(ranks: ManyRanks, decision: Train, signals: SignalFlags) -> int:
    """Train along, and write to this rank's log how it ended."""
    rank = ranks.place.rank
    log.info("attempt %d: rank %d of %d, process %d", decision.attempt, rank, ranks.place.size, os.getpid())
    try:
        outcome = train_along(ranks, decision.config, decision.directory, decision.attempt, decision.numerics, signals)
    except BaseException as error:
        log.info("rank %d ends by an error", rank, exc_info=error)
        if isinstance(error, DinoExpError) and not isinstance(error, OtherRankError):
            sys.stderr.write(f"rank {rank}: ")
        raise
    log.info("rank %d ends: %s at step=%d", rank, outcome.state, outcome.step)
    return 0 if outcome.signum is None else 128 + outcome.signum

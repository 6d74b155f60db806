"""`python -m dino_exp.train`: a Hydra program that starts a run, continues it, or says that it is finished.

Light on purpose: `--help`, a finished run and a refused command must not wait for torch.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from dino_exp.config.compose import JobEnd, LauncherLeavesError, compose, hydra_main, touched_keys
from dino_exp.config.multirun import options_of, search_path_of
from dino_exp.dist.place import place_of
from dino_exp.errors import UsageError
from dino_exp.processes import run_child
from dino_exp.runs.signals import SecondInterruptError
from dino_exp.streams import steady_streams

if TYPE_CHECKING:
    from dino_exp.attempts.target import Target
    from dino_exp.sweeps.teller import SweepTeller


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run with `arguments` (the process's own where None) and leave with its exit code."""
    from dino_exp.attempts.own_choices import with_own_choices

    steady_streams()
    words, own = with_own_choices(sys.argv[1:] if arguments is None else arguments)
    sys.argv = [sys.argv[0], *words]
    sys.exit(hydra_main(partial(train, own=own), sweep_teller))


def sweep_teller() -> SweepTeller:
    """Who tells of a `--multirun`, on standard output."""
    from dino_exp.loggers.console import SteadyConsole, print_columns
    from dino_exp.sweeps.teller import SweepTeller

    console = SteadyConsole(highlight=False)
    return SweepTeller(
        lambda overrides: find_target(compose(overrides), overrides),
        lambda columns, rows: print_columns(console, columns, rows),
        lambda text: console.print(text, markup=False, soft_wrap=True),
        train_apart,
    )


def train(composed: Mapping[str, Any], overrides: Sequence[str], own: Sequence[str] = ()) -> JobEnd:
    """One command: `composed` is what Hydra made of conf/ and `overrides`, of which nobody has typed those in `own`."""
    from dino_exp.attempts.attempt import Command
    from dino_exp.attempts.run import is_done, run_attempt
    from dino_exp.loggers.console import SteadyConsole
    from dino_exp.runs.record import load_record

    overrides = [word for word in overrides if word not in own]
    beside = (*search_path_of(HydraConfig.get()), *own)
    if composed["plan"] is True:
        return plan_only(lambda: find_target(composed, overrides, beside))
    if HydraConfig.get().mode is RunMode.MULTIRUN:
        place_of(os.environ).refuse_sweep()
        target = find_target(composed, overrides, beside)
        code = (
            0
            if is_done(target, SteadyConsole(highlight=False))
            else train_apart(overrides, options_of(HydraConfig.get()))
        )
        record = load_record(target.paths.run_json)
        return JobEnd(code, None if record is None or record.best is None else record.best.value)
    command = Command(overrides=overrides, composed=composed, options=options_of(HydraConfig.get()), beside=beside)
    place, console = place_of(os.environ), SteadyConsole(highlight=False)
    try:
        if place.size > 1:
            from dino_exp.attempts.together import run_together

            return JobEnd(run_together(place, lambda: find_target(composed, overrides, beside), command, console))
        return JobEnd(run_attempt(lambda: find_target(composed, overrides, beside), command, console))
    except KeyboardInterrupt as interrupt:
        how = "aborted by a second interrupt" if isinstance(interrupt, SecondInterruptError) else "interrupted"
        sys.stderr.write(f"{how}; what was saved before stands\n")
        return JobEnd(128 + signal.SIGINT)


def plan_only(find: Callable[[], Target]) -> JobEnd:
    """Say what the training would take. Raises UsageError where several processes would each say it."""
    from dino_exp.attempts.run import is_done
    from dino_exp.loggers.console import SteadyConsole

    place, console = place_of(os.environ), SteadyConsole(highlight=False)
    if place.size > 1:
        raise UsageError(
            f"plan=true in rank {place.rank} of {place.size}: a plan is made by one process, for one process. Start it "
            "without torchrun"
        )
    try:
        target = find()
        if not is_done(target, console):
            from dino_exp.attempts.plan_text import tell_plan

            tell_plan(target, console)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; nothing was written\n")
        return JobEnd(128 + signal.SIGINT)
    return JobEnd(0)


def find_target(composed: Mapping[str, Any], overrides: Sequence[str], beside: Sequence[str] = ()) -> Target:
    """The run that the command leads to: a given one, the child of one, or that of these settings and this code.

    `beside`: `hydra.searchpath`, where it was given, and the choices of a given run (`with_own_choices`).
    """
    from dino_exp.attempts.fork import fork_target
    from dino_exp.attempts.target import resume_target, start_target

    if composed["resume"] is not None:
        return resume_target(composed, touched_keys(overrides, beside), overrides)
    if composed["fork"] is not None:
        return fork_target(composed, touched_keys(overrides, beside), overrides)
    return start_target(composed, overrides)


def train_apart(overrides: Sequence[str], options: Sequence[str]) -> int:
    """One job of a sweep, in a process of its own: no random state and no memory passes from job to job.

    Its exit code, 128+N only for a signal that is meant for the whole sweep.
    """
    end = run_child([sys.executable, "-m", "dino_exp.train", *options, *overrides])
    # The job has saved. A launcher that installed a handler hears of it: submitit requeues at USR2.
    for number in end.signals:
        handler = signal.getsignal(number)
        if number != signal.SIGUSR1 and callable(handler) and handler is not signal.default_int_handler:
            try:
                handler(number, None)
            except SystemExit as leaving:
                raise LauncherLeavesError(leaving) from leaving
            break
    if end.returned < 0 and end.stopped_by is None:
        cause = " (for want of memory?)" if end.returned == -signal.SIGKILL else ""
        name = signal.strsignal(-end.returned)
        sys.stderr.write(f"the job was killed by signal {-end.returned}: {name}{cause}\n")
    return end.code


if __name__ == "__main__":
    main()

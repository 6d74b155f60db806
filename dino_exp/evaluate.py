"""`python -m dino_exp.evaluate`: a Hydra program that measures, or pictures, what a checkpoint's features are worth.

It reads a run, also one that is in use, and writes beside it. Light on purpose: `--help` must not wait for torch.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

from dino_exp.config.check import MISSING, section_from_mapping
from dino_exp.config.compose import EVALUATE, JobEnd, hydra_main
from dino_exp.config.evaluate import EvaluateConfig
from dino_exp.dist.place import place_of
from dino_exp.errors import UsageError
from dino_exp.streams import steady_streams

if TYPE_CHECKING:
    from dino_exp.examination.kinds import Findings
    from dino_exp.examination.subject import Progress, Subject
    from dino_exp.weights.names import Part


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run with `arguments` (the process's own where None) and leave with its exit code."""
    steady_streams()
    if arguments is not None:
        sys.argv = [sys.argv[0], *arguments]
    sys.exit(hydra_main(evaluate, program=EVALUATE))


def evaluate(composed: Mapping[str, Any], overrides: Sequence[str]) -> JobEnd:
    """One command: `composed` is what Hydra made of conf/evaluate.yaml and `overrides`."""
    place = place_of(os.environ)
    if place.size > 1:
        raise UsageError(
            f"rank {place.rank} of {place.size}: an evaluation is one process, and every rank would write the same "
            "files. Start it without torchrun"
        )
    config = read_settings(composed)
    try:
        return JobEnd(0, _evaluate(config))
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; nothing was written\n")
        return JobEnd(128 + signal.SIGINT)


def read_settings(composed: Mapping[str, Any]) -> EvaluateConfig:
    """The checked settings. Raises UsageError where no checkpoint is named, ConfigError for whatever else is wrong."""
    if composed.get("of") in (None, MISSING):
        raise UsageError(
            "of: which checkpoint? Give a run (a directory, the beginning of its name, or last), and perhaps which one "
            "of it: python -m dino_exp.evaluate of=last@best"
        )
    return section_from_mapping(EvaluateConfig, composed, schema=EvaluateConfig)


def _evaluate(config: EvaluateConfig) -> float | None:
    """Evaluate, write and tell; the number that a sweeper may want to be large."""
    from dino_exp.examination.results import results_folder, write_results
    from dino_exp.examination.subject import find_subject
    from dino_exp.loggers.bar import WorkBar

    part = cast("Part", config.part)
    weights, paths = find_subject(config.of, part, Path(config.paths.outputs))
    folder = results_folder(config, weights, paths)  # refused before anything is computed
    started, made_at = time.monotonic(), datetime.now(UTC).isoformat(timespec="seconds")

    from dino_exp.attempts.numerics import apply_numerics
    from dino_exp.build import decoding
    from dino_exp.examination.kinds import examine
    from dino_exp.examination.place import Place
    from dino_exp.examination.subject import Subject, recorded_numerics, recorded_settings

    place = Place(root=config.root, cache=Path(config.paths.cache))
    device, numerics = apply_numerics(config.runtime, recorded_numerics(paths))
    with WorkBar() as bar:
        progress: Progress = bar.tell
        subject = Subject(
            weights=weights, facts=weights.facts(), paths=paths, part=part, device=device, progress=progress,
            recorded=recorded_settings(weights), place=place,
        )  # fmt: skip
        _warn_of_other_data(subject)
        found = examine(subject, config.evaluation)
    secs = time.monotonic() - started
    numerics |= decoding(subject.recorded.data)
    written = write_results(folder, config, subject, found, numerics, made_at=made_at, secs=secs)
    _tell(subject, config, found, written)
    return next(iter(found.metrics.values()), None)


def _warn_of_other_data(subject: Subject) -> None:
    from dino_exp.examination.results import same_data

    if not same_data(subject):
        sys.stderr.write(
            f"warning: {subject.data.train.name} is not the data that {subject.weights.where} was trained on (its "
            "fingerprint differs); the numbers are of what is there now\n"
        )


def _tell(subject: Subject, config: EvaluateConfig, found: Findings, written: Sequence[Path]) -> None:
    from dino_exp.loggers.console import SteadyConsole, evaluation_table

    console = SteadyConsole(highlight=False)
    rows = [(name, f"{value:.4f}") for name, value in found.metrics.items()]
    if "explained_variance" in found.details:
        shares = ", ".join(f"{share:.3f}" for share in found.details["explained_variance"])
        rows.append(("variance explained", shares))
    title = f"{config.evaluation.name} of the {config.part} of {subject.weights.where}"
    console.print(title, style="bold", markup=False, soft_wrap=True)
    if rows:
        console.print(evaluation_table(rows))
    if found.note is not None:
        console.print(found.note, markup=False, soft_wrap=True)
    for path in written:
        console.print(f"wrote {path}", markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()

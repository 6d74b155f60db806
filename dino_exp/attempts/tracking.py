"""The trackers of one attempt, by the settings of `logger`: which there are, what they are told, and their end.

Light to import: a command for which a package is missing must not wait for torch.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dino_exp.config.compare import as_mapping
from dino_exp.config.fields import walk_values
from dino_exp.config.schema import Config, LoggerConfig
from dino_exp.errors import UsageError
from dino_exp.runs.following import rows_from
from dino_exp.runs.layout import RunPaths
from dino_exp.runs.record import RunRecord
from dino_exp.runs.redact import strip_credentials

if TYPE_CHECKING:
    from torch import nn

    from dino_exp.attempts.attempt import Attempt
    from dino_exp.loggers.delivery import Delivery
    from dino_exp.loggers.tensorboard_files import TensorBoardFiles
    from dino_exp.loggers.wandb_run import WandbRun
    from dino_exp.training.plan import TrainingPlan
    from dino_exp.training.state import TrainState

log = logging.getLogger("dino_exp")

END_SECS = {"completed": 10.0, "stopped": 10.0, "interrupted": 0.0}  # for which a tracker is waited for
HURRIED_END_SECS = 3.0  # after a signal or an error: whoever sent the signal does not wait for ever
WANDB_FINISH_SECS = 6  # of its own process, in which it sends what is left
_OTHER_PLACES = ("resume", "fork", "plan", "paths", "sweep")


def check_packages(logger: LoggerConfig) -> None:
    """Raises UsageError where a tracker is chosen whose package is not installed."""
    chosen = {"tensorboard": logger.tensorboard, "wandb": logger.wandb is not None}
    missing = [name for name, is_chosen in chosen.items() if is_chosen and not _is_installed(name)]
    if missing:
        raise UsageError(
            f"logger={missing[0]} needs the package {missing[0]}, which is not installed: "
            f"pip install 'dino-exp[{','.join(missing)}]', or leave it out of logger="
        )


def _is_installed(package: str) -> bool:
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None  # without an origin: just a folder of this name


class Trackers:
    """What `logger` asks for beside `metrics.jsonl`. Without a tracker nothing is started, and nothing imported."""

    def __init__(self, attempt: Attempt, note_event: Callable[..., None]) -> None:
        self.attempt, self.note_event = attempt, note_event
        self.logger = attempt.config.logger
        self.files: TensorBoardFiles | None = None
        self.deliveries: list[Delivery] = []
        self.is_weights_step: Callable[[int], bool] = lambda step: False

    def start(self, plan: TrainingPlan, state: TrainState, *, is_sharded: bool) -> None:
        """Begin to hand on. After the rows were cut to the checkpoint, and after the loader's workers were started."""
        assert self.attempt.record is not None
        told = Told(config=self.attempt.config, paths=self.attempt.paths, record=self.attempt.record)
        every = self.logger.histogram_every_epochs
        if self.logger.tensorboard:
            self.files = tensorboard_of(told)
            self._deliver_to(self.files)
            if every is not None and is_sharded:
                log.warning("no histograms: of a model that is cut into shares, no process holds whole tensors")
            elif every is not None:
                self.is_weights_step = partial(
                    has_passed, num_steps=every * plan.steps_per_epoch, is_row=plan.is_row_due
                )
        if self.logger.wandb is not None:
            self._deliver_to(self._wandb(told, self.logger.wandb))
        if state.step > 0:  # a kill may have come before those of the checkpoint's step were written
            self.note_row(state.step, state.student)

    def note_row(self, step: int, student: nn.Module) -> None:
        """A row was written: copy the weights where histograms of them are due."""
        if self.files is not None and self.is_weights_step(step):
            from dino_exp.loggers.histograms import Weights

            named = student.named_parameters()
            values = {name: weight.detach().float().cpu().numpy().copy() for name, weight in named}
            self.files.weights.append(Weights(step, values))

    def end(self, outcome: str) -> None:
        """Let the trackers come to their end, for a bounded time. `outcome`: as in `run.json`."""
        secs = END_SECS.get(outcome, HURRIED_END_SECS)
        for delivery in self.deliveries:
            delivery.ask_to_end(secs, outcome)  # all of them at once
        for delivery in self.deliveries:
            delivery.finish()

    def end_by(self, error: type[BaseException] | None, *_: object) -> None:
        """The same where an error ends the attempt; for an exit stack."""
        if error is not None:
            self.end("interrupted" if issubclass(error, KeyboardInterrupt) else "failed")

    def tell(self, kind: str, text: str) -> None:
        """Say aloud and record what becomes of a tracker. From any thread."""
        text = strip_credentials(text)
        log.warning("%s", text)
        self.note_event(kind, text=text)

    def _deliver_to(self, tracker: TensorBoardFiles | WandbRun) -> None:
        from dino_exp.loggers.delivery import Delivery

        read = partial(rows_from, self.attempt.paths.metrics)
        delivery = Delivery(tracker, read, tell=self.tell, guard=self.attempt.lock.check)
        delivery.start()
        self.deliveries.append(delivery)

    def _wandb(self, told: Told, mode: str) -> WandbRun:
        chosen = wandb_id(told.record)
        if told.record.trackers.get("wandb") != {"id": chosen}:
            self.attempt.update(trackers={**told.record.trackers, "wandb": {"id": chosen}})
        return wandb_of(told, mode, WANDB_FINISH_SECS)


@dataclass(frozen=True, kw_only=True)
class Told:
    """A run, as trackers are told of it."""

    config: Config
    paths: RunPaths
    record: RunRecord


def tensorboard_of(told: Told) -> TensorBoardFiles:
    """TensorBoard's files of a run, of its newest attempt."""
    from dino_exp.loggers.tensorboard_files import TensorBoardFiles

    return TensorBoardFiles(
        told.paths.tensorboard,
        attempt=len(told.record.attempts),
        run_key=told.record.run_key,
        hparams=dict(hparams_of(told.config)),
        draw=partial(draw_rows, told.paths.metrics, told.record.schedule.steps_per_epoch),
    )


def wandb_of(told: Told, mode: str, secs_to_finish: int) -> WandbRun:
    """The run at W&B, under its own id."""
    from dino_exp.loggers.wandb_run import WandbRun

    config, record = told.config, told.record
    code = record.attempts[-1].code if record.attempts else record.code
    return WandbRun(
        told.paths.directory,
        id=wandb_id(record),
        mode=mode,
        project=config.logger.wandb_project,
        entity=config.logger.wandb_entity,
        label=record.run_key,
        tags=config.run.tags,
        note=config.run.note,
        config={**settings_of(config), "run_key": record.run_key, "code": asdict(code)},
        secs_to_finish=secs_to_finish,
    )


def draw_rows(metrics: Path, per_epoch: int) -> bytes | None:
    """The picture of a run's accuracy as PNG; None before the second evaluation."""
    from dino_exp.analysis.figures.curves import draw_accuracy
    from dino_exp.analysis.history import read_history

    history = read_history(metrics)
    return draw_accuracy(history, per_epoch, None).png() if len(history.series("knn_top1").finite) > 1 else None


def wandb_id(record: RunRecord) -> str:
    """The id at W&B: the one in `run.json` if that can be one, or that of the run's key."""
    from dino_exp.loggers.wandb_run import ID, run_id

    known = record.trackers.get("wandb")
    recorded = known.get("id") if isinstance(known, dict) else None
    return recorded if isinstance(recorded, str) and ID.fullmatch(recorded) else run_id(record.run_key)


def settings_of(config: Config) -> dict[str, Any]:
    """All settings but those that say where things lie."""
    return {key: value for key, value in as_mapping(config).items() if key not in _OTHER_PLACES}


def hparams_of(config: Config) -> Iterator[tuple[str, bool | int | float | str]]:
    """The settings that make a run what it is, as a page can compare them: no null, lists as text."""
    for key, entry, value in walk_values(config):
        if entry.setting is not None and entry.setting.role == "identity" and value is not None:
            yield key, value if isinstance(value, bool | int | float | str) else " ".join(map(str, value))


def has_passed(step: int, num_steps: int, is_row: Callable[[int], bool]) -> bool:
    """Whether the row of a step is the first one at or after a multiple of `num_steps`; a function of the step alone.

    So attempts before and after a kill agree on it.
    """
    for earlier in range(step, -1, -1):
        if earlier < step and is_row(earlier):
            return False
        if earlier % num_steps == 0:
            return True
    return False

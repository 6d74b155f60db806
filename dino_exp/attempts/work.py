"""The training of one attempt: build everything, restore, train, show. Imports torch; the lock is held."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from dino_exp import build
from dino_exp.attempts.attempt import Attempt, best_of
from dino_exp.attempts.banner import closing, opening
from dino_exp.attempts.beginning import (
    OPTIONAL,
    Beginning,
    freeze_objects,
    position_of,
    remarks_on,
    set_generators,
    signals_of,
)
from dino_exp.attempts.fork import check_schedule, has_other_data, parent_checkpoints
from dino_exp.attempts.initial import take_weights
from dino_exp.attempts.live_report import LiveReport, begin_sweep_page
from dino_exp.attempts.numerics import apply_numerics, differences
from dino_exp.attempts.preparing import preparation
from dino_exp.attempts.tracking import Trackers
from dino_exp.checkpoint.manager import CheckpointManager
from dino_exp.checkpoint.manifest import Manifest
from dino_exp.checkpoint.reader import CheckpointReader
from dino_exp.checkpoint.types import CheckpointInfo
from dino_exp.checkpoint.writers import Writers
from dino_exp.checkpoint.writing import NonFiniteStateError
from dino_exp.config.canonical import config_hash, group_hash
from dino_exp.config.typed import override, setting_text, train_command
from dino_exp.dist.ranks import ONE_RANK, ManyRanks, Ranks
from dino_exp.errors import CorruptCheckpointError, NoCheckpointError, RefusedError, SaveFailedError
from dino_exp.loggers.console import ConsoleProgress, is_evaluated
from dino_exp.runs.code_identity import CodeRecord
from dino_exp.runs.deadline import countdown, deadline_secs
from dino_exp.runs.events import EventLog
from dino_exp.runs.jsonl import read_lines
from dino_exp.runs.jsontext import utc_text
from dino_exp.runs.record import FailedSave
from dino_exp.runs.rows import RowWriter
from dino_exp.training.loop import FORK, WEIGHTS, Outcome, Progress, Training, run_training
from dino_exp.training.plan import TrainingPlan
from dino_exp.training.profiling import Profile, ProfiledProgress
from dino_exp.training.saving import CollapseError
from dino_exp.training.state import Best, TrainState
from dino_exp.training.verdict import NonFiniteError

log = logging.getLogger("dino_exp")

REPORT_SECS = 120.0  # for which the end of a training waits for its last report


class Work:
    """Everything that one attempt needs torch for."""

    def __init__(self, attempt: Attempt, code: CodeRecord, events: EventLog, ranks: Ranks = ONE_RANK) -> None:
        self.attempt, self.code, self.events, self.ranks = attempt, code, events, ranks
        self.config, self.paths = attempt.config, attempt.paths
        self.forked_metrics: dict[str, float] | None = None
        self.weights: dict[str, Any] | None = None
        self.manager: CheckpointManager | None = None
        self.latest: dict[str, float] = {} if attempt.record is None else dict(attempt.record.metrics)
        self.profile: Path | None = None
        self._leader: Writers | None = None
        self.trackers = Trackers(attempt, self.note_event)
        self.report = LiveReport(attempt.paths.directory) if attempt.config.logger.report else None

    def train(self) -> Outcome:
        """Build, restore, train to the stop, and print how it went."""
        recorded, ranks = self.attempt.record, self.ranks
        self.device, numerics = apply_numerics(self.config.runtime, recorded.numerics if recorded else {}, ranks.place)
        numerics |= build.decoding(self.config.data)
        with preparation(self.attempt, ranks) as how:
            self.data = build.build_data(self.config.data, how)
        self.attempt.lock.beat()
        fingerprint = ranks.from_first(self.data.train.fingerprint())
        plan = build.build_plan(self.config, len(self.data.train))
        check_schedule(self.attempt.target, plan.schedule)
        self.state = state = build.build_state(self.config, self.data.train.channels, self.device)
        # Before run.json: what does not fit leaves settings and a log, and no run.
        self.weights = self.take_weights(state)
        ranks.from_first(self.weights is not None)
        build.prepare_layers(self.config.runtime, state)
        self.parallel = build.spread(self.config, state, ranks)
        self.attempt.begin(
            self.code,
            schedule={"horizon_steps": plan.horizon_steps, "steps_per_epoch": plan.steps_per_epoch},
            data_fingerprint=fingerprint,
            numerics=numerics,
            weights=self.weights,
            why_not_exact=self.why_not_exact(numerics, fingerprint),
        )
        manager = build.build_manager(
            self.config.checkpoint,
            self.paths.checkpoints,
            attempt=self.attempt.number,
            guard=self.attempt.lock.check,
            on_event=self.note_event,
            on_commit=self.note_commit,
            writers=self.writers,
        )
        ranks.from_first(manager is not None)
        rows = RowWriter(self.paths.metrics)
        with contextlib.ExitStack() as stack:
            self.attempt.lock.beat()
            restored = self.restore(manager, state, rows)
            self.attempt.lock.beat()
            stack.callback(rows.close)
            batches = stack.enter_context(build.build_batches(self.config, self.data.train, state.step, ranks.place))
            self.attempt.lock.start_heartbeat()  # a thread: only after the workers have been started
            set_generators(restored, self.config.seed)
            opening(self.attempt, self.code, plan, self.device, numerics["threads"], state.step, self.weights)
            progress: Progress = stack.enter_context(self.progress(plan, state.step))
            if self.config.runtime.profile:
                progress = stack.enter_context(self.profiled(progress, plan, state.step))
            training = self.assemble(state, plan, batches, rows, manager, progress)
            if self.forked_metrics is not None:
                training.begun_with, training.latest = FORK, {"step": state.step, **self.forked_metrics}
            elif self.weights is not None:
                training.begun_with = WEIGHTS
            ranks.from_first(Beginning(rows.num_rows, training.begun_with, training.latest))
            self.manager = manager
            freeze_objects()
            stack.push(self.trackers.end_by)
            self.trackers.start(plan, state, is_sharded=self.parallel.is_sharded)
            return self.run(training)

    def end_report(self, outcome: Outcome | None) -> None:
        """Begin the last report, when everything is recorded; nobody waits for it after a signal or an error (None)."""
        if self.report is None:
            return
        self.note_event("reported", written=self.report.num_written, blocked_secs=round(self.report.blocked_secs, 6))
        self.report.begin_last(hurried=outcome is None or outcome.signum is not None)
        begin_sweep_page(self.paths.directory.parent.parent)

    def tell_end(self, outcome: Outcome) -> None:
        """The closing tables, after everything is recorded."""
        reported = self.report is not None and outcome.signum is None and self.report.wait(REPORT_SECS)
        closing(self.attempt, outcome, saved_step=self.saved_step, reported=reported, profile=self.profile)

    @property
    def saved_step(self) -> int | None:
        """The step of the newest checkpoint."""
        return None if self.manager is None else self.manager.latest_step()

    @property
    def writers(self) -> Writers | None:
        """The processes that write checkpoints; None where this one does alone."""
        if not isinstance(self.ranks, ManyRanks):
            return None
        if self._leader is None:
            from dino_exp.checkpoint.sharding.team import Leader

            self._leader = Leader(self.ranks.council, self.ranks.connect())
        return self._leader

    def why_not_exact(self, numerics: Mapping[str, Any], fingerprint: str) -> list[str]:
        """What changed since the first attempt that may change bits. Raises RefusedError for other data."""
        recorded = self.attempt.target.record
        unsure = [] if self.config.runtime.deterministic else ["runtime.deterministic is false"]
        if recorded is None:
            return unsure
        reasons = unsure + differences(recorded.numerics, numerics)
        changes = [change for change in self.attempt.target.changes if change.verdict == "warned"]
        reasons += [
            f"{c.key} was {setting_text(c.was)}, is {setting_text(c.now)}"
            for c in changes
            if not c.key.startswith("runtime.")
        ]
        if self.attempt.target.code_changed:
            reasons.append(f"code was {recorded.code.id[:8]}, is {self.code.id[:8]}")
        if recorded.data_fingerprint != fingerprint:
            found = f"data was {recorded.data_fingerprint}, is {fingerprint}"
            if self.config.run.on_data_change == "refuse":
                raise RefusedError(
                    f"{self.paths.directory}: {found}; put the old data back, or go on with `run.on_data_change=warn`"
                )
            reasons.append(found)
        for reason in reasons:
            log.warning("bit-equality with an uninterrupted run is not promised any more: %s", reason)
        return reasons

    def restore(self, manager: CheckpointManager | None, state: TrainState, rows: RowWriter) -> Manifest | None:
        """Bring state and rows to the newest good checkpoint, to a fork's origin, or to the start."""
        if self.ranks.from_first(manager is not None and manager.latest_step() is not None):
            assert manager is not None
            restored = manager.restore(state, optional=OPTIONAL, check=self.check_origin)
            rows.open_at(*position_of(restored.manifest))
            self.events.append("resumed", step=state.step, lost_steps=restored.lost_steps, reached=rows.reached)
            manifest, reasons = restored.manifest, self.inherited_reasons(restored.manifest)
        else:
            self.check_nothing_lost()
            rows.open_at(0, 0)
            if self.attempt.number > 1:
                self.events.append("began_again", reached=rows.reached)
            found = parent_checkpoints(self.attempt.target)
            self.ranks.from_first(found is not None)
            if found is None:
                if self.weights is not None:
                    self.events.append("weights_loaded", **self.weights)
                    log.info("began with %s: %s", self.weights["path"], self.weights["text"])
                return None
            reader, step = found
            manifest, reasons = reader.restore(state, step, optional=OPTIONAL, writers=self.writers), []
            # What was measured on other data is no measure here, and what had collapsed is never best.
            counts = manifest.healthy and not has_other_data(self.attempt.target)
            self.forked_metrics = self.ranks.from_first(dict(manifest.metrics) if counts else {})
            state.begin_as_fork(self.config.checkpoint.keep.metric, self.forked_metrics)
            self.events.append("forked", step=state.step)
        self.attempt.resumed(state.step, best_of(state.best), reasons)
        log.info("resumed at step=%d", state.step)
        return manifest

    def take_weights(self, state: TrainState) -> dict[str, Any] | None:
        """Begin with the weights of a file, where the settings name one and the run has no state yet; the report."""
        record = self.attempt.target.record
        is_child = self.attempt.target.parent is not None or (record is not None and record.parent is not None)
        if self.config.init.weights is None or is_child or CheckpointReader(self.paths.checkpoints).steps():
            return None
        return take_weights(self.config, state)

    def check_origin(self, manifest: Manifest) -> None:
        """Refuse a checkpoint of other settings than this run's, whoever put it here.

        Raises CorruptCheckpointError for one that no training of ours has saved: the next older one is taken.
        """
        found, expected = manifest.record.get("config_hash"), self.attempt.target.key.config_hash
        if found != expected:
            raise RefusedError(
                f"{self.paths.checkpoints}: the checkpoint of step {manifest.step} belongs to settings {found}, this "
                f"run has {expected}; give the run a directory of its own, or `fork=` from that one"
            )
        position_of(manifest)
        if manifest.state.get("step") != manifest.step:
            raise CorruptCheckpointError(f"its state is of step {str(manifest.state.get('step'))[:40]}")

    def check_nothing_lost(self) -> None:
        """Refuse to begin again from step 0 in a run that has saved checkpoints; say so where nothing ever was."""
        record = self.attempt.target.record
        if record is None or record.step == 0:
            return
        if any(event.get("kind") == "saved" for event in read_lines(self.paths.events)):
            raise NoCheckpointError(
                f"{self.paths.checkpoints}: no checkpoint is left, but the run had saved step {record.step}. Put them "
                "back, or start anew beside it with `run.variant=<name>`"
            )
        log.warning("nothing was ever saved in this run: it begins again where it began")

    def inherited_reasons(self, manifest: Manifest) -> list[str]:
        """Why the attempt that wrote this checkpoint was not exact any more."""
        record = self.attempt.record
        assert record is not None
        writer = record.attempts[manifest.attempt - 1] if manifest.attempt <= len(record.attempts) else None
        return [] if writer is None else list(writer.why_not_exact)

    def progress(self, plan: TrainingPlan, start_step: int) -> ConsoleProgress:
        """The console's progress bar, or plain lines."""
        choice, console = self.config.logger.console, self.attempt.console
        return ConsoleProgress(
            console,
            fancy=console.is_terminal if choice == "auto" else choice == "rich",
            start_step=start_step,
            stop_step=plan.stop_step,
            batch_size=plan.batch_size,
        )

    def profiled(self, progress: Progress, plan: TrainingPlan, start_step: int) -> ProfiledProgress:
        """The same progress, with some of its steps profiled."""
        return ProfiledProgress(
            progress,
            self.paths.profile,
            attempt=self.attempt.number,
            start_step=start_step,
            stop_step=plan.stop_step,
            device=self.device,
            guard=self.attempt.lock.check,
            on_written=self.note_profile,
        )

    def note_profile(self, profile: Profile) -> None:
        """Some steps were profiled."""
        self.profile = profile.table
        self.note_event("profiled", first=profile.first_step, last=profile.last_step, table=profile.table.name)

    def assemble(
        self,
        state: TrainState,
        plan: TrainingPlan,
        batches: Any,
        rows: RowWriter,
        manager: CheckpointManager | None,
        progress: Progress,
    ) -> Training:
        """The parts of the loop."""
        schedules = build.build_schedules(self.config, plan.steps_per_epoch)
        augment = build.build_augment(self.config)
        evaluator = None
        if self.config.evaluation.every_epochs is not None:
            evaluator = build.build_evaluator(self.config, self.data, augment, schedules, self.parallel)
            for remark in remarks_on(evaluator.panel, self.config.checkpoint.keep):
                log.warning("%s", remark)
        return Training(
            state=state,
            batches=build.build_prefetch(batches, self.device),
            augment=augment,
            schedules=schedules,
            rule=build.build_rule(self.config, read_every=build.read_every(state)),
            plan=plan,
            evaluator=evaluator,
            rows=rows,
            manager=manager,
            signals=signals_of(self.attempt.signals, self.ranks),
            progress=progress,
            record=self.manifest_record(),
            guard=self.attempt.lock.check,
            on_row=self.note_row,
            on_trouble=self.note_trouble,
            secs_left=self.countdown(),
            parallel=self.parallel,
        )

    def countdown(self) -> Callable[[], float | None]:
        """How long the machine is still there; nobody looks where no save is to come before its end."""
        save = self.config.checkpoint.save
        end = None if save.before_secs is None else deadline_secs(save.deadline, os.environ, time.time())
        return countdown(end, time.time)

    def manifest_record(self) -> dict[str, Any]:
        """What every manifest says about where it comes from."""
        record = self.attempt.record
        assert record is not None
        return {
            "run_key": record.run_key,
            "config_hash": config_hash(self.config),
            "group_hash": group_hash(self.config),
            "code_id": self.code.id,
            "git_commit": self.code.commit,
            "git_dirty": self.code.dirty,
            "data_fingerprint": record.data_fingerprint,
            "config": self.attempt.canonical(),
            "parent": record.parent,
            "versions": {"torch": torch.__version__},
        }

    def run(self, training: Training) -> Outcome:
        """The loop; failures that the user can mend are told what to type."""
        try:
            return run_training(training)
        except (NonFiniteError, NonFiniteStateError, CollapseError) as error:
            error.add_note(self.advice(training))
            raise

    def advice(self, training: Training) -> str:
        """The last healthy checkpoint and the line that goes on from it with other settings."""
        healthy = [] if training.manager is None else training.manager.healthy_steps()
        if not healthy:
            return "no healthy checkpoint exists: start again with a lower optimizer.lr or a longer warm-up"
        fork = override("fork", f"{self.paths.directory}@{healthy[-1]}")
        return (
            f"the last healthy checkpoint is that of step {healthy[-1]}; to go on from it with other settings:\n"
            f"  {train_command(fork, f'optimizer.lr={self.config.optimizer.lr / 2:g}')}"
        )

    def note_row(self, row: Mapping[str, Any], best: Best | None) -> None:
        """Keep the latest metrics in `run.json` (at evaluations, and with every checkpoint)."""
        self.latest |= {name: value for name, value in row.items() if isinstance(value, float)}
        if is_evaluated(row):
            self.attempt.update(metrics=dict(self.latest), best=best_of(best))
            if self.report is not None:
                self.report.refresh()
        self.trackers.note_row(row["step"], self.state.student)

    def note_commit(self, info: CheckpointInfo) -> None:
        """A checkpoint was committed: `run.json` says how far the run has come. Called by the thread that saves."""
        self.attempt.update(step=info.step, epochs_done=info.epoch, metrics=dict(self.latest), failed_save=None)
        self.attempt.note_in_catalogue()

    def note_trouble(self, failure: SaveFailedError) -> None:
        """A checkpoint could not be saved: `run.json` says so until one succeeds."""
        at = utc_text(time.time())
        self.attempt.update(failed_save=FailedSave(step=failure.step, error=failure.problem, at=at))
        self.note_event("save_failed", step=failure.step, error=failure.problem)

    def note_event(self, kind: str, **fields: Any) -> None:
        """What the checkpoint library did goes to `events.jsonl`; it says trouble aloud itself."""
        try:
            self.events.append(kind, **fields)
        except OSError as problem:
            log.warning("events.jsonl could not be written (%s); training goes on", problem)

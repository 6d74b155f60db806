"""Checkpoints of which a part was kept: nothing goes on from one, and comparing with one finds no false difference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from cli_samples import make_run
from config_examples import config, mapping
from runs_samples import sample_record
from support.checkpoints import KINDS, CodedState, open_manager, request

from dino_exp.attempts.fork import check_schedule, fork_target, parent_checkpoints
from dino_exp.attempts.reproduction import Span, choose_span, compare_replay
from dino_exp.attempts.target import Target, refuse_identity_changes, refuse_older
from dino_exp.checkpoint.manifest import Manifest, manifest_to_bytes
from dino_exp.checkpoint.policies import KeepAny, LatestN
from dino_exp.checkpoint.reader import CheckpointReader
from dino_exp.checkpoint.types import Schedule
from dino_exp.config.compare import Change
from dino_exp.config.stored import write_stored
from dino_exp.errors import ConfigError, NoCheckpointError, RefusedError
from dino_exp.runs.layout import RunPaths
from dino_exp.runs.record import Schedule as RecordSchedule
from dino_exp.runs.record import save_record

FILE = {"path": "/w.pth"}
ALL = KeepAny((LatestN(9),))
THINNED = 2  # of the steps 1 to 4


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    """A run whose second step was thinned when later ones came; the others are whole."""
    return made(tmp_path / "outputs")


def made(outputs: Path) -> RunPaths:
    paths = RunPaths(make_run(outputs))
    KINDS["thinned"].save_steps(paths.checkpoints, [1, THINNED, 3], keep=KINDS["thinned"].keep)
    whole = open_manager(paths.checkpoints, keep=ALL, storage=KINDS["thinned"].storage)
    whole.save(CodedState(4), request(4))
    whole.drain()
    paths.metrics.write_bytes(b"")
    write_stored(config(), paths.directory)
    return paths


def steps(paths: RunPaths) -> dict[int, bool]:
    return {info.step: info.resumable for info in CheckpointReader(paths.checkpoints).infos()}


def change(paths: RunPaths, step: int, by: Callable[[Manifest], Manifest]) -> None:
    manifest = by(CheckpointReader(paths.checkpoints).manifest(step))
    (paths.checkpoints / f"step-{step:09d}.json").write_bytes(manifest_to_bytes(manifest))


def test_the_run_is_what_these_tests_need(paths: RunPaths) -> None:
    assert steps(paths) == {THINNED: False, 3: True, 4: True}


def test_a_replay_begins_at_the_first_whole_checkpoint(paths: RunPaths) -> None:
    record = sample_record(step=4, weights=FILE)
    assert choose_span(paths, record, at=None, num_steps=None) == Span(start=3, stop=4)


def test_a_replay_from_a_thinned_checkpoint_is_refused_by_name(paths: RunPaths) -> None:
    for origin in (None, FILE):
        record = sample_record(step=4, weights=origin)
        with pytest.raises(
            NoCheckpointError,
            match=r"--at 2: only a part .* \(teacher\).* nearest .* step 3\..* checkpoints list /\S+$",
        ):
            choose_span(paths, record, at=THINNED, num_steps=None)


def test_a_thinned_state_is_compared_by_the_digest_of_the_whole(paths: RunPaths, tmp_path: Path) -> None:
    copy = RunPaths(make_run(tmp_path / "copy"))
    KINDS["thinned"].save_steps(copy.checkpoints, [1, THINNED, 3], keep=ALL)
    copy.metrics.write_bytes(b"")
    span = Span(start=1, stop=3)
    for ours, theirs in ((paths, copy), (copy, paths)):
        found = compare_replay(ours, theirs, span)
        assert (found.states, found.difference) == ((2, 3), None)
    change(copy, THINNED, lambda one: replace(one, state_digest="s1:" + "0" * 64))
    difference = compare_replay(paths, copy, span).difference
    assert difference is not None
    assert difference.what == "the state, in tensors that were not kept"
    assert difference.now == "s1:" + "0" * 64


def test_a_difference_is_named_among_what_both_have(paths: RunPaths, tmp_path: Path) -> None:
    copy = RunPaths(make_run(tmp_path / "copy"))
    manager = open_manager(copy.checkpoints, keep=ALL)
    manager.save(CodedState(7), request(THINNED))
    manager.drain()
    copy.metrics.write_bytes(b"")
    difference = compare_replay(paths, copy, Span(start=1, stop=2)).difference
    assert difference is not None
    assert difference.what.startswith("teacher.")
    assert None not in (difference.was, difference.now)


def fork(paths: RunPaths, at: int, *more: str) -> Target:
    outputs = paths.directory.parent.parent
    words = (f"fork={paths.directory}@{at}", f"paths.outputs={outputs}", "train.epochs=99", *more)
    return fork_target(mapping(*words), {"train.epochs"})


def test_a_fork_of_a_thinned_checkpoint_is_refused_before_anything_is_made(paths: RunPaths) -> None:
    with pytest.raises(
        NoCheckpointError, match=r"fork=.*@2: only a part .* nearest whole ones are of step 3"
    ) as caught:
        fork(paths, THINNED)
    assert caught.value.exit_code == 4
    assert [path.name for path in paths.directory.parent.iterdir()] == [paths.directory.name]


def test_a_child_whose_origin_was_thinned_before_it_began_is_told_so(paths: RunPaths) -> None:
    target = fork(paths, 3)
    thin = CheckpointReader(paths.checkpoints).manifest(THINNED)
    assert parent_checkpoints(target) is not None
    parent = {**dict(target.parent or {}), "step": THINNED, "state_digest": thin.full_state_digest}
    with pytest.raises(NoCheckpointError, match="only a part of the checkpoint of step 2"):
        parent_checkpoints(replace(target, parent=parent))


def test_a_child_of_other_epochs_begins_where_one_of_its_parent_ends(paths: RunPaths) -> None:
    save_record(paths.run_json, sample_record(schedule=RecordSchedule(horizon_steps=100, steps_per_epoch=2)))
    check_schedule(fork(paths, 3), Schedule(198, 2))
    check_schedule(fork(paths, 4), Schedule(693, 7))
    with pytest.raises(ConfigError, match=r"step 3 .* 2 steps an epoch; .* there are 7, .*: `fork=\S+@4`$"):
        check_schedule(fork(paths, 3), Schedule(693, 7))
    with pytest.raises(ConfigError, match=r"at step 4 of 4; extend it: train\.epochs=5 or more, .*: fork=\S+@3$"):
        check_schedule(fork(paths, 4), Schedule(4, 1))
    save_record(paths.run_json, sample_record(schedule=RecordSchedule(horizon_steps=100, steps_per_epoch=5)))
    with pytest.raises(ConfigError, match="none is left"):
        check_schedule(fork(paths, 3), Schedule(693, 7))
    save_record(paths.run_json, sample_record(schedule=RecordSchedule(horizon_steps=100, steps_per_epoch=1)))
    with pytest.raises(ConfigError, match=r"at step 3 of 3; extend it: train\.epochs=4 or more$"):
        check_schedule(fork(paths, 3), Schedule(3, 1))


@pytest.mark.parametrize(
    ("key", "forkable"),
    [("optimizer.lr", True), ("init.weights_digest", False), ("model.embed_dim", False), ("loss.out_dim", False)],
)
def test_a_fork_is_advised_only_where_it_can_be(paths: RunPaths, key: str, forkable: bool) -> None:
    change = Change(key=key, was=1, now=2, role="identity", verdict="refused")
    with pytest.raises(RefusedError, match=r"dino_exp\.train x=1   # from nothing") as caught:
        refuse_identity_changes(paths, [change], [f"resume={paths.directory}", "x=1"])
    assert (f"fork={paths.directory}@4 x=1   # from its step 4" in str(caught.value)) == forkable


@pytest.mark.parametrize(("horizon", "step"), [(4, 3), (3, None)])
def test_a_fork_is_advised_from_a_step_before_the_end(paths: RunPaths, horizon: int, step: int | None) -> None:
    save_record(paths.run_json, sample_record(schedule=RecordSchedule(horizon_steps=horizon, steps_per_epoch=1)))
    change = Change(key="optimizer.lr", was=1, now=2, role="identity", verdict="refused")
    with pytest.raises(RefusedError, match="# from nothing") as caught:
        refuse_identity_changes(paths, [change])
    assert ("fork=" in str(caught.value)) == (step is not None)
    assert step is None or f"@{step} " in str(caught.value)
    longer = Change(key="train.epochs", was=horizon, now=5, role="identity", verdict="refused")
    with pytest.raises(RefusedError, match="@4 "):
        refuse_identity_changes(paths, [longer])


def test_what_is_advised_says_what_the_run_was_begun_with(paths: RunPaths) -> None:
    paths.hydra_dir.mkdir()
    (paths.hydra_dir / "overrides.yaml").write_text("[seed=1, +run.note=x, fork=last]")
    change = Change(key="seed", was=1, now=2, role="identity", verdict="refused")
    with pytest.raises(RefusedError) as caught:
        refuse_identity_changes(paths, [change], ["resume=last", "seed=2", 'run.tags=["a b"]'])
    assert "  python -m dino_exp.train +run.note=x seed=2 'run.tags=[\"a b\"]'   # from nothing" in str(caught.value)


def test_a_resume_of_a_thinned_checkpoint_advises_forks_that_work(paths: RunPaths) -> None:
    with pytest.raises(RefusedError, match=r"only a part of it was kept\. .*fork=\S+@3`$") as caught:
        refuse_older(paths, str(THINNED))
    assert "@2`" not in str(caught.value)
    with pytest.raises(RefusedError, match=r"@3: not the newest .*: `python \S+ \S+ fork=\S+@3`$"):
        refuse_older(paths, "3")

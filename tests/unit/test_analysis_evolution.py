"""Evolution over constructed checkpoints: golden numbers, worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from analysis_samples import PROTOTYPES, QKV, save_states, tiny_state
from support.checkpoints import THIN_TO_TEACHER, flip, pack_of

from dino_exp.analysis import evolution
from dino_exp.analysis.evolution import chosen_weights, parameters_of, walk
from dino_exp.checkpoint.policies import KeepAny, LatestN, Milestones, milestone_from_text
from dino_exp.checkpoint.storage import Storage
from dino_exp.checkpoint.store import Store


def close(value: float) -> object:
    return pytest.approx(value, rel=1e-9)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_states(tmp_path, {10: tiny_state(1.0), 20: tiny_state(2.0, gap=3.0)})
    return tmp_path


def test_golden_numbers(folder: Path) -> None:
    first, second = walk(Store(folder), [10, 20])
    assert (first.step, first.epoch, first.epochs, first.problem) == (10, 5, 1.0, None)
    assert first.total.student_norm == close(math.sqrt(27))  # 5² of the attention, 2 of the prototypes
    assert (first.total.change, first.total.relative_change) == (None, None)
    assert first.total.distance == 0.0
    assert first.total.cosine == close(1.0)
    assert second.total.change == close(math.sqrt(27))  # from one to two times the same
    assert second.total.relative_change == close(1.0)
    assert second.total.distance == close(3.0)
    assert second.total.teacher_norm == close(math.sqrt(4 * 27 + 9))
    assert second.total.cosine == close(math.sqrt(108 / 117))
    assert second.total.first_moment == close(math.sqrt(6 * 0.25))
    assert second.total.second_moment == close(math.sqrt(10 + 2e-6))
    assert second.blocks["backbone.blocks.0"].student_norm == close(10.0)
    assert second.blocks["head.last_layer"].distance == 0.0
    assert list(second.blocks) == ["backbone.blocks.0", "head.last_layer"]  # and no batch-norm statistics
    assert (second.dead_prototypes, second.num_prototypes) == (1, 3)
    assert second.spectra[QKV].spectral_norm == close(8.0)
    assert second.spectra[PROTOTYPES].effective_rank == pytest.approx(2.0)


def test_a_large_student_is_read_again_with_the_same_result(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = list(walk(Store(folder), [10, 20]))
    monkeypatch.setattr(evolution, "_KEPT_BYTES", 0)
    loaded: list[str] = []
    load = evolution.OpenCheckpoint.load
    monkeypatch.setattr(evolution.OpenCheckpoint, "load", lambda self, name: (loaded.append(name), load(self, name))[1])
    assert list(walk(Store(folder), [10, 20])) == kept
    assert loaded.count(f"student.{QKV}") == 3


@pytest.mark.parametrize("codec", ["zstd", "delta"])
def test_codecs_make_no_difference(folder: Path, tmp_path: Path, codec: str) -> None:
    other = tmp_path / "other"
    other.mkdir()
    save_states(other, {10: tiny_state(1.0), 20: tiny_state(2.0, gap=3.0)}, storage=Storage(codec=codec, max_chain=2))
    assert list(walk(Store(other), [10, 20])) == list(walk(Store(folder), [10, 20]))


def test_what_a_thinned_checkpoint_does_not_hold_is_none(tmp_path: Path) -> None:
    keep = KeepAny((LatestN(1), Milestones((milestone_from_text("5"),)), THIN_TO_TEACHER))
    save_states(tmp_path, {10: tiny_state(1.0), 50: tiny_state(2.0), 60: tiny_state(3.0)}, keep=keep)
    thinned, whole = walk(Store(tmp_path), Store(tmp_path).steps())
    assert (thinned.step, thinned.total.student_norm) == (50, None)
    assert thinned.total.teacher_norm is not None
    assert thinned.total.first_moment is None
    assert QKV in thinned.spectra  # of the teacher
    assert whole.total.change is None  # there is no student before it


def test_a_damaged_checkpoint_is_told_and_the_next_is_compared_with_the_one_before(folder: Path) -> None:
    save_states(folder, {30: tiny_state(4.0)})
    flip(pack_of(folder, 20), -3)
    first, damaged, third = walk(Store(folder), [10, 20, 30])
    assert damaged.problem is not None
    assert "digest" in damaged.problem
    assert damaged.total.student_norm is None
    assert (damaged.epoch, damaged.epochs) == (10, 2.0)  # by its manifest, which is whole
    assert third.total.relative_change == close(3.0)  # from 1 to 4
    assert first.problem is None


def test_a_manifest_that_cannot_be_read_is_damage_and_a_step_that_is_gone_is_left_out(folder: Path) -> None:
    flip(Store(folder).manifest_path(20), 40)
    found = list(walk(Store(folder), [5, 10, 20]))
    assert [moment.step for moment in found] == [10, 20]
    assert found[1].problem is not None
    assert (found[1].epoch, found[1].epochs) == (None, None)


def test_no_checkpoints_no_moments(tmp_path: Path) -> None:
    assert list(walk(Store(tmp_path), [])) == []


def test_types_of_half_precision_are_measured(tmp_path: Path) -> None:
    numbers = torch.tensor([3.0, 4.0])
    state = {"student.backbone.norm.weight": numbers.bfloat16(), "teacher.backbone.norm.weight": numbers.half()}
    save_states(tmp_path, {10: state})
    (found,) = walk(Store(tmp_path), [10])
    assert (found.total.student_norm, found.total.teacher_norm) == (5.0, 5.0)


def test_progress_hears_of_every_byte_once(folder: Path) -> None:
    heard: list[int] = []
    list(walk(Store(folder), [10, 20], progress=heard.append))
    state = tiny_state(1.0)
    measured = [name for name in state if not name.endswith((".step", "running_mean"))]
    assert sum(heard) == 2 * sum(state[name].numel() * 4 for name in measured)


def test_which_weights_are_chosen() -> None:
    names = [f"backbone.blocks.{place}.attn.qkv.weight" for place in range(12)] + [PROTOTYPES]
    assert chosen_weights(sorted(names)) == (names[0], names[6], names[11], PROTOTYPES)  # by number, not as text
    assert chosen_weights([]) == ()
    assert parameters_of(["student.a.weight", "teacher.a.weight", "optimizer.a.weight.step", "loss.center"]) == [
        "a.weight"
    ]

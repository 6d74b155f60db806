"""Two constructed checkpoints compared: golden numbers, and everything that only one of them has."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from analysis_samples import PROTOTYPES, QKV, save_states, tiny_state
from support.checkpoints import flip, pack_of

from dino_exp.analysis.comparison import Comparison, compare_checkpoints, largest_first, relative_by_layer
from dino_exp.analysis.figures.comparison import draw_comparison
from dino_exp.checkpoint.store import Store


def compared(folder: Path, a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], **options: object):
    save_states(folder, {10: a, 20: b}, **options)
    return compare_checkpoints((Store(folder), 10), (Store(folder), 20))


def test_golden_numbers(tmp_path: Path) -> None:
    found = compared(tmp_path, tiny_state(1.0), tiny_state(2.0, gap=3.0))
    tensors = {one.name: one for one in found.tensors}
    qkv = tensors[f"teacher.{QKV}"]
    assert qkv.change == pytest.approx((25 + 9) ** 0.5)
    assert qkv.relative == pytest.approx((34 / 25) ** 0.5)
    assert qkv.cosine == pytest.approx(50 / (5 * 109**0.5))
    assert (qkv.largest, qkv.norm_a) == (4.0, 5.0)
    assert tensors[f"optimizer.{PROTOTYPES}.exp_avg"].is_equal
    assert not found.is_equal
    order = largest_first(found.tensors)
    assert order[0].name == f"teacher.{QKV}"
    assert order[-1].name.endswith((".step", ".exp_avg", ".exp_avg_sq", "running_mean"))
    assert relative_by_layer(found.tensors, "student") == pytest.approx(
        {("backbone.blocks.0", "attn.qkv"): 1.0, ("head.last_layer", ""): 1.0}
    )
    assert not any("teacher" in picture_text(found, part) for part in (None, "student"))
    assert "Teacher: from step 10 of" in picture_text(found, "teacher")
    assert "to step 20" in picture_text(found, "teacher")


def picture_text(found: Comparison, part: str | None) -> str:
    drawn = draw_comparison(found, part)
    assert drawn.title in drawn.svg().replace("\n", " ")
    return drawn.svg()


def test_equal_checkpoints_are_equal(tmp_path: Path) -> None:
    found = compared(tmp_path, tiny_state(1.0), tiny_state(1.0))
    assert found.is_equal
    assert {one.relative for one in found.tensors} == {0.0}


def test_order_by_angle_and_by_absolute_change(tmp_path: Path) -> None:
    a = {"student.x": torch.tensor([1.0, 0.0]), "student.y": torch.tensor([100.0, 0.0]), "student.z": torch.zeros(2)}
    b = {"student.x": torch.tensor([0.0, 1.0]), "student.y": torch.tensor([200.0, 0.0]), "student.z": torch.ones(2)}
    found = compared(tmp_path, a, b).tensors
    by = {name: [one.name[-1] for one in largest_first(found, name)] for name in ("relative", "change", "cosine")}
    assert by["relative"] == ["z", "x", "y"]  # from zero is beyond every ratio
    assert by["change"] == ["y", "x", "z"]
    assert by["cosine"] == ["z", "x", "y"]


def test_what_only_one_has_and_what_has_another_shape_comes_first(tmp_path: Path) -> None:
    a = {"student.a": torch.ones(2), "student.both": torch.ones(2), "student.shape": torch.ones(2)}
    b = {"student.b": torch.ones(2), "student.both": torch.full((2,), 9.0), "student.shape": torch.ones(3)}
    order = largest_first(compared(tmp_path, a, b).tensors)
    assert [(one.name, one.only_in) for one in order[:3]] == [
        ("student.a", "a"), ("student.shape", None), ("student.b", "b"),
    ]  # fmt: skip
    assert order[1].problem == "shape [2], in B [3]"


def test_metrics_settings_and_origin_that_differ(tmp_path: Path) -> None:
    metrics = {10: {"loss": 2.0, "knn_top1": float("nan")}, 20: {"loss": 1.0, "knn_top1": float("nan")}}
    found = compared(tmp_path, tiny_state(1.0), tiny_state(2.0), metrics=metrics)
    assert found.metrics == ({"key": "loss", "a": 2.0, "b": 1.0},)
    assert found.settings == ()
    assert found.origin == ()


def test_damage_is_told_at_the_tensor_that_has_it(tmp_path: Path) -> None:
    save_states(tmp_path, {10: tiny_state(1.0), 20: tiny_state(2.0)})
    flip(pack_of(tmp_path, 20), -3)
    found = compare_checkpoints((Store(tmp_path), 10), (Store(tmp_path), 20))
    damaged = [one for one in found.tensors if one.problem is not None]
    assert len(damaged) == 1
    assert "digest" in str(damaged[0].problem)
    assert len([one for one in found.tensors if one.change is not None]) == len(found.tensors) - 1

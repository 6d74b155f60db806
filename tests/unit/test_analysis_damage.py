"""Which parts of a checkpoint are damaged, in few words."""

from __future__ import annotations

import pytest

from dino_exp.analysis.damage import summarise
from dino_exp.analysis.names import block_of, part_of

BLOCK = "backbone.blocks.7"
TENSORS = [
    f"student.{BLOCK}.attn.qkv.weight",
    f"student.{BLOCK}.norm1.bias",
    "student.head.last_layer.weight_v",
    f"teacher.{BLOCK}.attn.qkv.weight",
    f"teacher.{BLOCK}.norm1.bias",
    "teacher.backbone.norm.weight",
    "teacher.head.mlp.0.weight",
    f"optimizer.{BLOCK}.norm1.bias.exp_avg",
    "optimizer.backbone.norm.weight.step",
    "loss.center",
]


@pytest.mark.parametrize(
    ("tensor", "part", "block"),
    [
        ("teacher.backbone.blocks.7.attn.qkv.weight", "teacher", "backbone.blocks.7"),
        ("optimizer.backbone.blocks.11.norm1.bias.exp_avg", "optimizer", "backbone.blocks.11"),
        ("student.head.mlp.0.weight", "student", "head.mlp.0"),
        ("student.head.last_layer.weight_v", "student", "head.last_layer"),
        ("student.backbone.cls_token", "student", "backbone.cls_token"),
        ("loss.center", "loss", "center"),
        ("weight", "weight", "weight"),
    ],
)
def test_where_a_tensor_is(tensor: str, part: str, block: str) -> None:
    assert (part_of(tensor), block_of(tensor)) == (part, block)


@pytest.mark.parametrize(
    ("damaged", "elsewhere", "text"),
    [
        (
            [f"teacher.{BLOCK}.attn.qkv.weight", f"teacher.{BLOCK}.norm1.bias"],
            False,
            "teacher backbone.blocks.7 damaged (2 tensors); student, optimizer, loss fine",
        ),
        (
            ["loss.center", "loss.center", "teacher.head.mlp.0.weight"],  # one tensor may be damaged in two chunks
            False,
            "teacher head.mlp.0 damaged (1 tensor); loss damaged (1 tensor, all of it); student, optimizer fine",
        ),
        (
            [name for name in TENSORS if name.startswith("student.")],
            True,
            "student damaged (3 tensors, all of it); teacher, optimizer, loss fine",
        ),
        ([], True, "bytes outside the tensors damaged; student, teacher, optimizer, loss fine"),
        (
            TENSORS,
            True,
            "student damaged (3 tensors, all of it); teacher damaged (4 tensors, all of it); "
            "optimizer damaged (2 tensors, all of it); loss damaged (1 tensor, all of it)",
        ),
    ],
)
def test_parts_and_blocks(damaged: list[str], elsewhere: bool, text: str) -> None:
    assert summarise(damaged, TENSORS, elsewhere=elsewhere) == text


def test_many_places_are_counted() -> None:
    tensors = [f"teacher.backbone.blocks.{index}.norm1.bias" for index in range(12)]
    text = summarise(tensors[:7], tensors)
    assert text == (
        "teacher backbone.blocks.0, backbone.blocks.1, backbone.blocks.2, backbone.blocks.3 and 3 more places damaged "
        "(7 tensors)"
    )


def test_other_parts_follow_by_name_and_an_unreadable_manifest_has_none() -> None:
    assert summarise(["z.a"], ["b.a", "z.a", "z.b", "teacher.a"]) == "z a damaged (1 tensor); teacher, b fine"
    assert "manifest cannot be read" in summarise([], [])

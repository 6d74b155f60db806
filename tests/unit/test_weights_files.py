"""Files of weights from strangers: read as data, never run, in bounded memory; or refused with one message."""

from __future__ import annotations

import argparse
import io
import json
import pickle
import struct
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import strategies as st
from support.hostile import amounts, fuzz, memory_bound, torn
from weights_samples import teacher_of, trained_state

from dino_exp.errors import DinoExpError, RefusedError, UsageError
from dino_exp.fsio import DamagedFileError
from dino_exp.weights.files import file_digest, read_weight_file
from dino_exp.weights.names import to_hub, with_prefix

STATE = trained_state()
BACKBONE = {name: tensor.clone() for name, tensor in teacher_of(STATE).state_dict().items()}
TEACHER = {name: tensor.clone() for name, tensor in STATE.teacher.state_dict().items()}
NUM_HEAD = len(TEACHER) - len(BACKBONE)


def saved(value: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def put(tmp_path: Path, data: bytes, name: str = "w.pth") -> Path:
    path = tmp_path / name
    path.write_bytes(data)
    return path


def official_full() -> bytes:
    """What the official program writes: arguments in a Namespace, learning rates as numpy scalars."""
    groups = [{"lr": np.float64(1e-3), "weight_decay": np.float64(0.04), "params": [0, 1]}]
    return saved(
        {
            "student": with_prefix("module.", STATE.student.state_dict()),
            "teacher": with_prefix("module.", TEACHER),
            "optimizer": {"state": {0: {"step": 3, "exp_avg": torch.zeros(2)}}, "param_groups": groups},
            "epoch": 100,
            "args": argparse.Namespace(arch="vit_small", lr=5e-4, crops=(0.4, 1.0)),
            "dino_loss": OrderedDict(center=torch.zeros(1, 24)),
            "fp16_scaler": None,
        }
    )


GOOD: dict[str, tuple[Callable[[], bytes], str | None, int]] = {
    "official full checkpoint": (official_full, "teacher", NUM_HEAD),
    "official backbone": (lambda: saved(BACKBONE), None, 0),
    "ordered dictionary of parameters": (
        lambda: saved(OrderedDict({k: torch.nn.Parameter(v) for k, v in BACKBONE.items()})), None, 0,
    ),
    "student only": (lambda: saved({"student": with_prefix("module.", TEACHER), "epoch": 1}), "student", NUM_HEAD),
    "state_dict of a wrapper": (lambda: saved({"state_dict": with_prefix("_orig_mod.", BACKBONE)}), "state_dict", 0),
    "timm with classifier": (
        lambda: safetensors.torch.save({**BACKBONE, "head.weight": torch.ones(10, 16), "head.bias": torch.ones(10)}),
        None, 2,
    ),
    "HuggingFace": (lambda: safetensors.torch.save(with_prefix("vit.", to_hub(BACKBONE))), None, 0),
    "half precision": (lambda: safetensors.torch.save({k: v.half() for k, v in BACKBONE.items()}), None, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_what_others_write_is_read(name: str, tmp_path: Path) -> None:
    make, part, num_head = GOOD[name]
    path = put(tmp_path, make())
    file = read_weight_file(path)
    assert (file.part, len(file.model.head), file.digest) == (part, num_head, file_digest(path))
    assert file.is_hub == (name == "HuggingFace")
    assert file.model.backbone.keys() == BACKBONE.keys()
    exact = name != "half precision"
    for key, tensor in BACKBONE.items():
        found = file.model.backbone[key]
        assert torch.equal(found, tensor) if exact else torch.allclose(found.float(), tensor, atol=1e-3)


def test_a_part_by_name(tmp_path: Path) -> None:
    path = put(tmp_path, official_full())
    assert read_weight_file(path, "student").part == "student"
    one = put(tmp_path, saved({"teacher": BACKBONE}), "one.pth")
    with pytest.raises(UsageError, match="holds no student; it holds teacher"):
        read_weight_file(one, "student")


class Code:
    """Calls something when it is unpickled."""

    def __init__(self, call: Any, *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> Any:
        return self.call, self.arguments


def test_the_values_that_official_checkpoints_hold_beside_tensors_are_never_made(tmp_path: Path) -> None:
    """Their classes are known, and not called: this scalar would take 8 GB of zeros."""
    scalar = np.float64(1).__reduce__()[0]
    enormous = [Code(scalar, np.dtype("V2000000000"), None) for _ in range(4)]
    data = saved({"teacher": BACKBONE, "args": argparse.Namespace(a=1), "lr": enormous})
    with memory_bound(1 << 30):
        assert read_weight_file(put(tmp_path, data)).part == "teacher"


ran: list[str] = []


def run_me(what: str) -> None:
    ran.append(what)


def legacy_pickle() -> bytes:
    return saved({"teacher": BACKBONE}, _use_new_zipfile_serialization=False)


def zipped(data: bytes, change: Callable[[str, bytes], bytes] = lambda _, data: data, **options: Any) -> bytes:
    """The archive of `torch.save` written again, with some members changed or packed."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", **options) as new:
        for member in old.infolist():
            new.writestr(member.filename, change(member.filename, old.read(member)))
    return out.getvalue()


def replaced_in_pickle(old: bytes, new: bytes) -> Callable[[str, bytes], bytes]:
    def change(name: str, data: bytes) -> bytes:
        if not name.endswith("data.pkl"):
            return data
        assert old in data
        return data.replace(old, new)

    return change


TEN = saved({"teacher": {"norm.weight": torch.arange(10.0)}})
CASES: dict[str, tuple[Callable[[], bytes], type[DinoExpError], str]] = {
    "code": (lambda: saved({"teacher": BACKBONE, "x": Code(run_me, "pth")}), RefusedError, "run_me, which unpickling"),
    "os.system": (lambda: saved({"x": Code(eval, "1/0")}), RefusedError, "eval, which unpickling would call"),
    "a class of theirs": (lambda: saved({"teacher": BACKBONE, "y": Path("x")}), RefusedError, "pathlib"),
    "a bare pickle": (lambda: pickle.dumps(Code(run_me, "bare")), RefusedError, "neither safetensors nor"),
    "before torch 1.6": (legacy_pickle, RefusedError, "since torch 1.6"),
    "packed": (
        lambda: zipped(saved({"teacher": {"a": torch.zeros(10**6)}}), compression=zipfile.ZIP_DEFLATED),
        RefusedError, "compressed",
    ),
    "a list": (lambda: saved([torch.zeros(2)]), RefusedError, "holds a list"),
    "a number": (lambda: saved(3), RefusedError, "holds a int"),
    "no tensors": (lambda: saved({"teacher": {"a": 1}}), RefusedError, "holds no tensors"),
    "names that are none": (lambda: saved({"teacher": {3: torch.zeros(2)}}), DamagedFileError, "not a plain tensor"),
    "a view larger than the file": (
        lambda: saved({"pos_embed": torch.zeros(1).expand(1, 10**9, 64)}), DamagedFileError, "not a plain tensor",
    ),
    "sparse": (lambda: saved({"a": torch.eye(3).to_sparse()}), DamagedFileError, "not a plain tensor"),
    "meta": (lambda: saved({"a": torch.zeros(3, device="meta")}), DamagedFileError, "not a plain tensor"),
    "nested": (
        lambda: saved({"a": nested()}), DamagedFileError, "not a plain tensor",
    ),
    "a storage that claims more": (
        lambda: zipped(TEN, replaced_in_pickle(b"K\nt", b"Kdt")), DamagedFileError, "torch cannot read it",
    ),
    "a view past its storage": (
        lambda: zipped(TEN, replaced_in_pickle(b"K\n\x85", b"Kd\x85")), DamagedFileError, "torch cannot read it",
    ),
    "a storage that is not there": (
        lambda: zipped(TEN, replaced_in_pickle(b"\x01\x00\x00\x000", b"\x01\x00\x00\x009")), DamagedFileError, "torch",
    ),
    "cut": (lambda: saved(BACKBONE)[:3000], DamagedFileError, "not a whole file"),
    "empty": (lambda: b"", RefusedError, "neither safetensors nor"),
    "an empty archive": (lambda: zipped(zipped(TEN))[-22:], RefusedError, "neither"),
    "text": (lambda: b"version https://git-lfs.github.com/spec/v1\n", RefusedError, "neither"),
    "safetensors, cut": (lambda: safetensors.torch.save(BACKBONE)[:-1], DamagedFileError, "not safetensors"),
    "safetensors, a header of absurd length": (
        lambda: struct.pack("<Q", 2**62) + b"{" + b" " * 99, DamagedFileError, "not safetensors",
    ),
    "safetensors, offsets past the end": (
        lambda: header({"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}), DamagedFileError, "safetensors",
    ),
    "safetensors, an unknown type": (
        lambda: header({"a": {"dtype": "F1", "shape": [], "data_offsets": [0, 0]}}), DamagedFileError, "safetensors",
    ),
    "safetensors without metadata": (lambda: header({"__metadata__": None}), RefusedError, "holds no tensors"),
    "safetensors of nothing": (lambda: header({}), RefusedError, "holds no tensors"),
}  # fmt: skip


def nested() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that they may change
        return torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])


def header(members: dict[str, Any]) -> bytes:
    text = json.dumps(members).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize("name", CASES)
def test_hostile_files_are_refused_with_one_sentence(name: str, tmp_path: Path) -> None:
    make, error, says = CASES[name]
    path = put(tmp_path, make())
    ran.clear()
    with memory_bound(1 << 30), pytest.raises(error, match=says) as caught:
        read_weight_file(path)
    assert ran == []
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_what_is_no_file(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "pipe")
    for name, says in (("gone", "no such file"), ("pipe", "no such file"), ("", "a folder")):
        for read in (read_weight_file, file_digest):
            with pytest.raises(UsageError, match=says):
                read(tmp_path / name)


def test_an_absurd_size_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UsageError, match="at most"):
        read_weight_file(tmp_path / "huge")


SAMPLES = (saved({"teacher": BACKBONE, "epoch": 3}), official_full(), safetensors.torch.save(BACKBONE, {"part": "x"}))


@amounts(60, 4000)
def test_torn_files_are_read_or_refused(num: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Whatever is flipped, cut or moved: a model of the names and shapes in the file, or one message."""
    path = tmp_path_factory.mktemp("torn") / "w"

    def check(data: bytes) -> None:
        path.write_bytes(data)
        file = read_weight_file(path)
        assert file.model.backbone or file.model.head

    fuzz(st.sampled_from(SAMPLES).flatmap(torn), check, num)

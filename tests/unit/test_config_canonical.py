import dataclasses
import json
import struct
from dataclasses import dataclass
from pathlib import Path

import pytest
from config_examples import changed, config
from hypothesis import given
from hypothesis import strategies as st

from dino_exp.config.canonical import (
    canonical_json,
    canonical_text,
    config_hash,
    group_hash,
    identity_values,
    number_text,
)
from dino_exp.config.check import config_from_mapping
from dino_exp.config.fields import Section, setting
from dino_exp.errors import ConfigError

GOLDEN = Path(__file__).parents[1] / "golden" / "config_hashes.json"

# RFC 8785, appendix B: IEEE 754 bits and the text.
RFC_8785_NUMBERS = """
0000000000000000 0
8000000000000000 0
0000000000000001 5e-324
8000000000000001 -5e-324
7fefffffffffffff 1.7976931348623157e+308
ffefffffffffffff -1.7976931348623157e+308
4340000000000000 9007199254740992
c340000000000000 -9007199254740992
4430000000000000 295147905179352830000
44b52d02c7e14af5 9.999999999999997e+22
44b52d02c7e14af6 1e+23
44b52d02c7e14af7 1.0000000000000001e+23
444b1ae4d6e2ef4e 999999999999999700000
444b1ae4d6e2ef4f 999999999999999900000
444b1ae4d6e2ef50 1e+21
3eb0c6f7a0b5ed8c 9.999999999999997e-7
3eb0c6f7a0b5ed8d 0.000001
41b3de4355555553 333333333.3333332
41b3de4355555554 333333333.33333325
41b3de4355555555 333333333.3333333
41b3de4355555556 333333333.3333334
41b3de4355555557 333333333.33333343
becbf647612f3696 -0.0000033333333333333333
43143ff3c1cb0959 1424953923781206.2
"""


@pytest.mark.parametrize("line", RFC_8785_NUMBERS.split("\n")[1:-1])
def test_numbers_of_rfc_8785(line):
    bits, text = line.split()
    (number,) = struct.unpack(">d", bytes.fromhex(bits))
    assert number_text(number) == text


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_number_text_reads_back_the_same(number):
    assert float(number_text(number)) == number


@given(st.integers(-(2**53), 2**53))
def test_a_whole_number_is_written_alike_as_int_and_as_float(number):
    assert number_text(number) == number_text(float(number))


@pytest.mark.parametrize("number", [float("nan"), float("inf"), 2**53 + 1])
def test_what_json_cannot_hold_is_refused(number):
    with pytest.raises(ConfigError):
        canonical_json([number])
    with pytest.raises(ConfigError, match=r"^configuration: model\.depth: .+JSON"):
        canonical_json({"model": {"depth": number}})


def test_strings_and_order_of_rfc_8785():
    assert canonical_json({"€": 1, "\r": 2, "\ufb33": 3, "1": 4, "😀": 5, "\x80": 6, "ö": 7}) == (
        '{"\\r":2,"1":4,"\x80":6,"ö":7,"€":1,"😀":5,"\ufb33":3}'
    )
    assert canonical_json('€$\x0f\nA\'B"\\\\"/') == '"€$\\u000f\\nA\'B\\"\\\\\\\\\\"/"'
    with pytest.raises(ConfigError, match="not valid Unicode"):
        canonical_json("\ud800")


def test_hashes_of_record():
    """From the first release on these are fixed: a new field needs a legacy value, not a new golden file."""
    recorded = json.loads(GOLDEN.read_text())
    found = {
        name: {
            "overrides": entry["overrides"],
            "config_hash": config_hash(config(*entry["overrides"])),
            "group_hash": group_hash(config(*entry["overrides"])),
        }
        for name, entry in recorded.items()
    }
    assert found == recorded


@pytest.mark.parametrize(
    "override",
    [
        "paths.outputs=/elsewhere",
        "runtime.workers=3",
        "runtime.device=cpu",
        "runtime.threads=2",
        "checkpoint=milestones",
        "checkpoint.keep.last=7",
        "logger.every_steps=3",
        "evaluation.every_epochs=1",
        "train.stop_after_steps=5",
        "train.on_collapse=warn",
        "run.variant=b",
        "run.tags=[a,b]",
        "run.note=hello",
        "resume=last",
        "model.name=other",
        "loss.name=other",
    ],
)
def test_what_does_not_change_the_result_does_not_change_the_hash(override):
    assert config_hash(config(override)) == config_hash(config())


@pytest.mark.parametrize(
    "override",
    [
        "model=vit_s",
        "train.epochs=46",
        "train.batch_size=65",
        "train.precision=bf16",
        "optimizer.lr=2e-3",
        "optimizer=sgd",
        "optimizer=lars",
        "scheduler=constant",
        "init.scheme=official",
        "augment.noise_std=0",
        "loss.out_dim=64",
        "data=synthetic",
    ],
)
def test_what_changes_the_result_changes_both_hashes(override):
    assert config_hash(config(override)) != config_hash(config())
    assert group_hash(config(override)) != group_hash(config())


def test_seeds_share_the_group_hash():
    assert config_hash(config("seed=1")) != config_hash(config())
    assert group_hash(config("seed=1")) == group_hash(config())


@pytest.mark.parametrize(
    "overrides",
    [
        ["model=vit_nano", "data=digits", "experiment=digits"],
        ["optimizer.lr=0.003"],
        ["optimizer.lr=3e-3", "optimizer.clip_grad=3", "train.epochs=45"],
        ["model.embed_dim=64", "augment.global_area=[0.65,1]"],
    ],
)
def test_spelled_out_equals_default(overrides):
    assert canonical_text(config(*overrides)) == canonical_text(config())


def test_the_canonical_text_is_json_of_exactly_the_identity():
    text = canonical_text(config())
    values = json.loads(text)
    assert values == identity_values(config())
    assert text.startswith('{"augment":{"blur_probability":0.2,"global_area":[0.65,1],"local_area":[0.4,0.8],')
    assert '"eps":1e-8,"freeze_last_layer_epochs":0,"lr":0.003,' in text
    assert "checkpoint" not in values
    assert "name" not in values["model"]


def test_a_list_hashes_as_its_values_whatever_its_python_type():
    listed = config_from_mapping(changed(optimizer__betas=[0.9, 0.999]))
    tupled = config_from_mapping(changed(optimizer__betas=(0.9, 0.999)))
    assert config_hash(listed) == config_hash(tupled)


@dataclass(frozen=True, kw_only=True)
class _Before(Section):
    depth: int = setting(help="there from the start")


@dataclass(frozen=True, kw_only=True)
class _After(_Before):
    new: float = setting(help="added later", legacy=0.0)


def test_a_later_field_at_its_legacy_value_leaves_old_hashes_alone():
    old, new = _Before(depth=2), _After(depth=2, new=0.0)
    assert canonical_json(identity_values(new)) == canonical_json(identity_values(old))
    assert identity_values(dataclasses.replace(new, new=0.5)) == {"depth": 2, "new": 0.5}

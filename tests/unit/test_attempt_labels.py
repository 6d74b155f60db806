"""Tags and note of a run: those that an attempt was given last."""

from __future__ import annotations

import pytest
from config_examples import config
from runs_samples import sample_record

from dino_exp.attempts.attempt import Command, labelled
from dino_exp.errors import ConfigError


@pytest.mark.parametrize(
    ("typed", "tags", "note"),
    [
        ([], ("first",), "why"),
        (["run.tags=[a,b]"], ("a", "b"), "why"),
        (["run.tags=[]"], (), "why"),
        (["run.note=null", "run.tags=[first]"], ("first",), ""),
    ],
)
def test_a_later_attempt_changes_what_it_names(typed: list[str], tags: tuple[str, ...], note: str) -> None:
    command = Command(overrides=typed, composed={})
    made = labelled(sample_record(tags=("first",), note="why"), config(*typed).run, command)
    assert (made.tags, made.note) == (tags, note)


def test_what_a_command_needs_beside_touches_nothing() -> None:
    typed = ["experiment=digits_smoke", "optimizer.momentum=0.5", "run.tags=[a]"]
    # Of the run: the default optimizer has no momentum.
    command = Command(overrides=typed, composed={}, beside=["optimizer=sgd"])
    made = labelled(sample_record(tags=("first",), note="why"), config("run.tags=[a]").run, command)
    assert (made.tags, made.note) == (("a",), "why")
    with pytest.raises(ConfigError, match="does not apply to this choice of optimizer"):
        Command(overrides=typed, composed={}).touched()

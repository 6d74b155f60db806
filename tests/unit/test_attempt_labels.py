"""Tags and note of a run: those that an attempt was given last."""

from __future__ import annotations

import pytest
from config_examples import config
from runs_samples import sample_record

from dino_exp.attempts.attempt import labelled


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
    made = labelled(sample_record(tags=("first",), note="why"), config(*typed).run, typed)
    assert (made.tags, made.note) == (tags, note)

"""What is printed to be typed again is read as it was meant, by the shell and by Hydra."""

import shlex

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from dino_exp.attempts.target import changes_text
from dino_exp.config.compare import Change
from dino_exp.config.compose import compose
from dino_exp.config.typed import override, setting_text, train_command

PLACES = [
    "outputs",
    "/tmp/a b",
    "/tmp/a,b",
    "/a=b/[c]{d}",
    'say "x"',
    "it's",
    "back\\slash",
    "end\\",
    'q\\"',
    "${seed}",
    "#1",
    "ünï",
    "null",
    "1e3",
    "True",
    "-.5",
]


@pytest.mark.parametrize("place", PLACES)
def test_hydra_reads_the_text(place: str) -> None:
    assert compose([override("paths.outputs", place)])["paths"]["outputs"] == place


@settings(max_examples=500, deadline=None)
@given(st.one_of(st.text("ab \\\"'$,=[]{}()#:%", min_size=1, max_size=8), st.text("0123_.e+-infaltruse", min_size=1)))
def test_hydra_reads_any_text(text: str) -> None:
    value = OverridesParser.create().parse_override(override("x", text)).value()
    assert OmegaConf.create({"x": value})["x"] == text


@pytest.mark.parametrize("place", PLACES)
def test_the_shell_reads_the_words(place: str) -> None:
    word = override("resume", place)
    assert shlex.split(train_command(word, "seed=1")) == ["python", "-m", "dino_exp.train", word, "seed=1"]


@pytest.mark.parametrize("value", [None, True, False, 3, 0.1 + 0.2, 1e-7, 60.0, [1.5, None], ["a", "b"]])
def test_a_shown_setting_can_be_typed_again(value: object) -> None:
    assert compose([f"+x={setting_text(value)}"])["x"] == value


def test_the_table_of_changes_shows_settings_as_they_are_typed() -> None:
    changes = [
        Change(key="logger.report", was=True, now=False, role="runtime", verdict="allowed"),
        Change(key="train.stop_after_epochs", was=None, now=2, role="budget", verdict="allowed"),
    ]
    assert [line.split() for line in changes_text(changes).splitlines()[1:]] == [
        ["logger.report", "true", "false", "allowed"],
        ["train.stop_after_epochs", "null", "2", "allowed"],
    ]

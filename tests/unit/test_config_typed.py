"""What is printed to be typed again is read as it was meant, by the shell and by Hydra."""

import shlex

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from dino_exp.config.compose import compose
from dino_exp.config.typed import override, train_command

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

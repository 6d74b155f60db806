"""The nouns and verbs of the command line: each is there, and costs what it needs itself."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cli_samples import cli

from dino_exp.cli.app import NOUNS


@pytest.mark.parametrize("noun", NOUNS)
def test_a_noun_lists_its_verbs_and_each_explains_itself_with_examples(noun: str) -> None:
    overview = cli("--help", noun=noun)
    assert (overview.code, overview.err) == (0, "")
    for verb in NOUNS[noun].verbs:
        assert f" {verb} " in overview.out
        found = cli(verb, "--help", noun=noun)
        assert (found.code, found.err) == (0, "")
        assert re.search(rf"Examples:\s+dino-exp {noun} {verb}\b", found.out)


@pytest.mark.parametrize(
    ("noun", "verb", "says"),
    [
        ("runs", "list", "<running|stopped|completed|preempted|failed|interrupted>"),
        ("runs", "best", "<max|min>"),
        ("checkpoints", "pin", "with`@latest`,`@best`or`@<step>`behindit"),
        ("checkpoints", "unpin", "with`@latest`,`@best`or`@<step>`behindit"),
        ("checkpoints", "list", "mayfollow"),
    ],
)
def test_help_says_what_can_be_given(noun: str, verb: str, says: str) -> None:
    out = cli(verb, "--help", noun=noun).out
    first_column = "".join(line[: line.find("  Only")] if "  Only" in line else line for line in out.splitlines())
    assert says in re.sub(r"[\s│]", "", first_column)


@pytest.mark.parametrize("noun", NOUNS)
def test_a_verb_that_is_none_is_told_beside_the_likely_ones(noun: str) -> None:
    found = cli("lists", noun=noun)
    assert (found.code, found.out) == (2, "")
    assert "No such command 'lists'" in found.err
    assert "list" in found.err.partition("lists")[2]


@pytest.mark.parametrize("noun", NOUNS)
def test_a_verb_imports_no_other(noun: str, tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from dino_exp.cli.app import NOUNS, run\n"
        "noun = sys.argv[1]\n"
        "sys.argv[1:] = [noun, 'list', '--outputs', sys.argv[2], *(['none'] if noun == 'checkpoints' else [])]\n"
        "run()\n"
        "own = NOUNS[noun].verbs['list'].partition('.')[0]\n"
        "others = {at.partition('.')[0] for noun in NOUNS.values() for at in noun.verbs.values()} - {own, 'report'}\n"
        "print(sorted(name for name in others if f'dino_exp.cli.{name}' in sys.modules))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, noun, str(tmp_path)], check=True, text=True, capture_output=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "[]"

"""The line that starts a run again: whatever somebody may have typed, and nothing that would fool a terminal."""

import shlex
from pathlib import Path

import pytest
import yaml

from dino_exp.fsio import DamagedFileError
from dino_exp.runs.command import command_of
from dino_exp.runs.layout import RunPaths


def typed(tmp_path: Path, *words: str) -> str:
    paths = RunPaths(tmp_path)
    paths.hydra_dir.mkdir(exist_ok=True)
    (paths.hydra_dir / "overrides.yaml").write_text(yaml.safe_dump(list(words), allow_unicode=True))
    return command_of(paths)


@pytest.mark.parametrize(
    "note",
    ["全角\u3000空白", "👩\u200d🔬", "a\u00a0b", "two\nlines\tand a tab", "שלום\u200f", "'quoted'", "\ue000\u2028"],
)
def test_what_people_type_is_given_back(note: str, tmp_path: Path) -> None:
    word = f'run.note="{note}"'
    assert shlex.split(typed(tmp_path, "seed=1", word)) == ["python", "-m", "dino_exp.train", "seed=1", word]


@pytest.mark.parametrize("char", ["\x1b", "\r", "\x7f", "\x9b", "\x08", "\u202e", "\u2066"])
def test_what_would_fool_a_terminal_is_refused_by_name(char: str, tmp_path: Path) -> None:
    with pytest.raises(DamagedFileError) as caught:
        typed(tmp_path, f"run.note={char}x")
    assert f"overrides.yaml: holds the character {char!a}" in str(caught.value)

"""`config.yaml` and `config.canonical.json` of a stranger, and of a failing disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from config_examples import config
from hypothesis import strategies as st
from support.hostile import agrees, amounts, attempt, changed_json, fuzz, torn

from dino_exp.config.canonical import canonical_text
from dino_exp.config.check import config_from_mapping
from dino_exp.config.compare import as_mapping
from dino_exp.config.plain_yaml import parse_plain_yaml
from dino_exp.config.schema import Config
from dino_exp.config.stored import CANONICAL_NAME, YAML_NAME, load_stored, write_stored
from dino_exp.errors import DinoExpError

HONEST = config("run.note='a note'", "run.tags=[a,b]")
PLACES = ("resume", "fork", "paths", "sweep")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    directory = tmp_path / "outputs" / "runs" / "vit_nano-1-2"
    directory.mkdir(parents=True)
    write_stored(HONEST, directory)
    return directory


def plain(settings: Config) -> dict[str, Any]:
    return {name: value for name, value in as_mapping(settings).items() if name not in PLACES}


def canonical_of(mapping: Any, otherwise: str) -> str:
    """What a stranger puts beside his settings so that the two files agree, where there is such a text."""
    try:
        return canonical_text(
            config_from_mapping(
                {
                    **mapping,
                    "resume": None,
                    "fork": None,
                    "plan": False,
                    "paths": {"outputs": "x", "cache": "x/cache"},
                    "sweep": {"name": None, "dry_run": False},
                }
            )
        )
    except (DinoExpError, TypeError):
        return otherwise


def as_read(said: Any, got: Any) -> Any:
    """What was said, in the reader's terms: `run.variant: 2` is the text "2"; what is not there has a legacy value."""
    if isinstance(said, dict) and isinstance(got, dict):
        return got | {name: as_read(value, got.get(name)) for name, value in said.items()}
    if isinstance(said, list) and isinstance(got, list):
        return [as_read(one, other) for one, other in zip(said, got, strict=False)]
    return str(said) if type(said) is int and isinstance(got, str) else said


@amounts(60, 1_500)
def test_settings_of_a_stranger_are_read_as_they_say_or_refused(num: int, run: Path) -> None:
    honest = canonical_text(HONEST)

    def check(mapping: Any) -> None:
        (run / YAML_NAME).write_bytes(yaml.safe_dump(mapping, sort_keys=False).encode("utf-8", "surrogatepass"))
        (run / CANONICAL_NAME).write_bytes(canonical_of(mapping, honest).encode("utf-8", "surrogatepass"))
        settings = load_stored(run)
        assert agrees(plain(settings), as_read(mapping, plain(settings)))
        assert settings.paths.outputs == str(run.parent.parent)

    fuzz(changed_json(plain(HONEST)), check, num)


@amounts(60, 1_500)
def test_torn_settings_are_refused_or_the_same(num: int, run: Path) -> None:
    whole = (run / YAML_NAME).read_bytes()

    def check(data: bytes) -> None:
        (run / YAML_NAME).write_bytes(data)
        assert plain(load_stored(run)) == plain(HONEST)

    fuzz(torn(whole) | st.just(whole), check, num)


@amounts(60, 1_500)
def test_another_canonical_text_is_refused(num: int, run: Path) -> None:
    whole = (run / CANONICAL_NAME).read_bytes()
    anything = st.sampled_from(
        [b"", b"[]", b"3", b'"x"', b"null", b'{"a":{"b":[1]}}', b"[" * 50, b"\xff", b'{"seed":' + b"[" * 14]
    )

    def check(data: bytes) -> None:
        (run / CANONICAL_NAME).write_bytes(data)
        load_stored(run)
        assert data == whole

    fuzz(torn(whole) | anything | st.just(whole), check, num)


_WORDS = (
    "a", "seed", ":", ": ", "\n", "\n  ", "- ", "[", "]", "{", "}", ",", "'", '"', "|", ">", "|2", "&a ", "*a", "!t ",
    "!!python/name:os", "? ", "<<: ", "# ", "%YAML 1.1", "---", "...", "\t", "0x_", "1:2:3", "1_0", ".5", ".inf",
    ".nan", "~", "=", "2001-1-1", "2001-1-1 1:1:1", "\\", "\\U00110000", "\\ud800", "\x00", "\x85", "\ufeff", "\ud7ff",
    "😀", "null", "yes", "1e3", "0o7", "${seed}", "@", "`",
)  # fmt: skip


@amounts(300, 10_000)
def test_any_text_is_plain_yaml_or_refused(num: int) -> None:
    text = st.lists(st.sampled_from(_WORDS) | st.text(max_size=3), max_size=14).map("".join)

    def check(data: bytes) -> None:
        found = parse_plain_yaml(data, "config.yaml")
        assert found == yaml.safe_load(data) or found != found or "nan" in str(found)

    fuzz(text.map(lambda text: text.encode("utf-8", "surrogatepass")) | st.binary(max_size=40), check, num)


SEXAGESIMAL = ":".join(["1"] * 400)


@pytest.mark.parametrize(
    "value",
    [
        f"{SEXAGESIMAL}.5", SEXAGESIMAL * 300, "9" * 400, "-" + "9" * 400, "0x" + "f" * 4000, "1e999",
        "2001-01-01 00:00:00 +99:99", "0001-01-01 00:00:00 +23:00", '"\\ud800"', "[[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]",
    ],
    ids=lambda value: value[:20],
)  # fmt: skip
@pytest.mark.parametrize("key", ["  lr", "seed", "  depth", "  note", "  epochs"])
def test_absurd_values_are_refused_or_plain(key: str, value: str, run: Path) -> None:
    lines = (run / YAML_NAME).read_text().splitlines()
    changed = [f"{key}: {value}" if line.startswith(f"{key}:") else line for line in lines]
    assert changed != lines
    (run / YAML_NAME).write_text("\n".join(changed))
    attempt(lambda: load_stored(run))


def test_a_flood_of_unknown_settings_is_refused_at_once(run: Path) -> None:
    """Looking for what each of them may have meant would take minutes."""
    flood = {f"optimizer_learning_rate_{n}": n for n in range(9000)}
    (run / YAML_NAME).write_text(yaml.safe_dump(flood))
    with pytest.raises(DinoExpError, match="settings"):
        load_stored(run)
    (run / YAML_NAME).write_text(yaml.safe_dump({"optimizer_" * 40_000: 1}))
    with pytest.raises(DinoExpError) as caught:
        load_stored(run)
    assert len(str(caught.value)) < 4000

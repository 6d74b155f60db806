"""The table of all settings, made from the schema: `python -m dino_exp.config.reference docs/settings.md`."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dino_exp.config.compose import EVALUATE, compose
from dino_exp.config.evaluate import EvaluateConfig, MachineConfig
from dino_exp.config.explain import group_choices
from dino_exp.config.fields import Entry, Section, Setting, describe, entries
from dino_exp.config.schema import Config, PathsConfig
from dino_exp.config.typed import setting_text

_HEAD = """\
# Settings

Made from the schema by `python -m dino_exp.config.reference docs/settings.md`; a test holds the two equal.

Set any of them on the command line (`optimizer.lr=1e-3`), or choose a file of a group (`model=vit_s`). The
defaults here are those of `python -m dino_exp.train`, which is `experiment=digits`.

The role says what a change means:

| role | meaning | on resume |
|---|---|---|
| identity | changes the result, so it is another run | refused; use `fork=` |
| numerics | the same mathematics, perhaps other bits | allowed; the run is no longer exact |
| budget | how far to go, how often to look | allowed |
| runtime | none of these | allowed |
"""


def settings_reference() -> str:
    """The whole of docs/settings.md."""
    defaults = compose()
    groups = group_choices()
    parts = [_HEAD, *_table(Config, "", defaults)]
    for entry in entries(Config):
        for section in entry.sections:
            parts += _section(entry.name, section, groups.get(entry.name, []), defaults)
    parts += list(_evaluate_sections())
    parts += [f"\n## Presets\n\n{_choices('experiment', groups)}\n{_choices('debug', groups)}"]
    return "".join(parts)


_EVALUATE_HEAD = """
## Of python -m dino_exp.evaluate

These are given to `python -m dino_exp.evaluate`; what they measure is in [evaluation.md](evaluation.md). What they must
know of a run comes from its checkpoint, and none of them changes one.
"""


def _evaluate_sections() -> Iterator[str]:
    """The settings of `dino_exp.evaluate`: those of all evaluations, and those of each kind."""
    defaults = compose((), EVALUATE)
    kinds = next(entry.sections for entry in entries(EvaluateConfig) if entry.name == "evaluation")
    yield _EVALUATE_HEAD
    yield from _table(EvaluateConfig, "", defaults)
    for name, shared in (("runtime", MachineConfig), ("paths", PathsConfig)):
        yield f"\n### {name}\n\n{inspect.getdoc(shared)}\n\n"
        yield from _table(shared, f"{name}.", defaults[name])
    for section in kinds:
        choice = _variant_name(section)
        yield f"\n### evaluation={choice}\n\n{inspect.getdoc(section)}\n\n"
        yield from _table(section, "evaluation.", compose([f"evaluation={choice}"], EVALUATE)["evaluation"])


def _section(name: str, section: type[Section], choices: list[str], defaults: Mapping[str, Any]) -> Iterator[str]:
    variants = next(entry.sections for entry in entries(Config) if entry.name == name)
    variant = "" if len(variants) == 1 else _variant_name(section)
    chosen = ", ".join(f"{name}={choice}" for choice in _variant_names(section)) if variant else ""
    yield f"\n## {name}{f' ({chosen})' if chosen else ''}\n\n{inspect.getdoc(section)}\n"
    if choices and not variant:
        yield f"\n{_choices(name, {name: choices})}"
    values = compose([f"{name}={variant}"]) if variant else defaults
    yield "\n"
    yield from _table(section, f"{name}.", values[name])


def _variant_name(section: type[Section]) -> str:
    return _variant_names(section)[0]


def _variant_names(section: type[Section]) -> tuple[str, ...]:
    setting = next(entry.setting for entry in entries(section) if entry.name == "name")
    assert setting is not None
    return setting.choices


def _table(section: type[Section], prefix: str, values: Mapping[str, Any]) -> Iterator[str]:
    if not prefix:
        yield "\n"
    yield "| setting | type | default | role | |\n|---|---|---|---|---|\n"
    yield from _rows(section, prefix, values)


def _rows(section: type[Section], prefix: str, values: Mapping[str, Any]) -> Iterator[str]:
    for entry in entries(section):
        if entry.setting is not None:
            yield _row(prefix, entry, entry.setting, values[entry.name])
        elif prefix:
            yield from _rows(entry.sections[0], f"{prefix}{entry.name}.", values[entry.name])


def _row(prefix: str, entry: Entry, setting: Setting, value: Any) -> str:
    kind = " | ".join(setting.choices) if len(setting.choices) > 1 else describe(entry.hint).removeprefix("a ")
    cells = f"`{prefix}{entry.name}`", kind, f"`{setting_text(value)}`", setting.role, setting.help
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def _choices(group: str, groups: Mapping[str, list[str]]) -> str:
    return f"Choices: {', '.join(f'`{group}={choice}`' for choice in groups[group])}.\n"


def main() -> None:
    """Write the table of all settings to a file."""
    parser = argparse.ArgumentParser(prog="python -m dino_exp.config.reference", description=main.__doc__)
    parser.add_argument("file", type=Path, help="docs/settings.md")
    parser.parse_args().file.write_text(settings_reference(), encoding="utf-8")


if __name__ == "__main__":
    main()

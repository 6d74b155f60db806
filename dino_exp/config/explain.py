"""Errors of Hydra and OmegaConf in our words: what was found, what there is, and what may have been meant."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf.errors import OmegaConfBaseException

from dino_exp.config.check import did_you_mean, known_keys, suggest_keys
from dino_exp.config.fields import Section
from dino_exp.config.schema import Config

HYDRA_ERRORS = (HydraException, OmegaConfBaseException)
OF_EVALUATE = "evaluation"  # the group of `dino_exp.evaluate`; all others are of `dino_exp.train`


def conf_directory() -> Path:
    """`conf/` of the installed package, or of the repository when the package is not installed as a wheel."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def group_choices(schema: type[Section] = Config) -> dict[str, list[str]]:
    """The choices of every group of `conf/` that the program of `schema` has, both sorted."""
    folders = sorted(path for path in conf_directory().iterdir() if path.is_dir() and path.name != "hydra")
    ours = [folder for folder in folders if (folder.name == OF_EVALUATE) == (schema is not Config)]
    return {folder.name: sorted(path.stem for path in folder.glob("*.yaml")) for folder in ours}


def explain(error: Exception, schema: type[Section] = Config, overrides: Sequence[str] = ()) -> str:
    """An error of Hydra or OmegaConf in one message: what was found, what is expected, what may be meant.

    `schema` is that of the program that was started, `overrides` what it was given, as far as that is known.
    """
    text = str(error).strip()
    if text.startswith("Config group override must be"):
        return _explain_no_choice(overrides, group_choices(schema))
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return _explain_missing(error.missing_cfg_file, error.options or [], schema)
    if isinstance(error, OverrideParseException):
        return (
            f"cannot read the override {error.override!r}: expected key=value, "
            "with quotes around text of special characters: 'key=\"value\"'"
        )
    unknown = re.match(r"Could not (?:override|delete)(?: from config\.)? '([^']+)'", text)
    if unknown and isinstance(error, ConfigCompositionException):
        if unknown[1] == OF_EVALUATE and schema is Config:
            return (
                f"configuration: {OF_EVALUATE}=<choice> belongs to `python -m dino_exp.evaluate of=<run>`; a training "
                "measures k-NN by itself, as often as evaluation.every_epochs says (null: never)"
            )
        return f"configuration: {unknown[1]}: {_why_unknown(unknown[1], schema)}"
    cause = f": {error.__cause__}" if isinstance(error.__cause__, OmegaConfBaseException) else ""
    return "configuration: " + " ".join(f"{text}{cause}".split())


def _explain_missing(config_file: str, options: Sequence[str], schema: type[Section]) -> str:
    group, _, choice = config_file.rpartition("/")
    if not group:
        return f"configuration: there is no file {config_file}.yaml in {conf_directory()}"
    known = f"; there are {', '.join(options)}" if options else f"; there is no group {group}{_suggest(group, schema)}"
    return f"configuration: {group}={choice}: there is no such choice{known}{did_you_mean(choice, options)}"


def _explain_no_choice(overrides: Sequence[str], choices: Mapping[str, Sequence[str]]) -> str:
    """A group was given null, a number or a dictionary."""
    lines = []
    for word in overrides:
        group, _, choice = word.lstrip("+").partition("=")
        if group in choices and choice.partition(",")[0] not in choices[group]:
            lines.append(f"{word}: expected one of {', '.join(choices[group])}")
    return "configuration: " + ("; ".join(lines) or "a group takes the name of one of its choices")


def _why_unknown(key: str, schema: type[Section]) -> str:
    """Why Hydra does not take an override of this key."""
    choices = group_choices(schema)
    if key in choices:
        return f"expected one of {', '.join(choices[key])}"
    if key in known_keys(schema):
        section = key.partition(".")[0]
        return f"does not apply to this choice of {section}; the settings of each are in docs/settings.md"
    if schema is not Config and (key in known_keys() or key in group_choices()):
        return "a setting of trainings; an evaluation takes the run as its checkpoint describes it"
    return f"there is no such setting{_suggest(key, schema)}"


def _suggest(key: str, schema: type[Section]) -> str:
    groups = list(group_choices(schema))
    if "." not in key and did_you_mean(key, groups):
        return did_you_mean(key, groups)
    return suggest_keys(key, schema)

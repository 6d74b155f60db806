"""Configurations for the tests, composed once for each list of overrides."""

import copy
import functools
from typing import Any

from dino_exp.config.check import config_from_mapping
from dino_exp.config.compose import compose
from dino_exp.config.schema import Config


@functools.cache
def _composed(*overrides: str) -> dict[str, Any]:
    return compose(overrides)


def mapping(*overrides: str) -> dict[str, Any]:
    return copy.deepcopy(_composed(*overrides))


def config(*overrides: str) -> Config:
    return config_from_mapping(mapping(*overrides))


def changed(**values: Any) -> dict[str, Any]:
    """The default mapping with dotted keys (`train__epochs=3`) set."""
    plain = mapping()
    for key, value in values.items():
        *sections, name = key.split("__")
        inner = plain
        for section in sections:
            inner = inner[section]
        inner[name] = value
    return plain

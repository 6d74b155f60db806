"""What Hydra is about to sweep, told before the first job starts, by a callback: Hydra's documented place for that."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from dino_exp.config.check import section_from_mapping
from dino_exp.config.schema import PathsConfig, SweepConfig

OF_THE_SWEEP = "sweep."
_BASIC = "BasicSweeper"
_SEARCH_PATH = "hydra.searchpath="
_ADDED = "hydra.mode="  # by Hydra itself, for --multirun


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A sweep as typed: `jobs` are the overrides of each job, None where the sweeper decides as it goes.

    They hold nothing of the sweep itself (`sweep.*`), so that each can be typed alone. `settings` are those of
    the sweep; its runs lie below `outputs`. `options`: of the command line, that a job needs too. `launch`: what else
    was typed for Hydra, such as the launcher, which a job alone does without. `plan`: say only what each job would
    take.
    """

    typed: tuple[str, ...]
    options: tuple[str, ...]
    launch: tuple[str, ...] = ()
    jobs: tuple[tuple[str, ...], ...] | None
    sweeper: str
    launcher: str
    settings: SweepConfig
    outputs: Path
    plan: bool = False

    @property
    def search_path(self) -> tuple[str, ...]:
        """Of the options, the override that says where else configurations lie."""
        return tuple(word for word in self.options if word.startswith(_SEARCH_PATH))


class AnnounceSweep(Callback):
    """Passes a sweep on to whoever waits for it (see `compose.hydra_main`)."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Called by Hydra in the user's process, before a launcher exists."""
        from dino_exp.config.compose import announce

        announce(lambda: sweep_of(config))


def sweep_of(config: DictConfig) -> Sweep:
    """What the composed configuration of a multirun says. Raises ConfigError, OmegaConf's errors."""
    hydra: Any = OmegaConf.to_container(config.hydra, resolve=False)
    typed = [str(word) for word in hydra["overrides"]["task"]]
    sweeper = str(hydra["sweeper"]["_target_"]).rpartition(".")[2]
    words = [f"{key}={value}" for key, value in (hydra["sweeper"].get("params") or {}).items()] + typed
    return Sweep(
        typed=tuple(typed),
        options=options_of(hydra),
        launch=tuple(word for word in _for_hydra(hydra) if not word.startswith((_ADDED, _SEARCH_PATH))),
        jobs=tuple(_jobs(words)) if sweeper == _BASIC else None,
        sweeper=sweeper,
        launcher=str(hydra["launcher"]["_target_"]).rpartition(".")[2],
        settings=section_from_mapping(SweepConfig, _resolved(config.sweep), "sweep."),
        outputs=Path(section_from_mapping(PathsConfig, _resolved(config.paths), "paths.").outputs),
        plan=config.plan is True,
    )


def _resolved(section: DictConfig) -> dict[str, Any]:
    values = OmegaConf.to_container(section, resolve=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def options_of(hydra: Any) -> tuple[str, ...]:
    """What a command needs to find the same configurations: `--config-dir` and `hydra.searchpath`, where given.

    `hydra` is Hydra's own configuration.
    """
    sources = hydra["runtime"]["config_sources"]
    given = [str(source["path"]) for source in sources if source["provider"] == "command-line"]
    return tuple(word for path in given for word in ("--config-dir", path)) + search_path_of(hydra)


def search_path_of(hydra: Any) -> tuple[str, ...]:
    """The override `hydra.searchpath`, where it was typed: what is composed for a job must have it, too."""
    return tuple(word for word in _for_hydra(hydra) if word.startswith(_SEARCH_PATH))


def _for_hydra(hydra: Any) -> list[str]:
    return [str(word) for word in hydra["overrides"]["hydra"]]


def _jobs(words: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """The product of all sweeps in the order of the basic sweeper; a key that comes twice counts where it came last."""
    choices: dict[str, list[str]] = {}
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())  # glob() asks it for choices
    for override in parser.parse_overrides(list(words)):
        key = override.get_key_element()
        if key.startswith(OF_THE_SWEEP):
            continue
        choices[key] = [f"{key}={value}" for value in _values(override)]
    return itertools.product(*choices.values())


def _values(override: Override) -> Iterator[str]:
    if override.is_sweep_override():
        return iter(override.sweep_string_iterator())
    return iter([override.get_value_element_as_str()])

"""What a `--multirun` says that it will sweep, composed in this process."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode

from dino_exp.config.compose import JobEnd, compose, hydra_main, touched_keys, version_arguments
from dino_exp.config.explain import conf_directory
from dino_exp.config.multirun import Sweep, options_of, sweep_of
from dino_exp.errors import CompositionError


def announced(*overrides: str) -> Sweep:
    """What the callback makes of the command line, in the state of Hydra at that moment."""
    with hydra.initialize_config_dir(str(conf_directory()), **version_arguments()):
        engine = GlobalHydra.instance().hydra
        assert engine is not None
        composed = engine.compose_config(
            config_name="config", overrides=[*overrides, "hydra.mode=MULTIRUN"], run_mode=RunMode.MULTIRUN,
            validate_sweep_overrides=False, with_log_configuration=False,
        )  # fmt: skip
        return sweep_of(composed)


def test_the_launcher_and_other_words_for_hydra_are_kept_apart(tmp_path: Path) -> None:
    words = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=1", f"hydra.searchpath=[file://{tmp_path}]")
    found = announced("seed=0,1", *words)
    assert (found.typed, found.launch) == (("seed=0,1",), words[:2])  # not hydra.mode, which Hydra adds
    assert found.options == found.search_path == words[2:]
    assert found.launcher == "JoblibLauncher"


def test_glob_is_all_choices_of_a_group() -> None:
    found = announced("model=glob(vit_*,exclude=[vit_b,vit_l])", "seed=1")
    assert found.jobs == tuple((f"model={name}", "seed=1") for name in ("vit_nano", "vit_s", "vit_t"))


def test_configurations_are_found_by_the_search_path_that_was_typed(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nseed: 7\n")
    words = (f"hydra.searchpath=[file://{tmp_path}]", "experiment=mine")
    assert compose(words)["seed"] == 7
    assert touched_keys(words) >= {"seed"}
    with pytest.raises(CompositionError, match="experiment=mine: there is no such choice"):
        compose(words[1:])
    hydras: Any = {"runtime": {"config_sources": [{"provider": "command-line", "path": "/b"}]}}
    assert options_of({**hydras, "overrides": {"hydra": [words[0]]}}) == ("--config-dir", "/b", words[0])


class Interrupted:
    """A watcher whose user does not want to wait for the plan, or for the table."""

    moment = "plan"

    def starts(self, sweep: Sweep) -> int | None:
        if self.moment == "plan":
            raise KeyboardInterrupt
        return None

    def ends(self, codes: Any) -> int:
        raise KeyboardInterrupt


@pytest.mark.parametrize("moment", ["plan", "table"])
def test_an_interrupt_of_a_sweep_is_one_line(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train", "--multirun", "seed=0"])
    monkeypatch.setattr(Interrupted, "moment", moment)
    GlobalHydra.instance().clear()
    assert hydra_main(lambda *_: JobEnd(0), Interrupted) == 130
    assert capsys.readouterr().err == "interrupted\n"

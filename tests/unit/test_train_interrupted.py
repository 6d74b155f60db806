"""What an interrupt says that it has cost, without any training."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from hydra.core.global_hydra import GlobalHydra

from dino_exp.config.compose import hydra_main
from dino_exp.runs.signals import SecondInterruptError
from dino_exp.train import train


@pytest.mark.parametrize(
    ("error", "says"), [(KeyboardInterrupt, "interrupted"), (SecondInterruptError, "aborted by a second interrupt")]
)
def test_the_first_interrupt_is_not_called_the_second(
    error: type[BaseException],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def start(*_: Any) -> int:
        raise error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train", "seed=0"])
    monkeypatch.setattr("dino_exp.attempts.run.run_attempt", start)
    GlobalHydra.instance().clear()
    assert hydra_main(train) == 130
    assert capsys.readouterr().err == f"{says}; what was saved before stands\n"

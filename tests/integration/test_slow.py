"""Minutes long: a wheel in a fresh environment, `make train` on a fresh clone, and three seeds that learn."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.runs import Lab, record, rows

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
PLAIN = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}


def call(*words: str | Path, cwd: Path) -> str:
    done = subprocess.run(
        [str(word) for word in words], cwd=cwd, env=PLAIN, check=False, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, timeout=1500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


def test_a_wheel_in_a_fresh_environment_trains(tmp_path: Path) -> None:
    source = tmp_path / "source"
    call("git", "clone", "--quiet", ROOT, source, cwd=tmp_path)
    call(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, cwd=source)
    shutil.rmtree(source)  # the wheel must not lean on it
    (wheel,) = tmp_path.glob("*.whl")
    call(sys.executable, "-m", "venv", tmp_path / "fresh", cwd=tmp_path)
    binaries = tmp_path / "fresh" / "bin"
    pip = (binaries / "python", "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt")
    call(*pip, "torch", cwd=tmp_path)
    call(*pip, wheel, cwd=tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    printed = call(binaries / "dino-exp", "train", "experiment=digits_smoke", cwd=elsewhere)
    assert "completed" in printed
    assert "all good" in call(binaries / "dino-exp", "checkpoints", "verify", "last", cwd=elsewhere)
    assert not list((binaries.parent / "lib").glob("*/site-packages/nvidia*"))


def test_make_train_on_a_fresh_clone(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    call("git", "clone", "--quiet", ROOT, clone, cwd=tmp_path)
    assert "completed" in call("make", "train", cwd=clone)
    assert "Nothing to do" in call("make", "train", cwd=clone)
    assert call("git", "status", "--porcelain", cwd=clone) == ""


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_default_learns(seed: int, lab: Lab) -> None:
    lab.settings = ()
    lab.train(f"seed={seed}")
    made = rows(lab.only_run())
    first, last = made[0], made[-1]
    assert last["knn_top1"] >= 0.93
    assert last["knn_top1"] >= first["init_knn_top1"] + 0.08
    assert last["knn_1shot"] > first["pixel_knn_1shot"]
    assert record(lab.only_run())["state"] == "completed"

"""The checkpoint library in somebody else's loop: the example of README, run as it stands there."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from dino_exp.checkpoint.reader import CheckpointReader

ROOT = Path(__file__).parents[2]

PRELUDE = """
import sys, time
import torch

torch.manual_seed(0)
model = torch.nn.Linear(8, 8)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

def train_step(model, optimizer, step):
    inputs = torch.sin(torch.arange(64.0) * (step + 1)).reshape(8, 8)
    optimizer.zero_grad()
    (model(inputs) - inputs.roll(1, 0)).square().mean().backward()
    optimizer.step()
    if "slowly" in sys.argv:
        time.sleep(0.002)
"""


def example() -> str:
    """The Python block of README."""
    (block,) = (part.partition("```")[0] for part in (ROOT / "README.md").read_text().split("```python\n")[1:])
    return PRELUDE + block


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    return subprocess.Popen([sys.executable, "-W", "error", "-c", example(), *arguments], cwd=folder, text=True)


@pytest.mark.slow
def test_the_example_of_readme_is_killed_and_ends_in_the_same_bits(tmp_path: Path) -> None:
    assert start(tmp_path / "straight").wait(120) == 0
    checkpoints = tmp_path / "killed" / "checkpoints"
    process = start(tmp_path / "killed", "slowly")
    while not list(checkpoints.glob("step-*.json")):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    begun = max(row["step"] for row in CheckpointReader(checkpoints).rows())
    assert 50 <= begun < 1000
    assert start(tmp_path / "killed").wait(120) == 0
    ends = [CheckpointReader(tmp_path / name / "checkpoints").rows() for name in ("straight", "killed")]
    assert [len(rows) for rows in ends] == [3, 3]
    assert ends[0][-1]["step"] == ends[1][-1]["step"] == 1000
    assert ends[0][-1]["state_digest"] == ends[1][-1]["state_digest"]


def test_checkpoint_lines_are_few() -> None:
    """Ten lines beside imports: what the library asks of a loop."""
    block = example().removeprefix(PRELUDE)
    lines = [line for line in block.splitlines() if line and not line.startswith("from ")]
    assert len(lines) <= 12

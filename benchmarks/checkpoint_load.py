"""Seconds of one load in a process that has just begun, as after a stop: memory is fresh, and costs what it costs.

`python -m benchmarks.checkpoint_load restore|load|load_and_copy CHECKPOINTS STATE.PT`
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.checkpoint_samples import NamedTensors
from dino_exp.checkpoint.reader import CheckpointReader


def seconds_to_load(what: str, checkpoints: Path, saved: Path) -> float:
    """Seconds of one load in a process of its own, not counting its start."""
    command = [sys.executable, "-m", "benchmarks.checkpoint_load", what, str(checkpoints), str(saved)]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main(what: str, checkpoints: Path, saved: Path) -> None:
    torch.set_num_threads(1)  # as torch.load; what copies memory gains little by a second one
    reader = CheckpointReader(checkpoints)
    entries = reader.manifest().tensors.items()
    live = NamedTensors({name: torch.ones(entry.shape, dtype=getattr(torch, entry.dtype)) for name, entry in entries})
    began = time.perf_counter()
    if what == "restore":
        reader.restore(live)
    else:
        loaded = torch.load(saved, weights_only=True)
        if what == "load_and_copy":
            live.load_state_dict(loaded)
    print(time.perf_counter() - began)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))

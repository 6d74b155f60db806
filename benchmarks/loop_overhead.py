"""What loop, schedules, logging and checkpoints add to a bare script of the same training.

The bare script does augmentation, forward, backward, step and EMA with the same parts, and nothing else. Both train
the digits experiment for the same steps, in turn, in this process. `python -m benchmarks.loop_overhead`
"""

from __future__ import annotations

import logging
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.measure import HEADER, in_pairs, parser_of
from dino_exp import build
from dino_exp.attempts.attempt import Command
from dino_exp.attempts.run import run_attempt
from dino_exp.attempts.target import start_target
from dino_exp.config.check import config_from_mapping
from dino_exp.config.compose import compose
from dino_exp.dino.loss import dino_loss, updated_center
from dino_exp.dino.optim import clip_per_parameter_, ema_update_, set_hyper

NUM_STEPS = 220
THREADS = 2
OVERRIDES = [
    f"train.stop_after_steps={NUM_STEPS}",
    "evaluation.every_epochs=null",
    f"runtime.threads={THREADS}",
]


def bare_script() -> float:
    """Seconds of the steps alone, in a script as short as one could write it."""
    config = config_from_mapping(compose(OVERRIDES))
    data = build.build_data(config.data)
    state = build.build_state(config, data.train.channels, torch.device("cpu"))
    augment = build.build_augment(config)
    torch.set_num_threads(THREADS)
    batches = build.build_batches(config, data.train, 0)
    params, averages = list(state.student.parameters()), list(state.teacher.parameters())
    started = time.perf_counter()
    for _ in range(NUM_STEPS):
        batch = next(batches)
        crops = augment(batch.images, batch.sample_ids_B, batch.epoch)
        with torch.no_grad():
            teacher, _ = state.teacher(crops[:2])
        student, _ = state.student(crops)
        terms = dino_loss(student, teacher, state.center_1K, student_temp=0.1, teacher_temp=0.04)
        state.center_1K.copy_(updated_center(state.center_1K, teacher, 0.9))
        state.optimizer.zero_grad()
        terms.loss.backward()
        clip_per_parameter_([p.grad for p in params if p.grad is not None], 3.0)
        set_hyper(state.optimizer, lr=1e-3, weight_decay=0.04)
        state.optimizer.step()
        ema_update_(averages, params, 0.99)
    return time.perf_counter() - started


def whole_loop() -> float:
    """Seconds of the same steps in the real loop, with rows, progress and checkpoints, from first to last event."""
    with tempfile.TemporaryDirectory() as outputs, Path("/dev/null").open("w") as nowhere:
        overrides = [*OVERRIDES, f"paths.outputs={outputs}"]
        composed = compose(overrides)
        seconds: list[float] = []
        timed(
            seconds,
            lambda: run_attempt(
                lambda: start_target(composed), Command(overrides=overrides, composed=composed), Console(file=nowhere)
            ),
        )
        return seconds[0]


def timed(seconds: list[float], command: object) -> None:
    """Time `run_training` alone: starting up is measured by benchmarks/startup.py."""
    from dino_exp.attempts import work

    real = work.run_training

    def watched(training: object) -> object:
        started = time.perf_counter()
        try:
            return real(training)  # type: ignore[arg-type]
        finally:
            seconds.append(time.perf_counter() - started)

    work.run_training = watched  # type: ignore[assignment]
    try:
        assert callable(command)
        command()
    finally:
        work.run_training = real


def main() -> None:
    parser_of(__doc__).parse_args()
    logging.disable(logging.WARNING)
    print(HEADER)
    pairs = in_pairs(whole_loop, bare_script, num_pairs=7)
    print(pairs.line(f"loop, {NUM_STEPS} steps of digits", "bare script", "≤ 1.10"))


if __name__ == "__main__":
    main()

"""Retention plans with all their reasons, as text files. To renew them: UPDATE_GOLDEN=1 pytest <this file>."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
from config_examples import config

from dino_exp.build import build_keep_policy
from dino_exp.checkpoint.policies import (
    BestN,
    EveryNEpochs,
    KeepAny,
    LatestN,
    Milestones,
    Pinned,
    milestone_from_text,
)
from dino_exp.checkpoint.types import CheckpointInfo, Schedule

GOLDEN = Path(__file__).parent.parent / "golden" / "retention"
RUN = Schedule(horizon_steps=990, steps_per_epoch=99)
QUARTERS = Milestones(tuple(milestone_from_text(text) for text in ("25%", "50%", "75%", "100%")))
BEST = BestN("knn_top1")

RISING = [0.60, 0.72, 0.80, 0.85, 0.91, 0.93, 0.94, 0.95, 0.952, 0.951]


def run_of(knn: list[float], **changes: CheckpointInfo) -> list[CheckpointInfo]:
    """One checkpoint at each epoch's end, and those at the quarters of the horizon."""
    infos = {
        99 * epoch: CheckpointInfo(step=99 * epoch, epoch=epoch, metrics={"knn_top1": value})
        for epoch, value in enumerate(knn, start=1)
    }
    for label, step in (("25%", 248), ("50%", 495), ("75%", 743), ("100%", 990)):
        if step <= 99 * len(knn):
            old = infos.get(step)
            metrics = {} if old is None else old.metrics
            infos[step] = CheckpointInfo(step=step, epoch=step // 99, metrics=metrics, reasons=(f"milestone {label}",))
    return list(infos.values())


def changed(infos: list[CheckpointInfo], step: int, **fields: object) -> list[CheckpointInfo]:
    return [
        CheckpointInfo(**(vars(one) | fields)) if one.step == step else one  # type: ignore[arg-type]
        for one in infos
    ]


def kept_by(*overrides: str) -> KeepAny:
    """The policy that settings make."""
    return build_keep_policy(config(*(f"checkpoint.keep.{override}" for override in overrides)).checkpoint)


def measured(values: list[dict[str, float]]) -> list[CheckpointInfo]:
    """One checkpoint at each epoch's end, with several metrics."""
    return [
        CheckpointInfo(step=99 * epoch, epoch=epoch, metrics=metrics) for epoch, metrics in enumerate(values, start=1)
    ]


TWO_METRICS = [
    {"knn_top1": 0.60, "val_loss": 4.0, "knn_1shot": 0.30},
    {"knn_top1": 0.90, "val_loss": 3.0, "knn_1shot": 0.55},
    {"knn_top1": 0.80, "val_loss": 2.0, "knn_1shot": 0.50},
    {"knn_top1": 0.85, "val_loss": 2.5, "knn_1shot": 0.40},
    {"knn_top1": 0.70, "val_loss": math.nan, "knn_1shot": math.inf},
    {"knn_top1": 0.75},
    {"knn_top1": 0.74, "val_loss": 3.5, "knn_1shot": 0.45},
]
ALSO_BEST = "also_best=[val_loss:min:1,knn_1shot:max:2]"

CASES = {
    "rotating": (KeepAny((LatestN(3), BEST, QUARTERS, Pinned())), run_of(RISING)),
    "rotating-midway": (KeepAny((LatestN(3), BEST, QUARTERS, Pinned())), run_of(RISING[:6])),
    "last-one-only": (KeepAny((LatestN(1),)), run_of(RISING)),
    "no-rule": (KeepAny(()), run_of(RISING[:3])),
    "best-three-of-two-metrics": (
        KeepAny((LatestN(1), BestN("knn_top1", "max", 3), BestN("loss", "min", 1))),
        [
            CheckpointInfo(step=step, epoch=step, metrics={"knn_top1": step % 7 / 10, "loss": 1 / step})
            for step in range(1, 12)
        ],
    ),
    "milestones-only": (KeepAny((QUARTERS,)), run_of(RISING)),
    "milestones-of-an-earlier-setting": (KeepAny((LatestN(1), Milestones())), run_of(RISING)),
    "every-third-epoch": (KeepAny((LatestN(2), EveryNEpochs(3))), run_of(RISING)),
    "pinned": (KeepAny((LatestN(1), Pinned())), changed(run_of(RISING), 297, pinned=True)),
    "nan-and-missing": (KeepAny((LatestN(1), BEST)), run_of([0.5, math.nan, 0.4, math.inf, 0.3])),
    "ties": (KeepAny((LatestN(1), BestN("knn_top1", "max", 2))), run_of([0.5, 0.9, 0.9, 0.9])),
    "collapsed": (
        KeepAny((LatestN(1), BEST)),
        changed(changed(run_of([0.5, 0.6, 0.7, 0.9]), 297, healthy=False), 396, healthy=False),
    ),
    "collapsed-of-two-metrics": (
        KeepAny((LatestN(1), BestN("knn_top1"), BestN("knn_1shot"))),
        changed(run_of([0.5, 0.6, 0.9]), 198, healthy=False),
    ),
    "nothing-verified": (
        KeepAny((LatestN(1),)),
        [CheckpointInfo(step=step, epoch=step, verified=False) for step in range(1, 5)],
    ),
    "newest-not-verified": (KeepAny((LatestN(1),)), changed(run_of(RISING[:3]), 297, verified=False)),
    "thinned": (KeepAny((LatestN(1), QUARTERS)), changed(run_of(RISING), 248, resumable=False)),
    "also-best": (kept_by("last=1", ALSO_BEST), measured(TWO_METRICS)),
    "also-best-without-best": (kept_by("last=1", "best=0", ALSO_BEST), measured(TWO_METRICS)),
    "every-second-epoch-and-milestones": (
        kept_by("last=1", "best=0", "every_epochs=2", "milestones=[50%,3]"),
        run_of(RISING),
    ),
    "empty": (KeepAny((LatestN(3), BEST)), []),
}


@pytest.mark.parametrize("name", CASES)
def test_plan_with_reasons(name: str) -> None:
    policy, infos = CASES[name]
    plan = policy.plan(infos, RUN)
    text = "".join(f"step {step:4d}  {plan.reasons[step]}\n" for step in sorted(plan.keep + plan.drop))
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert path.read_text() == text


def test_no_golden_file_is_left_over() -> None:
    assert {path.stem for path in GOLDEN.glob("*.txt")} == CASES.keys()

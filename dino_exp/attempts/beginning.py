"""How every rank of an attempt begins: with which generators, signals, objects, and position in the rows."""

from __future__ import annotations

import gc
import logging
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dino_exp.checkpoint.generators import restore_generators
from dino_exp.checkpoint.manifest import Manifest
from dino_exp.config.checkpoint_sections import KeepConfig
from dino_exp.config.texts import read_best
from dino_exp.dist.ranks import Ranks
from dino_exp.errors import CorruptCheckpointError
from dino_exp.evaluation.panel import VAL_LOSS, Panel
from dino_exp.runs.signals import SignalFlags
from dino_exp.training.agreement import AgreedSignals, Signals

log = logging.getLogger("dino_exp")

OPTIONAL = ("optimizer.",)  # a fresh optimizer has no moments, and a frozen layer none in the checkpoint


@dataclass(frozen=True)
class Beginning:
    """What the other ranks must know of the state that rank 0 begins with: rows so far, and what was begun with."""

    num_rows: int
    begun_with: str | None
    latest: dict[str, Any]


def set_generators(manifest: Manifest | None, seed: int, rank: int = 0) -> None:
    """Library generators, for code that draws from them: as this rank had them, or seeded where it had none."""
    if manifest is not None:
        try:
            if restore_generators(manifest, rank):
                return
        except CorruptCheckpointError as problem:
            log.warning("%s; library generators start anew (training itself draws from none)", problem)
            return
    random.seed(seed + rank)
    np.random.seed((seed + rank) % 2**32)
    torch.manual_seed(seed + rank)


def signals_of(flags: SignalFlags, ranks: Ranks) -> Signals:
    """Signals as the loop sees them: those of this process, or of all ranks."""
    return flags if ranks.place.size == 1 else AgreedSignals(flags, ranks)


def remarks_on(panel: Panel, keep: KeepConfig) -> list[str]:
    """What evaluations will not measure, and what cannot be ranked for that reason, in sentences with a way out."""
    remarks = panel.remarks()
    missing = f"is not among what is measured ({', '.join(panel.metrics)})"
    if keep.metric not in panel.metrics:
        remarks.append(
            f"checkpoint.keep.metric={keep.metric} {missing}: no checkpoint will be the best one, and nothing else "
            f"changes. To rank by the loss on held-out images: checkpoint.keep.metric={VAL_LOSS} "
            "checkpoint.keep.mode=min; but the loss of DINO misleads: it also falls when the model collapses"
        )
    remarks += [
        f"checkpoint.keep.also_best: {text} {missing}: it keeps nothing"
        for text in keep.also_best
        if read_best(text)[0] not in panel.metrics
    ]
    return remarks


def freeze_objects() -> None:
    """From now on garbage is collected again, but for the million objects of imported modules."""
    gc.collect()
    gc.freeze()
    gc.enable()


def position_of(manifest: Manifest) -> tuple[int, int]:
    """How many rows, in how many bytes, of metrics.jsonl belong to a checkpoint. Raises CorruptCheckpointError."""
    rows, num_bytes = manifest.aside.get("metrics_rows"), manifest.aside.get("metrics_bytes")
    if type(rows) is not int or type(num_bytes) is not int or not 0 <= rows <= num_bytes < 2**63:
        raise CorruptCheckpointError(f"step {manifest.step} does not say which rows of metrics.jsonl belong to it")
    return rows, num_bytes

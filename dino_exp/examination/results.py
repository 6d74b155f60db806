"""Where the results of an evaluation go, and what the file of them says. Never into a run, which has one writer."""

from __future__ import annotations

import json
import math
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

import dino_exp
from dino_exp.checkpoint.layout import manifest_name
from dino_exp.config.evaluate import EvaluateConfig
from dino_exp.config.fields import walk_values
from dino_exp.errors import UsageError
from dino_exp.examination.kinds import Findings
from dino_exp.examination.subject import Subject
from dino_exp.fsio import make_dirs, write_shared
from dino_exp.runs.key import parse_run_key
from dino_exp.runs.layout import RunPaths
from dino_exp.weights.source import CheckpointWeights

FORMAT = 1
_FOLDER = "evaluations"
_LIST_OF_NUMBERS = re.compile(r"\[\s+((?:-?[0-9][0-9.e+-]*,\s+)*-?[0-9][0-9.e+-]*)\s+\]")


def results_folder(config: EvaluateConfig, weights: CheckpointWeights, run: RunPaths) -> Path:
    """The folder for the results of one checkpoint. Raises UsageError for one inside of a run directory."""
    if config.out is None:
        said = weights.manifest.record.get("run_key")
        # A file of a stranger names the run: only what is a run's name becomes a folder's.
        key = said if isinstance(said, str) and parse_run_key(said) is not None else run.directory.resolve().name
        step = manifest_name(weights.manifest.step).removesuffix(".json")
        folder = Path(config.paths.outputs) / _FOLDER / key / step
    else:
        folder = Path(config.out)
    for parent in (folder.resolve(), *folder.resolve().parents):
        if RunPaths(parent).run_json.exists() or parent == run.directory.resolve():
            raise UsageError(
                f"out={folder} is inside of the run {parent}, where only its owner writes; choose another folder, or "
                f"leave out= away for {_FOLDER}/ below paths.outputs"
            )
    return folder


def write_results(
    folder: Path,
    config: EvaluateConfig,
    subject: Subject,
    found: Findings,
    numerics: Mapping[str, Any],
    *,
    made_at: str,
    secs: float,
) -> list[Path]:
    """Write the picture and then the JSON, each atomically; the paths, the JSON first.

    An older result of the same name is replaced. Raises OSError.
    """
    make_dirs(folder)
    name = config.evaluation.name + ("" if config.part == "teacher" else f"-{config.part}")
    pictures = [folder / f"{name}{suffix}" for suffix in (".svg", ".png")] if found.picture is not None else []
    for path in pictures:
        assert found.picture is not None
        found.picture.save(path)
    record = {
        **describe(config, subject, found),
        "pictures": [path.name for path in pictures],
        "numerics": dict(numerics),
        "versions": {
            "dino_exp": dino_exp.__version__, "torch": torch.__version__, "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "created_at": made_at,
        "secs": round(secs, 3),
    }  # fmt: skip
    path = folder / f"{name}.json"
    write_shared(path, json_text(record))
    return [path, *pictures]


def describe(config: EvaluateConfig, subject: Subject, found: Findings) -> dict[str, Any]:
    """What was evaluated, how, and with which result, as JSON: the same for the same command."""
    facts, fingerprint = subject.facts, subject.data.train.fingerprint()
    settings = {key: value for key, _, value in walk_values(config.evaluation)}
    return {
        "format": FORMAT,
        "evaluation": config.evaluation.name,
        **facts,
        "part": config.part,
        "seed": subject.recorded.seed,
        "data": {
            "train": subject.data.train.name,
            "held_out": subject.data.val.name,
            "fingerprint": fingerprint,
            "same_as_in_training": None if facts["data_fingerprint"] is None else same_data(subject),
        },
        "settings": settings,
        "metrics": dict(found.metrics),
        "details": dict(found.details),
    }


def same_data(subject: Subject) -> bool:
    """Whether the data at hand is that of the training; also where the checkpoint does not say."""
    said = subject.facts["data_fingerprint"]
    return said is None or said == subject.data.train.fingerprint()


def _finite(value: Any) -> Any:
    """The same with null for what is no number, such as the loss of a probe whose learning rate was far too large."""
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def json_text(record: Mapping[str, Any]) -> str:
    """JSON for people and programs: a line a member, and a line a list of numbers."""
    text = json.dumps(_finite(record), indent=1, allow_nan=False, ensure_ascii=False)
    return _LIST_OF_NUMBERS.sub(lambda found: "[" + " ".join(found[1].split()) + "]", text) + "\n"

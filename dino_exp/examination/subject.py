"""A checkpoint and all that is needed to evaluate it, out of the run that it belongs to.

Its data, sizes, normalisation and seed are those that the checkpoint records; they are read as plain data and checked.
"""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from dino_exp import build
from dino_exp.config.check import section_from_mapping
from dino_exp.config.evaluate import RecordedConfig
from dino_exp.config.learning_sections import EvaluationConfig
from dino_exp.config.stored import load_stored
from dino_exp.data.datasets import Dataset, Indices
from dino_exp.data.images import Images
from dino_exp.errors import ConfigError, CorruptCheckpointError, DinoExpError, NoCheckpointError, UsageError
from dino_exp.evaluation.features import extract_features
from dino_exp.examination.place import AS_THE_RUN, Place, build_data_of
from dino_exp.models.vit import VisionTransformer
from dino_exp.runs.layout import RunPaths
from dino_exp.runs.named import named
from dino_exp.runs.record import load_record
from dino_exp.weights.architecture import build_backbone
from dino_exp.weights.names import Part
from dino_exp.weights.source import BACKBONE, CheckpointWeights, open_checkpoint

USUAL_BATCH = 256  # images of a forward pass, where the run does not say how many it took

Progress = Callable[[str, int, int | None], None]
"""Hears of long work: what it is, how much of it is done, of how much (None: not known)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Subject:
    """One network of one checkpoint, and the data of its run.

    `facts` say where it comes from; they are taken at the start, because a training may drop the checkpoint meanwhile.
    """

    weights: CheckpointWeights
    facts: Mapping[str, Any]
    paths: RunPaths
    part: Part
    recorded: RecordedConfig
    device: torch.device
    progress: Progress
    place: Place = AS_THE_RUN

    @cached_property
    def model(self) -> VisionTransformer:
        """The backbone, in evaluation mode.

        Raises NoCheckpointError without this part, or where a training dropped the checkpoint meanwhile;
        CorruptCheckpointError.
        """
        architecture, run = self.weights.architecture(self.part), shlex.quote(str(self.paths.directory))
        try:
            tensors = self.weights.tensors(f"{self.part}.{BACKBONE}")
        except FileNotFoundError as gone:
            raise NoCheckpointError(
                f"{self.weights.where}: it is gone; a run that trains on keeps newer ones instead. To see which "
                f"there are: dino-exp checkpoints list {run}"
            ) from gone
        except CorruptCheckpointError as damage:
            damage.add_note(f"what else is damaged: dino-exp checkpoints verify {run}; an older one: of={run}@<step>")
            raise
        strange = next((name for name, tensor in tensors.items() if not tensor.isfinite().all()), None)
        if strange is not None:
            raise CorruptCheckpointError(f"{self.weights.where}: {strange[:100]} holds values that are no numbers")
        return build_backbone(architecture, tensors, self.weights.where).to(self.device)

    @cached_property
    def data(self) -> build.Data:
        """The images to train on and the held-out ones."""
        return build_data_of(self.recorded.data, self.paths, self.place, self.progress)

    def clean(self, images: Images, image_size: int | None = None) -> Tensor:
        """Raw images as the model sees them in evaluation, or at another size. Raises ConfigError for a bad size."""
        data = self.recorded.data
        if image_size is not None and image_size % data.patch_size:
            fitting = max(round(image_size / data.patch_size), 1) * data.patch_size
            raise ConfigError(
                f"evaluation.image_size={image_size} is no multiple of the patches of {data.patch_size} pixels: "
                f"try evaluation.image_size={fitting}"
            )
        sized = replace(data, image_size=data.image_size if image_size is None else image_size)
        return build.build_augment(replace(self.recorded, data=sized)).clean(images.to(self.device))

    def features(
        self, forward: Callable[[Tensor], Tensor], dataset: Dataset, batch_size: int, ids: Indices | None = None
    ) -> Tensor:
        """What `forward`, of the model, makes of a data set's images at `ids` (None: all), (N, F) on the device."""
        chosen = np.arange(len(dataset)) if ids is None else ids
        starts = range(0, len(chosen), batch_size)
        clean = build.build_augment(self.recorded).clean

        def batches() -> Any:
            for number, start in enumerate(starts):
                self.progress(f"features of {dataset.name}", number, len(starts))
                yield clean(dataset.images(chosen[start : start + batch_size]).to(self.device))

        return extract_features(self.model, forward, batches()).float()

    def shown(self, ids: Indices, image_size: int | None = None) -> tuple[Tensor, Tensor]:
        """Held-out images as the model takes them (B, C, H, W), and the same from 0 to 1 to look at (B, H, W, C)."""
        raw = self.data.val.images(ids)
        seen = self.clean(raw, image_size)
        return seen, self._to_look_at(seen, raw)

    def crops(self, ids: Indices, epoch: int) -> list[Tensor]:
        """Training images from 0 to 1 to look at, (B, H, W, C): undistorted, then every crop that an epoch sees."""
        raw = self.data.train.images(ids)
        augment, images = build.build_augment(self.recorded), raw.to(self.device)
        seen = [augment.clean(images), *augment(images, torch.from_numpy(ids), epoch)]
        return [self._to_look_at(view, raw) for view in seen]

    def _to_look_at(self, seen_BCHW: Tensor, raw: Images) -> Tensor:
        """(B, H, W, C) from 0 to 1. Normalisation is linear, so black and white say what it was."""
        one = raw.at(slice(1))
        black, white = (
            self.clean(replace(one, pixels_BCHW=torch.full_like(one.pixels_BCHW, value)))[..., :1, :1]
            for value in (0, 255)
        )
        return ((seen_BCHW - black) / (white - black)).clamp(0, 1).permute(0, 2, 3, 1).cpu()

    @property
    def usual_batch(self) -> int:
        """How many images at once the run evaluated: other numbers may give other bits."""
        return USUAL_BATCH if self._usual is None else self._usual.batch_size

    @property
    def usual_images(self) -> tuple[int | None, int | None]:
        """How many training and held-out images the run evaluated with, where its settings say; None: all."""
        return (None, None) if self._usual is None else (self._usual.train_images, self._usual.val_images)

    @cached_property
    def _usual(self) -> EvaluationConfig | None:
        with contextlib.suppress(DinoExpError, OSError):
            return load_stored(self.paths.directory).evaluation
        return None


def find_subject(of: str, part: Part, outputs: Path) -> tuple[CheckpointWeights, RunPaths]:
    """The checkpoint that somebody named, and where its run lies; the latest where it was not said which.

    Raises UsageError, NoCheckpointError without this part or checkpoint, CorruptCheckpointError.
    """
    if of.endswith(".safetensors"):
        raise UsageError(
            f"of={of}: a file of weights does not say what it was trained on, expected a checkpoint; the metadata of "
            "an export names its run and step: of=<run>@<step>"
        )
    found = named(of, outputs)
    weights = open_checkpoint(found)
    weights.require(part)
    return weights, found.paths


def recorded_numerics(paths: RunPaths) -> Mapping[str, Any]:
    """Device and threads of the run, as its record tells; nothing where there is none that can be read."""
    with contextlib.suppress(DinoExpError, OSError):
        record = load_record(paths.run_json)
        return {} if record is None else record.numerics
    return {}


def recorded_settings(weights: CheckpointWeights) -> RecordedConfig:
    """What an evaluation needs of a checkpoint's settings. Raises CorruptCheckpointError for others than ours."""
    settings = weights.settings
    wanted = {name: settings.get(name) for name in ("seed", "data", "augment")} if isinstance(settings, dict) else {}
    try:
        return section_from_mapping(RecordedConfig, cast(Mapping[str, Any], wanted))
    except ConfigError as problem:
        raise CorruptCheckpointError(
            f"{weights.where}: the settings that it records are not those of this version, so that its data is unknown "
            f"({str(problem)[:300]})"
        ) from problem

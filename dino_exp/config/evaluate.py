"""The settings of `python -m dino_exp.evaluate`, one frozen dataclass for each section and each kind of evaluation.

The values live in `conf/evaluate.yaml` and `conf/evaluation/`. None of them is part of a run's identity: what an
evaluation must know of a run (its data, sizes, normalisation, seed) comes from the checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dino_exp.config.fields import Section, setting
from dino_exp.config.image_sections import AnyAugmentConfig, AnyDataConfig
from dino_exp.config.schema import MAX_SEED, PathsConfig

_ONE_OR_MORE = "one, or a list"
_IMAGES = "how many held-out images, of all classes in turn; or a list of their numbers, from 0"


@dataclass(frozen=True, kw_only=True)
class KindConfig(Section):
    """What all evaluations have."""

    name: str = setting(
        role="budget", choices=("knn", "linear", "attention", "features", "crops"), help="which evaluation"
    )


@dataclass(frozen=True, kw_only=True)
class KnnConfig(KindConfig):
    """k nearest neighbours on frozen features, with all labels and with few; as during training."""

    name: str = setting(role="budget", choices=("knn",), help="which evaluation")
    batch_size: int | None = setting(
        minimum=1, role="numerics", help="images of a forward pass; null: as the run evaluated"
    )
    train_images: int | None = setting(
        minimum=1,
        role="budget",
        help="training images to compare with, evenly spread; null: all, also where the run took fewer",
    )
    val_images: int | None = setting(
        minimum=1, role="budget", help="held-out images that are measured, evenly spread; null: all"
    )
    k: int | tuple[int, ...] = setting(minimum=1, role="budget", help=f"neighbours that vote; {_ONE_OR_MORE}")
    temperature: float = setting(above=0, role="budget", help="a vote weighs exp(similarity / this)")
    labels_per_class: int | tuple[int, ...] = setting(
        minimum=1, role="budget", help=f"images of a class that have a label; {_ONE_OR_MORE}; []: only with all labels"
    )
    draws: int = setting(
        minimum=1,
        maximum=10_000,
        role="budget",
        help="random choices of the labelled images that few are averaged over",
    )


@dataclass(frozen=True, kw_only=True)
class LinearConfig(KindConfig):
    """A linear classifier on frozen features; the defaults are those of official DINO's `eval_linear.py`."""

    name: str = setting(role="budget", choices=("linear",), help="which evaluation")
    batch_size: int = setting(minimum=1, role="budget", help="images of a step of the classifier's training")
    epochs: int = setting(minimum=1, role="budget", help="passes over the features")
    lr: float | tuple[float, ...] = setting(
        above=0,
        maximum=1e6,
        role="budget",
        help=f"learning rate at the start, times batch_size / 256; {_ONE_OR_MORE}: one probe each",
    )
    momentum: float = setting(minimum=0, maximum=0.999999, role="budget", help="of SGD; there is no weight decay")
    num_blocks: int | None = setting(
        minimum=1, role="budget", help="last blocks whose class tokens are taken; null: 4 up to ViT-S, 1 for larger"
    )
    mean_patch: bool | None = setting(
        role="budget", help="whether the mean of the patches is taken too; null: for models larger than ViT-S"
    )
    labels_per_class: int | tuple[int, ...] = setting(
        minimum=1, role="budget", help=f"the same again with so many labelled images of a class; {_ONE_OR_MORE}"
    )
    draws: int = setting(
        minimum=1,
        maximum=10_000,
        role="budget",
        help="random choices of the labelled images that few are averaged over",
    )


@dataclass(frozen=True, kw_only=True)
class AttentionConfig(KindConfig):
    """Where the class token looks in the last block, head by head, as a picture."""

    name: str = setting(role="budget", choices=("attention",), help="which evaluation")
    images: int | tuple[int, ...] = setting(minimum=0, role="budget", help=_IMAGES)
    image_size: int | None = setting(
        minimum=1, maximum=4096, role="budget", help="side of the images, pixels; null: as in training"
    )


@dataclass(frozen=True, kw_only=True)
class FeaturesConfig(KindConfig):
    """The three principal components of the patches' features as colours, as a picture."""

    name: str = setting(role="budget", choices=("features",), help="which evaluation")
    images: int | tuple[int, ...] = setting(minimum=0, role="budget", help=_IMAGES)
    image_size: int | None = setting(
        minimum=1, maximum=4096, role="budget", help="side of the images, pixels; null: as in training"
    )


@dataclass(frozen=True, kw_only=True)
class CropsConfig(KindConfig):
    """Every crop of some training images that an epoch sees, beside the undistorted images, as a picture."""

    name: str = setting(role="budget", choices=("crops",), help="which evaluation")
    images: int | tuple[int, ...] = setting(minimum=0, role="budget", help=_IMAGES.replace("held-out", "training"))
    epoch: int = setting(minimum=0, maximum=MAX_SEED, role="budget", help="whose crops, from 0")


@dataclass(frozen=True, kw_only=True)
class MachineConfig(Section):
    """The machine. None of it changes what is computed, only perhaps its last bits."""

    device: str = setting(role="numerics", choices=("auto", "cpu", "cuda"), help="auto: cuda if there")
    threads: int | None = setting(
        minimum=1, maximum=1024, role="numerics", help="torch threads; null: as many as the run had"
    )
    deterministic: bool = setting(role="numerics", help="only deterministic kernels")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Section):
    """All settings of an evaluation."""

    of: str = setting(
        role="budget",
        pattern=r".+",
        help="run[@latest|@best|@step], or a manifest's path; a run: directory, prefix, last",
    )
    part: str = setting(role="budget", choices=("teacher", "student"), help="which of the two networks")
    out: str | None = setting(
        role="runtime", pattern=r".+", help="folder of the results; null: <paths.outputs>/evaluations/<run>/step-<step>"
    )
    root: str | None = setting(
        role="runtime", pattern=r".+", help="folder of the run's images, where they were moved; null: as in training"
    )
    evaluation: KnnConfig | LinearConfig | AttentionConfig | FeaturesConfig | CropsConfig
    runtime: MachineConfig
    paths: PathsConfig


@dataclass(frozen=True, kw_only=True)
class RecordedConfig(Section):
    """What an evaluation needs of the settings that a checkpoint records."""

    seed: int = setting(minimum=0, maximum=MAX_SEED, help="of all randomness")
    data: AnyDataConfig
    augment: AnyAugmentConfig


def listed(value: Any) -> tuple[Any, ...]:
    """The value of a setting that is one or a list, as a list."""
    return value if isinstance(value, tuple) else (value,)

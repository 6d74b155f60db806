"""Data sets, augmentation and loaders, from the settings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from dino_exp.build.cifar import build_cifar
from dino_exp.build.preparation import Preparation
from dino_exp.config.evaluate import RecordedConfig
from dino_exp.config.image_sections import AnyDataConfig, CifarDataConfig, DigitsAugmentConfig, FilesDataConfig
from dino_exp.config.schema import Config
from dino_exp.data.augment_digits import DigitsAugment
from dino_exp.data.augment_dino import DinoAugment
from dino_exp.data.datasets import Dataset
from dino_exp.data.digits import load_digits_split
from dino_exp.data.loader import Batch, BatchStream
from dino_exp.data.synthetic import SyntheticDataset
from dino_exp.dist.place import ALONE, Place


@dataclass(frozen=True)
class Data:
    """The images to train on and the held-out ones."""

    train: Dataset
    val: Dataset


def build_data(data: AnyDataConfig, how: Preparation | None = None) -> Data:
    """The data set that `data.name` selects; `how` says how one that lies in files is prepared."""
    if isinstance(data, CifarDataConfig):
        assert how is not None, "the data may have to be fetched"
        return Data(*build_cifar(data, how))
    if isinstance(data, FilesDataConfig):
        from dino_exp.build.files import build_files  # decoders take a while to import, and most data has none

        assert how is not None, "images in files may need a cache"
        return Data(*build_files(data, how))
    if data.name == "synthetic":
        assert data.num_samples is not None
        assert data.num_classes is not None
        parts = [
            SyntheticDataset(split=split, num_samples=data.num_samples, num_classes=data.num_classes)
            for split in ("train", "val")
        ]
        return Data(*parts)
    return Data(load_digits_split("train"), load_digits_split("val"))


def cache_to_make(settings: AnyDataConfig, data: Data) -> int | None:
    """About how many bytes the cache takes that a training begins with; None where it finds one, or wants none."""
    if not isinstance(settings, FilesDataConfig) or not settings.cache:
        return None
    from dino_exp.data.files.cache_build import estimated_bytes
    from dino_exp.data.files.dataset import FilesDataset

    assert isinstance(data.train, FilesDataset)
    return estimated_bytes(data.train.listing, settings.decode_size) if data.train.canvases is None else None


def decoding(data: AnyDataConfig) -> dict[str, str]:
    """What decodes the images, with its versions, for the records of numerics; empty where nothing is decoded."""
    if not isinstance(data, FilesDataConfig):
        return {}
    from dino_exp.data.files.decode import decoder_name

    return {"decoder": decoder_name()}


def build_augment(config: Config | RecordedConfig) -> DigitsAugment | DinoAugment:
    """The augmentation that `augment.name` selects, cutting the crops that `data` asks for."""
    values: dict[str, Any] = vars(config.augment) | {
        "seed": config.seed,
        "global_size": config.data.image_size,
        "local_size": config.data.local_size,
    }
    del values["name"]
    return DigitsAugment(**values) if isinstance(config.augment, DigitsAugmentConfig) else DinoAugment(**values)


def build_prefetch(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """The same batches, where a CUDA device computes on their way there before they are asked for."""
    if device.type != "cuda":
        return batches
    from dino_exp.data.prefetch import OnDevice

    return OnDevice(batches, device)


def build_batches(config: Config, dataset: Dataset, start_step: int, place: Place = ALONE) -> BatchStream:
    """The loader of this process's shares, continuing after `start_step`; its workers start here."""
    return BatchStream(
        dataset,
        seed=config.seed,
        batch_size=config.train.batch_size,
        start_step=start_step,
        num_workers=config.runtime.workers,
        place=place,
    )

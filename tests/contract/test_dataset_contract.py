"""What every data set must hold to. A new one joins by a line in `DATASETS`."""

import functools
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from support.cifar_files import SMALL10, SMALL100, write_folder
from support.pictures import small_tree

from dino_exp.build import Data, Preparation, build_data
from dino_exp.config.image_sections import FilesDataConfig
from dino_exp.data.cifar import Cifar, load_cifar
from dino_exp.data.datasets import Dataset
from dino_exp.data.digits import load_digits_split
from dino_exp.data.synthetic import SyntheticDataset


@functools.cache
def _cifar_root(cifar: Cifar) -> tempfile.TemporaryDirectory[str]:
    """A folder with few rows, which lasts as long as this process."""
    made = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    write_folder(cifar, Path(made.name))
    return made


def cifar_part(cifar: Cifar, part: int) -> Dataset:
    return load_cifar(cifar, Path(_cifar_root(cifar).name))[part]


@functools.cache
def pictures() -> tempfile.TemporaryDirectory[str]:
    """Two trees, of the layout of a folder and of ImageNet; gone when this process ends."""
    place = tempfile.TemporaryDirectory(prefix="pictures-")
    small_tree(Path(place.name) / "folder", 120)
    for part in ("train", "val"):
        small_tree(Path(place.name) / "imagenet" / part, 60)
    return place


def of_files(name: str, *, cache: bool = False) -> Data:
    place = Path(pictures().name)
    data = FilesDataConfig(
        name=name, root=str(place / name), cache=cache, image_size=16, local_size=8, patch_size=8, digest=None,
        decode_size=48, labels="folders", val_share=0.5, unreadable="refuse", download=False,
    )  # fmt: skip
    return build_data(data, Preparation(cache=place / "cache"))


DATASETS: dict[str, Callable[[], Dataset]] = {
    "digits_train": lambda: load_digits_split("train"),
    "digits_val": lambda: load_digits_split("val"),
    "synthetic_train": lambda: SyntheticDataset(split="train", num_samples=100, num_classes=5),
    "synthetic_val": lambda: SyntheticDataset(split="val", num_samples=100, num_classes=5),
    "cifar10_train": lambda: cifar_part(SMALL10, 0),
    "cifar10_val": lambda: cifar_part(SMALL10, 1),
    "cifar100_train": lambda: cifar_part(SMALL100, 0),
    "cifar100_val": lambda: cifar_part(SMALL100, 1),
    "folder_train": lambda: of_files("folder").train,
    "folder_val": lambda: of_files("folder").val,
    "imagenet_train": lambda: of_files("imagenet").train,
    "imagenet_val": lambda: of_files("imagenet", cache=True).val,
}


@pytest.fixture(params=DATASETS)
def build(request: pytest.FixtureRequest) -> Callable[[], Dataset]:
    return DATASETS[request.param]


def test_images_are_uint8_of_the_declared_shape(build: Callable[[], Dataset]) -> None:
    dataset = build()
    images = dataset.images(np.array([0, len(dataset) - 1])).pixels_BCHW
    assert images.dtype == torch.uint8
    assert images.shape == (2, dataset.channels, *dataset.size)
    assert images.is_contiguous()
    assert images.max() > images.min()


def test_labels_are_int64_and_every_class_occurs(build: Callable[[], Dataset]) -> None:
    dataset = build()
    labels = dataset.labels(np.arange(len(dataset)))
    assert labels.dtype == torch.int64
    assert labels.unique().tolist() == list(range(dataset.num_classes))


def test_an_image_is_a_pure_function_of_its_index(build: Callable[[], Dataset]) -> None:
    dataset = build()
    together = dataset.images(np.array([5, 3, 5, 40])).pixels_BCHW
    assert torch.equal(together[0], together[2])
    for position, index in enumerate([5, 3, 5, 40]):
        assert torch.equal(build().images(np.array([index])).pixels_BCHW[0], together[position])


def test_images_may_be_written_to_without_harm(build: Callable[[], Dataset]) -> None:
    dataset = build()
    before = dataset.images(np.array([1])).pixels_BCHW.clone()
    dataset.images(np.array([1])).pixels_BCHW.zero_()
    assert torch.equal(dataset.images(np.array([1])).pixels_BCHW, before)


def test_it_survives_pickling(build: Callable[[], Dataset]) -> None:
    dataset = build()
    copy = pickle.loads(pickle.dumps(dataset))  # noqa: S301 - our own bytes, of a moment ago
    assert copy.fingerprint() == dataset.fingerprint()


def test_the_fingerprint_is_stable(build: Callable[[], Dataset]) -> None:
    fingerprint = build().fingerprint()
    assert fingerprint.startswith("sha256:")
    assert len(fingerprint) == len("sha256:") + 64
    assert build().fingerprint() == fingerprint


def test_fingerprints_differ() -> None:
    assert len({build().fingerprint() for build in DATASETS.values()}) == len(DATASETS)

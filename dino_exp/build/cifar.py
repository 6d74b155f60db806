"""CIFAR from the folder that the settings name, fetched first where they ask for it."""

from __future__ import annotations

from pathlib import Path

from dino_exp.build.preparation import Preparation, in_turn
from dino_exp.config.image_sections import CifarDataConfig
from dino_exp.data.cifar import COLLECTIONS, check_place, fetch_cifar, load_cifar
from dino_exp.data.datasets import ArrayDataset
from dino_exp.data.files.listing import Progress
from dino_exp.errors import ConfigError

_MEGABYTE = 1_000_000


def build_cifar(data: CifarDataConfig, how: Preparation) -> tuple[ArrayDataset, ArrayDataset]:
    """The images to train on and the held-out ones of `data.root`; of several processes, the first alone downloads.

    Raises ConfigError where they are not there, DataError where they are damaged or cannot be fetched, OSError.
    """
    if data.root is None:
        raise ConfigError(f"{how.root_key} is null: where is {data.name}? Give {how.root_key}=<folder>")
    cifar, root = COLLECTIONS[data.name], Path(data.root)

    def fetch(progress: Progress) -> None:
        def tell(done: int, num_bytes: int) -> None:
            progress(f"fetching {cifar.title}, MB", done // _MEGABYTE, num_bytes // _MEGABYTE or None)

        if how.ranks is None or how.ranks.place.is_first:
            fetch_cifar(cifar, root, tell)

    if data.download and not how.looks_only:
        check_place(cifar, root, fetches=True, root_key=how.root_key)
        in_turn(how, fetch)
    return load_cifar(cifar, root, root_key=how.root_key)

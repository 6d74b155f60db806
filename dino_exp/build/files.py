"""Data sets that lie in files: listed, divided and prepared as the settings say."""

from __future__ import annotations

import os

import numpy as np

from dino_exp.build.preparation import Preparation, in_turn
from dino_exp.config.image_sections import FilesDataConfig
from dino_exp.data.files.dataset import FilesDataset
from dino_exp.data.files.layout import divide
from dino_exp.data.files.listing import Listing, Progress, current_listing, shown
from dino_exp.data.files.prepare import Prepared, known_unreadable, prepare
from dino_exp.errors import ConfigError, UsageError

_MOST_WORKERS = 32


def build_files(data: FilesDataConfig, how: Preparation) -> tuple[FilesDataset, FilesDataset]:
    """The images to train on and the held-out ones of `data.root`.

    Raises UsageError where it is gone, ConfigError for a layout that does not fit, DataError, OSError.
    """
    if data.root is None:
        raise ConfigError(f"{how.root_key} is null: where are the images? Give {how.root_key}=<folder>")
    listing, prepared = in_turn(how, lambda progress: _prepared(data, how, progress))
    parts = divide(listing, labels=data.labels, val_share=data.val_share, needs_both=data.name == "imagenet")
    bad = np.array(sorted(prepared.left_out), np.int64)
    left_out = tuple(shown(listing.path(int(number))) for number in bad)

    def part(split: str) -> FilesDataset:
        is_train = split == "train"
        ids = parts.train_N if is_train else parts.val_N
        labels = parts.train_labels_N if is_train else parts.val_labels_N
        good = ~np.isin(ids, bad)
        if not good.any():
            raise ConfigError(f"data.root={data.root}: none of the {len(ids)} images of {split} can be decoded")
        return FilesDataset(
            name=f"{data.name}/{split}",
            listing=listing,
            ids_N=ids[good],
            labels_N=labels[good],
            classes=parts.classes,
            decode_size=data.decode_size,
            left_out=left_out,
            canvases=prepared.canvases,
        )

    return part("train"), part("val")


def _prepared(data: FilesDataConfig, how: Preparation, progress: Progress) -> tuple[Listing, Prepared]:
    assert data.root is not None
    try:
        listing = current_listing(data.root, progress)
    except UsageError as gone:
        raise UsageError(f"{gone}. Where the images lie now: {how.root_key}=<folder>") from gone
    if how.looks_only:
        known = known_unreadable(listing, side=data.decode_size, folder=how.cache)
        return listing, Prepared(known if data.unreadable == "skip" else {})
    prepared = prepare(
        listing,
        side=data.decode_size,
        skip=data.unreadable == "skip",
        cache=data.cache,
        folder=how.cache,
        num_workers=max(how.workers, min(len(os.sched_getaffinity(0)), _MOST_WORKERS)),
        progress=progress,
    )
    return listing, prepared

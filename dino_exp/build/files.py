"""Data sets that lie in files: listed, divided and prepared as the settings say."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import numpy as np

from dino_exp.build.preparation import Preparation
from dino_exp.config.image_sections import FilesDataConfig
from dino_exp.data.files.dataset import FilesDataset
from dino_exp.data.files.layout import divide
from dino_exp.data.files.listing import Listing, Progress, current_listing, shown
from dino_exp.data.files.prepare import Prepared, known_unreadable, prepare
from dino_exp.errors import ConfigError, UsageError

if TYPE_CHECKING:
    from dino_exp.dist.ranks import Ranks

_MOST_WORKERS = 32
_STILL_SECS = 5.0  # after which the other ranks hear that the first one still works


def build_files(data: FilesDataConfig, how: Preparation) -> tuple[FilesDataset, FilesDataset]:
    """The images to train on and the held-out ones of `data.root`.

    Raises UsageError where it is gone, ConfigError for a layout that does not fit, DataError, OSError.
    """
    if data.root is None:
        raise ConfigError(f"{how.root_key} is null: where are the images? Give {how.root_key}=<folder>")
    listing, prepared = _prepared_in_turn(data, how)
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


def _prepared_in_turn(data: FilesDataConfig, how: Preparation) -> tuple[Listing, Prepared]:
    """Rank 0 first: after it the others find everything done, unless they are on a host with another disk."""
    ranks = how.ranks
    if ranks is None or ranks.place.size == 1:
        return _prepared(data, how, how.progress)
    if ranks.place.is_first:
        done = _prepared(data, how, _keeping_others_waiting(ranks, how.progress))
        ranks.from_first(False)
        return done
    while ranks.from_first(True):
        pass
    return _prepared(data, how, how.progress)


def _keeping_others_waiting(ranks: Ranks, progress: Progress) -> Progress:
    """Tell the other ranks now and then that there is more to do, or they would give rank 0 up for lost."""
    last = time.monotonic()

    def tell(word: str, done: int, total: int | None) -> None:
        nonlocal last
        progress(word, done, total)
        if time.monotonic() - last > _STILL_SECS:
            last = time.monotonic()
            ranks.from_first(True)

    return tell


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

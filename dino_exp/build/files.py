"""Data sets that lie in files: listed, divided and prepared as the settings say."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dino_exp.build.preparation import Preparation, in_turn
from dino_exp.config.image_sections import FilesDataConfig
from dino_exp.data.files.dataset import FilesDataset
from dino_exp.data.files.layout import Parts, divide
from dino_exp.data.files.listing import Listing, Progress, current_listing, name_of
from dino_exp.data.files.prepare import Prepared, prepare, prepared_so_far
from dino_exp.errors import ConfigError, RefusedError

_MOST_WORKERS = 32


def build_files(data: FilesDataConfig, how: Preparation) -> tuple[FilesDataset, FilesDataset]:
    """The images to train on and the held-out ones of `data.root`.

    Raises UsageError where it is gone, ConfigError for a layout that does not fit, RefusedError for other images than
    `how` allows, DataError, OSError.
    """
    if data.root is None:
        raise ConfigError(f"{how.root_key} is null: where are the images? Give {how.root_key}=<folder>")
    found = in_turn(how, lambda progress: _found(data, how, progress))
    listing, parts, prepared = found.listing, found.parts, found.prepared
    bad = found.used_N[sorted(prepared.left_out)]
    left_out = tuple(name_of(listing.path(int(number))) for number in bad)

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
            cached_N=None if len(found.used_N) == len(listing) else found.used_N,
        )

    return part("train"), part("val")


@dataclass(frozen=True, kw_only=True)
class _Found:
    """All images below the root, those that belong to a part, and what was prepared of these, numbered among them."""

    listing: Listing
    parts: Parts
    used_N: NDArray[np.int64]
    prepared: Prepared


def _found(data: FilesDataConfig, how: Preparation, progress: Progress) -> _Found:
    listing = _listing(data, how, progress)
    parts = divide(listing, labels=data.labels, val_share=data.val_share, needs_both=data.name == "imagenet")
    used_N = np.sort(np.concatenate([parts.train_N, parts.val_N]))
    # What lies beside train/ and val/ is left alone: whether it can be decoded is nobody's business.
    used, skip = listing.part(used_N), data.unreadable == "skip"
    if how.looks_only:
        prepared = prepared_so_far(used, side=data.decode_size, skip=skip, cache=data.cache, folder=how.cache)
    else:
        prepared = prepare(
            used,
            side=data.decode_size,
            skip=skip,
            cache=data.cache,
            folder=how.cache,
            num_workers=how.workers or min(len(os.sched_getaffinity(0)), _MOST_WORKERS),
            progress=progress,
        )
    return _Found(listing=listing, parts=parts, used_N=used_N, prepared=prepared)


def _listing(data: FilesDataConfig, how: Preparation, progress: Progress) -> Listing:
    assert data.root is not None
    listing = current_listing(data.root, progress, root_key=how.root_key)
    if how.is_new and data.digest not in (None, listing.digest):
        raise RefusedError(
            f"{data.root}: its images have the digest {listing.digest}, and the run would be named by {data.digest}: "
            "they have changed meanwhile. Type the command again when they change no more; a fork takes the images "
            f"that are there now with {how.root_key}={data.root}"
        )
    return listing

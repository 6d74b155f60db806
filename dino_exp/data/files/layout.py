"""Which images of a listing are trained on, which are held out, and which class each belongs to.

Shapes: N images of a part.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xxhash
from numpy.typing import NDArray

from dino_exp.data.files.listing import Listing, name_of, shown
from dino_exp.errors import ConfigError

TRAIN, VAL = b"train/", b"val/"
_SHOWN = 5  # names in a message


@dataclass(frozen=True, eq=False)
class Parts:
    """Numbers of images in the listing, in its order, and the class of each (-1 where there are no classes)."""

    train_N: NDArray[np.int64]
    val_N: NDArray[np.int64]
    train_labels_N: NDArray[np.int64]
    val_labels_N: NDArray[np.int64]
    classes: tuple[str, ...]


def divide(listing: Listing, *, labels: str, val_share: float, needs_both: bool) -> Parts:
    """Divide a listing as its folders say, or by a hash of each path where it has no `train/` and `val/`.

    `labels` is `auto`, `folders` or `none`; `needs_both` asks for `train/` and `val/` with the same class folders.
    Raises ConfigError for a layout that does not fit.
    """
    paths = [listing.path(number) for number in range(len(listing))]
    train, val = ([number for number, path in enumerate(paths) if path.startswith(part)] for part in (TRAIN, VAL))
    has_both = bool(train and val)
    if needs_both and not has_both:
        raise ConfigError(
            f"data.root={shown(listing.root)}: holds {len(train)} images below train/ and {len(val)} below val/; "
            "data=imagenet needs both, with a folder for each class in them. Other trees of images: data=folder"
        )
    if has_both:
        names = [_class_of(path, len(TRAIN)) for path in (paths[number] for number in train)]
        val_names = [_class_of(path, len(VAL)) for path in (paths[number] for number in val)]
    else:
        held_out = [is_held_out(path, val_share) for path in paths]
        train, val = ([number for number, held in enumerate(held_out) if held is part] for part in (False, True))
        _check_share(listing, len(train), len(val), val_share)
        names = [_class_of(paths[number], 0) for number in train]
        val_names = [_class_of(paths[number], 0) for number in val]
    if needs_both:
        _check_same_classes(listing, names, val_names)
    elif not _has_classes(listing, labels, [*zip(train, names, strict=True), *zip(val, val_names, strict=True)]):
        return Parts(_ids(train), _ids(val), np.full(len(train), -1, np.int64), np.full(len(val), -1, np.int64), ())
    classes = sorted({*names, *val_names})
    place = {name: number for number, name in enumerate(classes)}
    train_labels, val_labels = (_ids([place[name] for name in part]) for part in (names, val_names))
    return Parts(_ids(train), _ids(val), train_labels, val_labels, tuple(map(name_of, classes)))


def is_held_out(path: bytes, share: float) -> bool:
    """Whether an image is held out, by its path relative to the root alone: others that come or go move it nowhere."""
    return xxhash.xxh3_64_intdigest(path) < share * 2**64


def _ids(values: list[int]) -> NDArray[np.int64]:
    return np.array(values, np.int64)


def _class_of(path: bytes, start: int) -> bytes:
    """The folder that an image lies in, below what `start` bytes name; empty for one that lies in none."""
    folder, slash, _ = path[start:].partition(b"/")
    return folder if slash else b""


def _check_share(listing: Listing, num_train: int, num_val: int, val_share: float) -> None:
    if num_train and num_val:
        return
    raise ConfigError(
        f"data.root={shown(listing.root)}: of {len(listing)} images data.val_share={val_share:g} leaves {num_train} to "
        f"train on and holds {num_val} out, by a hash of their paths; choose another data.val_share, or make folders "
        "train/ and val/"
    )


def _has_classes(listing: Listing, labels: str, named: list[tuple[int, bytes]]) -> bool:
    if labels == "none":
        return False
    loose = [number for number, name in named if not name]
    num_classes = len({name for _, name in named})
    if not loose and num_classes >= 2:
        return True
    if labels == "auto":
        return False
    where = shown(listing.root)
    if loose:
        raise ConfigError(
            f"data.labels=folders: {len(loose)} images lie in no folder of a class, for example "
            f"{shown(listing.path(loose[0]))} below {where}; put each into one, or use data.labels=none"
        )
    raise ConfigError(
        f"data.labels=folders: all images below {where} lie in the one folder {shown(named[0][1])}; expected a folder "
        "for each of two classes or more, or data.labels=none"
    )


def _check_same_classes(listing: Listing, train: list[bytes], val: list[bytes]) -> None:
    one, other = set(train), set(val)
    where = f"data.root={shown(listing.root)}"
    if b"" in one | other:
        part = "train/" if b"" in one else "val/"
        raise ConfigError(
            f"{where}: images lie in {part} itself; data=imagenet needs a folder for each class there. (ImageNet's "
            "validation images come without them: sort them into folders of the names that train/ has)"
        )
    if one == other and len(one) >= 2:
        return
    if one == other:
        raise ConfigError(
            f"{where}: train/ and val/ have one class only; expected two or more. For others: data=folder"
        )
    differing = [f"{name} only in train/" for name in _some(one - other)]
    differing += [f"{name} only in val/" for name in _some(other - one)]
    raise ConfigError(
        f"{where}: train/ has {len(one)} classes and val/ has {len(other)}; they differ: {', '.join(differing)}; "
        "data=imagenet needs the same"
    )


def _some(names: set[bytes]) -> list[str]:
    return [shown(name) for name in sorted(names)[:_SHOWN]]

"""The images of a listing that cannot be decoded, found by reading all of them once, and remembered in a file."""

from __future__ import annotations

import json
import logging
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dino_exp.data.files.crew import answers
from dino_exp.data.files.decode import UnreadableImageError
from dino_exp.data.files.listing import Listing, Progress, name_of
from dino_exp.data.files.placing import ELSEWHERE, placed
from dino_exp.data.files.reading import read_pixels
from dino_exp.fsio import DamagedFileError, read_json_bounded

log = logging.getLogger("dino_exp")

FORMAT = 1
IMAGES_A_TASK = 16
_TASK_BYTES = 16 << 20  # of decoded pixels: each process holds those of a task, twice
_MAX_BYTES = 256 << 20


@dataclass(frozen=True)
class Try:
    """Decode images; the answer says why each that cannot be decoded cannot."""

    listing: Listing
    side: int

    def __call__(self, numbers: range) -> tuple[dict[int, str], bytes]:
        """The reasons by number. Raises DataError for a file that is not what was listed."""
        reasons = {}
        for number in numbers:
            try:
                read_pixels(self.listing, number, self.side)
            except UnreadableImageError as problem:
                reasons[number] = str(problem)
        return reasons, b""


def tasks_of(num_images: int, side: int) -> list[range]:
    """The ranges in which images are gone through that take at most `side` x `side` pixels each."""
    step = max(1, min(IMAGES_A_TASK, _TASK_BYTES // (3 * side * side)))
    return [range(start, min(start + step, num_images)) for start in range(0, num_images, step)]


def find_unreadable(
    listing: Listing, side: int, num_workers: int, progress: Progress, numbers: list[int] | None = None
) -> dict[int, str]:
    """Why each image that cannot be decoded cannot, by its number, of all or of some. Raises DataError."""
    reasons: dict[int, str] = {}
    tasks = tasks_of(len(listing), side) if numbers is None else [range(number, number + 1) for number in numbers]
    done, total = 0, len(listing) if numbers is None else len(numbers)
    with closing(answers(Try(listing, side), tasks, num_workers)) as results:
        for task, (found, _) in zip(tasks, results, strict=True):
            reasons |= found
            done += len(task)
            progress("checking images", done, total)
    return reasons


def save_unreadable(path: Path, listing: Listing, decoder: str, reasons: dict[int, str]) -> None:
    """Remember them, durably. Raises UnwrittenError."""
    found = [
        {"number": number, "path": name_of(listing.path(number)), "reason": reason}
        for number, reason in sorted(reasons.items())
    ]
    record = {"format_version": FORMAT, "listing": listing.digest, "decoder": decoder, "unreadable": found}
    with placed(path, ELSEWHERE) as file:
        file.write((json.dumps(record, indent=1) + "\n").encode())


def load_unreadable(path: Path, listing: Listing, decoder: str) -> dict[int, str] | None:
    """What was remembered of this listing and decoder; None where nothing was, or it is damaged, which is logged."""
    try:
        record = read_json_bounded(path, max_bytes=_MAX_BYTES)
    except FileNotFoundError:
        return None
    except DamagedFileError as damage:
        log.warning("%s; all images are checked again", damage)
        return None
    made = {"format_version": FORMAT, "listing": listing.digest, "decoder": decoder}
    if not isinstance(record, dict) or {name: record.get(name) for name in made} != made:
        return None
    reasons = _reasons(record.get("unreadable"), listing)
    if reasons is None:
        log.warning("%s: names other images than there are; all are checked again", path)
    return reasons


def _reasons(found: Any, listing: Listing) -> dict[int, str] | None:
    reasons: dict[int, str] = {}
    for entry in found if isinstance(found, list) else [None]:
        if not isinstance(entry, dict) or not isinstance(entry.get("reason"), str):
            return None
        number = entry.get("number")
        if type(number) is not int or not 0 <= number < len(listing):
            return None
        if entry.get("path") != name_of(listing.path(number)):
            return None
        reasons[number] = entry["reason"]
    return reasons

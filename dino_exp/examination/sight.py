"""What a run's model sees, as arrays to be drawn. In a process of its own, because torch takes longer to import than a
report to be drawn.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dino_exp.errors import DinoExpError, NoCheckpointError

if TYPE_CHECKING:
    from numpy.typing import NDArray

NUM_IMAGES = 6


@dataclass(frozen=True, kw_only=True)
class Sight:
    """Of the teacher at `step`: images (B, H, W, C) from 0 to 1, attention (B, heads, rows, cols), patch colours
    (B, rows, cols, 3), and the share of the variance that each of the three colours explains.
    """

    step: int
    at: str
    images: NDArray[Any]
    attention: NDArray[Any]
    colours: NDArray[Any]
    explained: tuple[float, ...]


class NoSightError(DinoExpError):
    """The model or its images could not be had; the report says why."""


def see(directory: Path, *, num_images: int = NUM_IMAGES, image_size: int | None = None) -> Sight:
    """Look at some held-out images with the best checkpoint of a run, or the latest where none is best.

    `image_size` in pixels, where it is to be another than in training.

    Raises NoCheckpointError, CorruptCheckpointError, and other errors of the user's or the disk's.
    """
    import torch

    from dino_exp.evaluation.attention import class_attention
    from dino_exp.evaluation.patches import patch_colours, patch_tokens
    from dino_exp.examination.kinds import choose_images
    from dino_exp.examination.subject import Subject, find_subject, recorded_settings
    from dino_exp.runs.named import named

    torch.set_num_threads(1)
    at = "best"
    try:
        named(f"{directory}@best", directory).reader.resolve("best")
    except NoCheckpointError:
        at = "latest"
    weights, paths = find_subject(f"{directory}@{at}", "teacher", directory)
    subject = Subject(
        weights=weights,
        facts={},
        paths=paths,
        part="teacher",
        recorded=recorded_settings(weights),
        device=torch.device("cpu"),
        progress=lambda *_: None,
    )
    held_out = subject.data.val
    seen, shown = subject.shown(choose_images(held_out, min(num_images, len(held_out))), image_size)
    colours = patch_colours(patch_tokens(subject.model, seen))
    return Sight(
        step=weights.manifest.step,
        at=at,
        images=shown.numpy(),
        attention=class_attention(subject.model, seen).numpy(),
        colours=colours.colours.numpy(),
        explained=tuple(colours.explained.tolist()),
    )


@contextmanager
def looking(directory: Path) -> Iterator[Callable[[], Sight]]:
    """Begin to look, beside whatever is done inside; what is yielded waits for it.

    It raises NoSightError. To be used by programs whose main module may be imported (see `multiprocessing`).
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        begun = pool.submit(_see_or_say_why, directory)

        def wait() -> Sight:
            try:
                found = begun.result()
            except BrokenProcessPool as problem:
                raise NoSightError("the process that loads the model was killed (for want of memory?)") from problem
            if isinstance(found, str):
                raise NoSightError(found)
            return found

        yield wait


def _see_or_say_why(directory: Path) -> Sight | str:
    """The errors of this package do not all survive the way between processes; their words do."""
    try:
        return see(directory)
    except (DinoExpError, OSError) as problem:
        return str(problem)

"""Features of a frozen model, taken without leaving a trace in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Interrupted(Exception):  # noqa: N818 - not an error: somebody asked to stop
    """Evaluation was asked to stop before it was done; it can be repeated later with the same result."""


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients inside; afterwards every part is in the mode it was in before.

    Buffers stay as they are: in evaluation mode batch norm reads its statistics and does not write them.
    """
    modes = [(part, part.training) for part in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for part, training in modes:
            part.training = training


def extract_features(
    model: nn.Module,
    forward: Callable[[Tensor], Tensor],
    batches: Iterable[Tensor],
    *,
    should_stop: Callable[[], bool] = lambda: False,
) -> Tensor:
    """What `forward`, of the model, makes of each batch of images, one after the other: (N, D) on its device.

    Raises Interrupted as soon as `should_stop` holds, which is asked before each batch.
    """
    features = []
    with frozen(model):
        for images in batches:
            if should_stop():
                raise Interrupted("asked to stop while features were extracted")
            features.append(forward(images))
    return torch.cat(features)

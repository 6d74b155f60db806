"""The official code (facebookresearch/dino), loaded from a checkout to be measured beside ours.

It imports torchvision, of which it uses the transforms of PIL images alone, and of those a few. Stand-ins for them
live here, written after torchvision's documented behaviour with the same calls of PIL, numpy and torch, so that they
cost what torchvision costs: a benchmark must not need a package that this project does without.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch import Tensor

Pil = Image.Image
_TRIES = 10


@dataclass(frozen=True)
class Official:
    """The modules of a checkout: `main_dino` has the augmentation and the loss, `utils` all that surrounds a step."""

    vision_transformer: ModuleType
    utils: ModuleType
    main_dino: ModuleType


def official_modules(checkout: Path) -> Official:
    """The official modules out of the directory of `main_dino.py`. `sys.modules` is left as it was.

    Raises FileNotFoundError where it is no such directory.
    """
    for name in ("utils", "vision_transformer", "main_dino"):
        if not (checkout / f"{name}.py").is_file():
            raise FileNotFoundError(
                f"{checkout}: no {name}.py; expected a checkout of facebookresearch/dino: "
                "git clone https://github.com/facebookresearch/dino"
            )
    with _in_sys_modules(_stand_ins()):
        utils, vision_transformer, main_dino = (
            _load(checkout, name) for name in ("utils", "vision_transformer", "main_dino")
        )
    return Official(vision_transformer, utils, main_dino)


def _load(checkout: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, checkout / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # the next one imports it by this name
    spec.loader.exec_module(module)
    return module


@contextmanager
def _in_sys_modules(modules: dict[str, ModuleType]) -> Iterator[None]:
    before = dict(sys.modules)
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in (*modules, "utils", "vision_transformer", "main_dino"):
            if name in before:
                sys.modules[name] = before[name]
            else:
                sys.modules.pop(name, None)


def _stand_ins() -> dict[str, ModuleType]:
    package, parts = ModuleType("torchvision"), ("transforms", "datasets", "models")
    modules = {part: ModuleType(f"torchvision.{part}") for part in parts}
    for part, module in modules.items():
        setattr(package, part, module)
    for transform in (
        Compose, RandomApply, RandomHorizontalFlip, RandomGrayscale, RandomResizedCrop, ColorJitter, ToTensor,
        Normalize,
    ):  # fmt: skip
        setattr(modules["transforms"], transform.__name__, transform)
    return {"torchvision": package, **{module.__name__: module for module in modules.values()}}


class Compose:
    """One transform after the other."""

    def __init__(self, transforms: Sequence[Callable[[Any], Any]]) -> None:
        self.transforms = transforms

    def __call__(self, image: Any) -> Any:
        for transform in self.transforms:
            image = transform(image)
        return image


class RandomApply:
    """All of the transforms, or none."""

    def __init__(self, transforms: Sequence[Callable[[Pil], Pil]], p: float) -> None:
        self.transforms, self.p = transforms, p

    def __call__(self, image: Pil) -> Pil:
        if self.p < torch.rand(1):
            return image
        for transform in self.transforms:
            image = transform(image)
        return image


class RandomHorizontalFlip:
    """Mirror from left to right."""

    def __init__(self, p: float) -> None:
        self.p = p

    def __call__(self, image: Pil) -> Pil:
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if torch.rand(1) < self.p else image


class RandomGrayscale:
    """Grey, in three equal channels."""

    def __init__(self, p: float) -> None:
        self.p = p

    def __call__(self, image: Pil) -> Pil:
        if not torch.rand(1) < self.p:
            return image
        plane = np.array(image.convert("L"), dtype=np.uint8)
        return Image.fromarray(np.dstack([plane, plane, plane]))


class RandomResizedCrop:
    """A random box, resized."""

    def __init__(self, size: int, scale: tuple[float, float], interpolation: Image.Resampling) -> None:
        self.size, self.scale, self.interpolation = (size, size), scale, interpolation
        self.ratio = (3 / 4, 4 / 3)

    def __call__(self, image: Pil) -> Pil:
        top, left, height, width = self._box(*image.size)
        return image.crop((left, top, left + width, top + height)).resize(self.size, self.interpolation)

    def _box(self, image_width: int, image_height: int) -> tuple[int, int, int, int]:
        log_ratio = torch.log(torch.tensor(self.ratio))
        for _ in range(_TRIES):
            area = image_height * image_width * torch.empty(1).uniform_(self.scale[0], self.scale[1]).item()
            ratio = torch.exp(torch.empty(1).uniform_(float(log_ratio[0]), float(log_ratio[1]))).item()
            width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < width <= image_width and 0 < height <= image_height:
                top = int(torch.randint(0, image_height - height + 1, size=(1,)).item())
                left = int(torch.randint(0, image_width - width + 1, size=(1,)).item())
                return top, left, height, width
        width, height = image_width, image_height
        if image_width / image_height < self.ratio[0]:
            height = round(width / self.ratio[0])
        elif image_width / image_height > self.ratio[1]:
            width = round(height * self.ratio[1])
        return (image_height - height) // 2, (image_width - width) // 2, height, width


class ColorJitter:
    """Brightness, contrast, saturation and hue by random factors, in a random order."""

    def __init__(self, brightness: float, contrast: float, saturation: float, hue: float) -> None:
        self.ranges = [(max(0.0, 1 - value), 1 + value) for value in (brightness, contrast, saturation)] + [(-hue, hue)]

    def __call__(self, image: Pil) -> Pil:
        order = torch.randperm(4)
        factors = [float(torch.empty(1).uniform_(low, high)) for low, high in self.ranges]
        for kind in order:
            image = _ADJUST[int(kind)](image, factors[int(kind)])
        return image


def _turned(image: Pil, turns: float) -> Pil:
    hue, saturation, value = image.convert("HSV").split()
    plane = np.array(hue, dtype=np.uint8)
    plane += np.int32(turns * 255).astype(np.uint8)
    return Image.merge("HSV", (Image.fromarray(plane), saturation, value)).convert("RGB")


_ADJUST: tuple[Callable[[Pil, float], Pil], ...] = (
    lambda image, factor: ImageEnhance.Brightness(image).enhance(factor),
    lambda image, factor: ImageEnhance.Contrast(image).enhance(factor),
    lambda image, factor: ImageEnhance.Color(image).enhance(factor),
    _turned,
)


class ToTensor:
    """(3, H, W) float32 from 0 to 1."""

    def __call__(self, image: Pil) -> Tensor:
        pixels = torch.from_numpy(np.array(image, np.uint8, copy=True)).view(image.size[1], image.size[0], 3)
        return pixels.permute(2, 0, 1).contiguous().to(torch.float32).div(255)


class Normalize:
    """Minus a mean, over a standard deviation, of each channel."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean, self.std = mean, std

    def __call__(self, pixels: Tensor) -> Tensor:
        mean, std = (torch.as_tensor(values, dtype=pixels.dtype).view(-1, 1, 1) for values in (self.mean, self.std))
        return pixels.clone().sub_(mean).div_(std)

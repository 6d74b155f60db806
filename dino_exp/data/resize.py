"""Boxes of images, resized as PIL does it: bicubic, antialiased, and bytes as the result.

Shapes: B images of a batch, V views, C channels, H x W pixels, I input and O output pixels along one side.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from dino_exp.data import threads
from dino_exp.data.crops import Boxes, Ints
from dino_exp.data.images import Images, to_device

_BICUBIC = -0.5  # the coefficient of PIL, and of Catmull and Rom


def resize_matrix(start: Ints, extent: Ints, in_size: int, out_size: int, device: torch.device) -> Tensor:
    """(B, O, I) float32: the matrices that resize the pixels [start, start + extent) to `out_size`.

    Bicubic with antialiasing, weights normalised inside the interval: PIL's `crop`, then `resize` (BICUBIC).
    """
    start_B11 = to_device(torch.from_numpy(start), device)[:, None, None].float()
    extent_B11 = to_device(torch.from_numpy(extent), device)[:, None, None].float()
    scale_B11 = extent_B11 / out_size
    out_1O1 = torch.arange(out_size, device=device, dtype=torch.float32)[None, :, None]
    in_B1I = torch.arange(in_size, device=device, dtype=torch.float32)[None, None, :] - start_B11
    # PIL widens the kernel when it shrinks a picture, and keeps it when it enlarges one.
    distance_BOI = (in_B1I + 0.5 - (out_1O1 + 0.5) * scale_B11) / scale_B11.clamp(min=1.0)
    inside_B1I = (in_B1I >= 0) & (in_B1I < extent_B11)
    weights_BOI = _bicubic(distance_BOI.abs()).masked_fill(~inside_B1I, 0.0)
    return weights_BOI / sum_last(weights_BOI)


def _bicubic(x: Tensor) -> Tensor:
    """The cubic convolution kernel at distances x >= 0 (Keys 1981)."""
    a = _BICUBIC
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


def sum_last(values: Tensor) -> Tensor:
    """Sum over the last axis, kept, in float64 and rounded once.

    A float32 sum may be ordered differently for another batch size.
    """
    return values.double().sum(-1, keepdim=True).to(values.dtype)


def crop_and_resize(images: Images, *wanted: tuple[Boxes, int]) -> list[Tensor]:
    """(V, B, C, size, size) bytes for V boxes of each image and a size, as often as they are given.

    As PIL does it: width first, bytes after each pass. On a processor by torch's whole-number arithmetic, which is
    PIL's but for a few bits of the weights; elsewhere by products of matrices. Some bytes, near a half, differ by 1.
    """
    if not threads.by_parts(images.device):
        return [
            torch.stack(
                [resize_by_products(images.pixels_BCHW, boxes.at(view), size) for view in range(len(boxes.top))]
            )
            for boxes, size in wanted
        ]
    channels = images.pixels_BCHW.shape[1]
    found = [torch.empty(*boxes.top.shape, channels, size, size, dtype=torch.uint8) for boxes, size in wanted]

    def cut(index: int) -> None:
        pixels_HWC = _pixelwise(images, index)
        for (boxes, size), crops in zip(wanted, found, strict=True):
            for view in range(len(boxes.top)):
                top, left = boxes.top[view, index], boxes.left[view, index]
                part = pixels_HWC[top : top + boxes.height[view, index], left : left + boxes.width[view, index]]
                crops[view, index] = functional.interpolate(
                    part.permute(2, 0, 1)[None], (size, size), mode="bicubic", antialias=True
                )[0]

    threads.over_threads(cut, range(len(images)))
    return found


def _pixelwise(images: Images, index: int) -> Tensor:
    """(H, W, C): an image with the channels of a pixel side by side, as resizing needs it; once for all its crops."""
    height, width = images.sizes_B2[index]
    image_CHW = images.pixels_BCHW[index, :, :height, :width]
    return image_CHW.permute(1, 2, 0) if image_CHW.stride(0) == 1 else torch.stack(image_CHW.unbind(), dim=-1)


def resize_by_products(images_BCHW: Tensor, boxes_B: Boxes, size: int) -> Tensor:
    """(B, C, size, size) bytes: a box of each image, by two products with matrices of weights."""
    height, width = images_BCHW.shape[-2:]
    across_BOI = resize_matrix(boxes_B.left, boxes_B.width, width, size, images_BCHW.device)
    down_BOI = resize_matrix(boxes_B.top, boxes_B.height, height, size, images_BCHW.device)
    # Width comes first, as in the versions of PIL that the paper used; since Pillow 13 it is the cheaper pass.
    rows_BCHO = _to_bytes(images_BCHW.float() @ across_BOI.transpose(1, 2)[:, None])
    return _to_bytes(down_BOI[:, None] @ rows_BCHO).to(torch.uint8)


def _to_bytes(values: Tensor) -> Tensor:
    return values.round_().clamp_(0, 255)

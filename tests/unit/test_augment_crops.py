"""Boxes and resizing, against torchvision's rules and PIL's pixels."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dino_exp.data.crops import BOX_DRAWS, Boxes, centre_squares, products_of_float32, random_boxes, to_unit
from dino_exp.data.images import Images
from dino_exp.data.resize import crop_and_resize, resize_by_products
from dino_exp.errors import ConfigError
from dino_exp.rng import Stream

RATIO = (3 / 4, 4 / 3)


def sizes(num: int, height: int, width: int) -> np.ndarray:
    return np.tile(np.array([height, width]), (num, 1))


def boxes_of(num: int, *, height: int, width: int, area: tuple[float, float]) -> Boxes:
    draws = Stream(0, "test.boxes").uniform(np.arange(num), num=BOX_DRAWS)
    return random_boxes(draws, sizes(num, height, width), area=area, ratio=RATIO)


@pytest.mark.parametrize("area", [(0.4, 1.0), (0.05, 0.4), (0.14, 0.14)])
def test_boxes_lie_inside_and_keep_area_and_ratio(area: tuple[float, float]) -> None:
    boxes = boxes_of(4000, height=256, width=256, area=area)
    share = boxes.height * boxes.width / 256**2
    ratio = boxes.width / boxes.height
    assert boxes.top.min() >= 0
    assert boxes.left.min() >= 0
    assert (boxes.top + boxes.height).max() <= 256
    assert (boxes.left + boxes.width).max() <= 256
    assert area[0] - 0.01 < share.min()
    assert share.max() < area[1] + 0.01
    assert RATIO[0] - 0.02 < ratio.min() < 0.77
    assert 1.30 < ratio.max() < RATIO[1] + 0.02


def test_areas_are_uniform_and_ratios_uniform_in_their_logarithm() -> None:
    boxes = boxes_of(20_000, height=512, width=512, area=(0.05, 0.4))
    share = boxes.height * boxes.width / 512**2
    assert np.allclose(np.quantile(share, [0.25, 0.5, 0.75]), [0.1375, 0.225, 0.3125], atol=0.005)
    assert abs(np.median(np.log(boxes.width / boxes.height))) < 0.01


def test_positions_reach_every_edge() -> None:
    boxes = boxes_of(4000, height=32, width=32, area=(0.4, 1.0))
    assert boxes.top.min() == 0
    assert boxes.left.min() == 0
    assert (boxes.top + boxes.height).max() == 32
    assert (boxes.left + boxes.width).max() == 32


def test_an_image_that_no_box_fits_gives_its_central_part() -> None:
    boxes = boxes_of(50, height=100, width=10, area=(0.9, 1.0))
    assert set(zip(boxes.top, boxes.left, boxes.height, boxes.width, strict=True)) == {(43, 0, 13, 10)}
    boxes = boxes_of(50, height=10, width=100, area=(0.9, 1.0))
    assert set(zip(boxes.top, boxes.left, boxes.height, boxes.width, strict=True)) == {(0, 43, 10, 13)}


def pictures(num: int, height: int, width: int) -> np.ndarray:
    """Smooth patterns with hard edges in them, where resizing overshoots."""
    noise = Stream(0, "test.pictures").uniform(np.arange(num), num=3 * height * width)
    y, x = np.mgrid[:height, :width]
    smooth = 127 + 100 * np.sin(x / 7) * np.cos(y / 11)
    pixels = np.where(noise.reshape(num, 3, height, width) < 0.2, 255 * ((x + y) // 16 % 2), smooth)
    return pixels.astype(np.uint8)


def as_on_cpu(images: Images, boxes: Boxes, size: int) -> Tensor:
    return crop_and_resize(images, (boxes.views(1), size))[0][0]


def as_on_cuda(images: Images, boxes: Boxes, size: int) -> Tensor:
    return resize_by_products(images.pixels_BCHW, boxes, size)


@pytest.mark.parametrize("resized", [as_on_cpu, as_on_cuda])
@pytest.mark.parametrize(("side", "size"), [(64, 96), (200, 96), (256, 224), (32, 16)])
def test_crops_are_those_of_pil(side: int, size: int, resized: Callable[[Images, Boxes, int], Tensor]) -> None:
    images = pictures(12, side, side + 10)
    boxes = boxes_of(12, height=side, width=side + 10, area=(0.05, 1.0))
    ours = resized(Images.whole(torch.from_numpy(images)), boxes, size)
    assert ours.dtype == torch.uint8
    for image, top, left, height, width, crop in zip(
        images, boxes.top, boxes.left, boxes.height, boxes.width, ours, strict=True
    ):
        picture = Image.fromarray(image.transpose(1, 2, 0))
        part = picture.crop((int(left), int(top), int(left + width), int(top + height)))
        # In two calls, because Pillow 13 takes the cheaper order of the two passes; before, width came first.
        narrow = part.resize((size, part.height), Image.Resampling.BICUBIC)
        theirs = np.asarray(narrow.resize((size, size), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
        difference = np.abs(crop.numpy().astype(int) - theirs)
        # The weights have 16 bits: now and then a half is rounded the other way, in either pass.
        assert (difference > 0).mean() < 0.03
        assert (difference > 1).mean() < 1e-4
        assert difference.max() <= 2


def test_each_view_of_each_image_gets_its_own_box() -> None:
    images = Images.whole(torch.from_numpy(pictures(3, 40, 50)))
    draws = Stream(0, "test.views").uniform(np.arange(2)[:, None], np.arange(3)[None], num=BOX_DRAWS)
    boxes = random_boxes(draws, images.sizes_B2, area=(0.1, 1.0), ratio=RATIO)
    (crops,) = crop_and_resize(images, (boxes, 16))
    assert crops.shape == (2, 3, 3, 16, 16)
    for view in range(2):
        for place in range(3):
            alone = random_boxes(draws[view, place : place + 1], images.sizes_B2[:1], area=(0.1, 1.0), ratio=RATIO)
            assert torch.equal(crops[view, place], as_on_cpu(images.at(slice(place, place + 1)), alone, 16)[0])


@pytest.mark.parametrize("resized", [as_on_cpu, as_on_cuda])
def test_nothing_beside_the_image_on_its_canvas_is_seen(resized: Callable[[Images, Boxes, int], Tensor]) -> None:
    """Its true part is white, and the canvas around it black."""
    sizes_B2 = np.array([[20, 31], [31, 20], [40, 40], [1, 7]])
    pixels = torch.zeros(4, 3, 40, 40, dtype=torch.uint8)
    for canvas, (height, width) in zip(pixels, sizes_B2, strict=True):
        canvas[:, :height, :width] = 255
    images = Images(pixels, sizes_B2)
    draws = Stream(0, "test.canvas").uniform(np.arange(4), num=BOX_DRAWS)
    for boxes in (random_boxes(draws, sizes_B2, area=(0.4, 1.0), ratio=RATIO), centre_squares(sizes_B2)):
        assert int(resized(images, boxes, 24).min()) == 255


@pytest.mark.parametrize("resized", [as_on_cpu, as_on_cuda])
def test_a_resize_to_the_same_size_changes_nothing(resized: Callable[[Images, Boxes, int], Tensor]) -> None:
    images = Images.whole(torch.from_numpy(pictures(2, 32, 32)))
    assert torch.equal(resized(images, centre_squares(images.sizes_B2), 32), images.pixels_BCHW)


def test_planes_and_pixels_in_either_order_give_the_same() -> None:
    images = Images.whole(torch.from_numpy(pictures(2, 32, 40)))
    pixelwise = Images.whole(images.pixels_BCHW.contiguous(memory_format=torch.channels_last))
    boxes = boxes_of(2, height=32, width=40, area=(0.2, 1.0))
    assert torch.equal(as_on_cpu(images, boxes, 16), as_on_cpu(pixelwise, boxes, 16))


def test_the_central_square_is_central() -> None:
    pixels = torch.zeros(2, 3, 10, 30, dtype=torch.uint8)
    pixels[:, :, :, 10:20] = 1
    assert as_on_cpu(Images.whole(pixels), centre_squares(sizes(2, 10, 30)), 10).min() == 1


def test_pixels_that_are_no_bytes_are_refused() -> None:
    with pytest.raises(TypeError, match=r"uint8, found torch\.float32"):
        to_unit(torch.zeros(1, 3, 4, 4))


def test_errors_name_the_setting() -> None:
    from dino_exp.data.crops import check_areas, check_probabilities, check_ranges

    with pytest.raises(ConfigError, match=r"augment\.ratio is \[2, 1\]"):
        check_ranges(ratio=(2, 1))
    with pytest.raises(ConfigError, match=r"augment\.local_area ends at 1\.5"):
        check_areas(global_area=(0.5, 1), local_area=(0.5, 1.5))
    with pytest.raises(ConfigError, match=r"augment\.blur_probability is -0\.1"):
        check_probabilities(blur_probability=-0.1)


def test_tf32_is_for_the_model_and_not_for_pixels() -> None:
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    try:
        with products_of_float32(torch.device("cuda")):
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "tf32"
        with products_of_float32(torch.device("cpu")):
            assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before

"""Pictures of attention and of patch colours: what is in them, and the same bytes twice."""

from typing import Any

import numpy as np
import pytest

from dino_exp.analysis.figures.attention import draw_attention, draw_patch_colours
from dino_exp.analysis.style import HEAT, Picture

IMAGES = np.linspace(0, 1, 3 * 16 * 16).reshape(3, 16, 16, 1)
MAPS = np.linspace(0, 0.1, 3 * 2 * 4 * 4).reshape(3, 2, 4, 4)


def cells(picture: Picture) -> dict[tuple[int, int], Any]:
    """The images of a picture by line and column."""
    (axes,) = picture.figure.axes
    return {(int(image.get_extent()[3]), int(image.get_extent()[0])): image for image in axes.images}


def test_a_line_an_image_and_a_column_a_head():
    picture = draw_attention(IMAGES, MAPS)
    found = cells(picture)
    assert len(found) == 3 * 4
    assert [text.get_text() for text in picture.figure.axes[0].texts] == ["image", "mean", "head 1", "head 2"]
    assert np.allclose(found[1, 0].get_array(), IMAGES[1, ..., 0])
    assert np.allclose(found[1, 1].get_array(), MAPS[1].mean(axis=0))
    assert np.allclose(found[1, 3].get_array(), MAPS[1, 1])
    assert found[1, 3].get_clim() == (0, MAPS[1, 1].max())
    assert {one.get_interpolation() for one in found.values()} == {"nearest"}
    assert found[1, 3].get_cmap().name == HEAT
    assert "2 heads" in picture.alt


def test_each_image_above_its_colours():
    colours = np.random.default_rng(0).random((10, 4, 4, 3))
    images = np.random.default_rng(1).random((10, 8, 8, 3))
    found = cells(draw_patch_colours(images, colours))
    assert np.allclose(found[0, 7].get_array(), images[7])
    assert np.allclose(found[1, 7].get_array(), colours[7])
    assert np.allclose(found[3, 1].get_array(), colours[9])
    assert (3, 2) not in found


def test_the_same_picture_gives_the_same_bytes():
    pictures = [draw_attention(IMAGES, MAPS) for _ in range(2)]
    assert pictures[0].svg() == pictures[1].svg()
    assert pictures[0].png() == pictures[1].png()
    assert "head 1" in pictures[0].svg_for_page()


def test_blank_attention_and_wrong_numbers():
    assert draw_attention(IMAGES, np.zeros((3, 2, 4, 4))).png()
    with pytest.raises(ValueError, match="3 images and attention of shape"):
        draw_attention(IMAGES, MAPS[:2])
    with pytest.raises(ValueError, match="0 images"):
        draw_patch_colours(IMAGES[:0], np.zeros((0, 4, 4, 3)))

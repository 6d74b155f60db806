"""The contact sheet of crops: what is in it, and the same bytes twice."""

from typing import Any

import numpy as np
import pytest

from dino_exp.analysis.figures.crops import draw_crops
from dino_exp.analysis.style import Picture

NAMES = ["index 7\nlabel 1", "index 9\nlabel 0"]
GREY = np.linspace(0, 1, 2 * 16 * 16).reshape(2, 16, 16, 1)
COLOUR = np.random.default_rng(0).random((2, 8, 8, 3))


def cells(picture: Picture) -> dict[tuple[int, int], Any]:
    """The images of a picture by line and column."""
    (axes,) = picture.figure.axes
    return {(int(image.get_extent()[3]), int(image.get_extent()[0])): image for image in axes.images}


def test_a_line_an_image_and_a_column_a_view() -> None:
    picture = draw_crops(NAMES, [("clean", GREY), ("global 1", GREY[::-1]), ("local 1", COLOUR)])
    found = cells(picture)
    assert len(found) == 2 * 3
    assert np.allclose(found[1, 0].get_array(), GREY[1, ..., 0])
    assert np.allclose(found[1, 1].get_array(), GREY[0, ..., 0])
    assert np.allclose(found[0, 2].get_array(), COLOUR[0])
    assert found[1, 0].get_clim() == (0, 1)
    assert found[1, 0].get_cmap().name == "gray"
    written = {text.get_text() for text in picture.figure.axes[0].texts}
    assert written == {*NAMES, "clean\n16×16", "global 1\n16×16", "local 1\n8×8"}
    assert "2 images, each beside its 2 crops" in picture.alt


def test_nothing_is_cut_off_and_names_stay_clear_of_each_other() -> None:
    """With as many columns as the longest recipe has, and long numbers."""
    views = [("clean", GREY), *((f"global {n}", GREY) for n in (1, 2)), *((f"local {n}", GREY) for n in range(1, 11))]
    figure = draw_crops(["index 1281166\nlabel 999"] * 2, views).figure
    figure.draw_without_rendering()
    whole = figure.bbox
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert all(whole.x0 <= box.x0 and box.x1 <= whole.x1 and whole.y0 <= box.y0 and box.y1 <= whole.y1 for box in boxes)
    for place, one in enumerate(boxes):
        assert not any(one.overlaps(other) for other in boxes[place + 1 :])


def test_the_same_picture_gives_the_same_bytes_in_light_and_dark() -> None:
    pictures = [draw_crops(NAMES, [("clean", GREY), ("local 1", COLOUR)]) for _ in range(2)]
    assert pictures[0].svg() == pictures[1].svg()
    assert pictures[0].png() == pictures[1].png()
    assert pictures[0].svg(dark=True) != pictures[0].svg()


def test_wrong_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="2 images and 1 of local 1"):
        draw_crops(NAMES, [("clean", GREY), ("local 1", COLOUR[:1])])
    with pytest.raises(ValueError, match="0 images"):
        draw_crops([], [("clean", GREY[:0])])

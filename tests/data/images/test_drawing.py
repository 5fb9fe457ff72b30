"""Boxes and maps drawn onto images."""

import numpy as np
import pytest

from capvl.data.images import drawing

GREY = np.full((60, 90, 3), 100, np.uint8)


def test_a_box_is_drawn_where_it_is():
    drawn = drawing.draw_boxes(GREY, [(0.2, 0.25, 0.6, 0.75)], colors=[(255, 0, 0)])
    red = (drawn == [255, 0, 0]).all(axis=-1)
    rows, columns = np.nonzero(red)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (15, 44, 18, 53)
    assert not red[20:40, 25:50].any()  # Its inside stays.
    assert (GREY == 100).all() and drawn.dtype == np.uint8 and drawn.shape == GREY.shape


def test_names_are_inside_the_image_and_apart():
    boxes = [(0.0, 0.0, 0.5, 0.5), (0.01, 0.01, 0.5, 0.5), (0.9, 0.9, 1.0, 1.0)]
    colors = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    plain = drawing.draw_boxes(GREY, boxes, colors=colors)
    named = drawing.draw_boxes(GREY, boxes, ["one", "two", "a very long name that can't fit at all"], colors)
    for color in colors:
        grown = (named == color).all(axis=-1).sum() - (plain == color).all(axis=-1).sum()
        assert grown > 20, color


def test_edges_and_what_lies_beyond():
    whole = drawing.draw_boxes(GREY, [(-1, -1, 2, 2), (1, 1, 1, 1)], ["שלום 犬\n!", ""], [(255, 0, 0), (0, 255, 0)])
    assert (whole[0, -1] == [255, 0, 0]).all()
    assert (drawing.draw_boxes(GREY, np.zeros((0, 4))) == GREY).all()
    with pytest.raises(ValueError, match="1 boxes with 2 labels"):
        drawing.draw_boxes(GREY, [(0, 0, 1, 1)], ["a", "b"])


def test_a_map_is_hot_where_it_is_high():
    values = np.zeros((6, 9))
    values[1, 7] = 3.0
    heated = drawing.heat_map(GREY, values).astype(int)
    change = np.abs(heated - 100).sum(axis=-1)
    y, x = np.unravel_index(change.argmax(), change.shape)
    assert abs(y - 15) <= 2 and abs(x - 75) <= 2 and change[40:, :50].max() == 0
    assert (drawing.heat_map(GREY, np.ones((3, 3))) == GREY).all()
    for bad in (np.full((2, 2), np.nan), np.zeros(3), np.zeros((0, 3))):
        with pytest.raises(ValueError, match="matrix of finite numbers"):
            drawing.heat_map(GREY, bad)


def test_a_sheet_has_all_pictures():
    pictures = [np.full((10 + i, 20, 3), 10 * i, np.uint8) for i in range(5)]
    page = drawing.sheet(pictures, columns=2)
    for i, picture in enumerate(pictures):
        assert ((page == 10 * i).all(axis=-1)).sum() == picture.shape[0] * 20

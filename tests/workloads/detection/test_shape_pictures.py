"""Generated pictures: what they show, and the data set that they are written as."""

import pytest
import torch

from qdq.errors import ArgumentError
from qdq.workloads.detection.shapes import SHAPE_NAMES, ShapePictures, draw_picture, write_shapes
from qdq.workloads.detection.yolo_data import read_yolo_data

SIZE = 96


def test_a_picture_depends_on_seed_and_index_alone():
    first, again = (ShapePictures(3, SIZE, seed=5)[2] for _ in range(2))
    assert torch.equal(first.image, again.image)
    assert torch.equal(first.target.boxes, again.target.boxes)
    assert not torch.equal(first.image, draw_picture(SIZE, 6, 2).image)
    assert not torch.equal(first.image, draw_picture(SIZE, 5, 1).image)


def colour_at(image, x, y):
    """The mean of 3 x 3 pixels."""
    column, row = int(x), int(y)
    return image[:, row - 1 : row + 2, column - 1 : column + 2].float().mean(dim=(1, 2))


def is_filled(image, box, x, y):
    """Whether the point of a box, from 0 to 1, has the colour of its centre."""
    left, top, right, bottom = box
    there = colour_at(image, left + x * (right - left), top + y * (bottom - top))
    centre = colour_at(image, (left + right) / 2, (top + bottom) / 2)
    return bool((there - centre).abs().max() < 30)


# Points near the corners above and below, and near the middle of the left side, and whether the shape covers them.
POINTS = {
    "circle": {(0.12, 0.12): False, (0.12, 0.88): False, (0.12, 0.5): True},
    "square": {(0.12, 0.12): True, (0.12, 0.88): True, (0.12, 0.5): True},
    "triangle": {(0.12, 0.12): False, (0.12, 0.92): True, (0.12, 0.5): False},
}


def test_each_shape_fills_its_box():
    seen = set()
    for index in range(12):
        picture = draw_picture(256, 0, index)
        assert 1 <= len(picture.target.labels) <= 4
        assert bool((picture.target.boxes >= 0).all() and (picture.target.boxes <= 256).all())
        for box, label in zip(
            picture.target.boxes.tolist(), picture.target.labels.tolist(), strict=True
        ):
            seen.add(label)
            points = POINTS[SHAPE_NAMES[label]]
            assert {point: is_filled(picture.image, box, *point) for point in points} == points
    assert seen == {0, 1, 2}


def test_a_written_data_set_is_read_back(tmp_path):
    data = read_yolo_data(write_shapes(tmp_path / "shapes", train=2, val=3, size=SIZE, seed=4))
    assert data.names == SHAPE_NAMES
    assert (len(data.train), len(data.val)) == (2, 3)
    for index, seed in ((0, 8), (1, 8)):
        drawn, read = draw_picture(SIZE, seed, index), data.train[index]
        assert torch.equal(drawn.image, read.image)
        assert torch.equal(drawn.target.labels, read.target.labels)
        torch.testing.assert_close(drawn.target.boxes, read.target.boxes, atol=1e-3, rtol=0)
    assert torch.equal(data.val[2].image, draw_picture(SIZE, 9, 2).image)


def test_a_folder_with_contents_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ArgumentError, match="not an empty folder"):
        write_shapes(tmp_path, 1, 1, SIZE)


@pytest.mark.parametrize("arguments", [(0, SIZE), (1, 16)])
def test_impossible_pictures_are_refused(arguments):
    with pytest.raises(ArgumentError, match="pictures"):
        ShapePictures(*arguments)

"""Pictures as squares, against sizes computed by hand."""

import pytest
import torch

from qdq.errors import ArgumentError
from qdq.workloads.detection.pictures import Picture, PictureBatches, Target, letterbox


class Painted(list):
    description = "painted pictures"


def paint(height, width, box):
    """A black picture with one white box."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    left, top, right, bottom = box
    image[:, top:bottom, left:right] = 255
    return Picture(image, Target(torch.tensor([box]).float(), torch.tensor([0])))


def test_a_picture_of_the_size_stays_as_it_is():
    picture = paint(32, 32, (4, 8, 12, 20))
    image, target = letterbox(picture, 32)
    assert torch.equal(image * 255, picture.image.float())
    assert torch.equal(target.boxes, picture.target.boxes)


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (64, 128, [8.0, 20.0, 16.0, 28.0]),  # halved; 16 rows of grey above
        (128, 64, [24.0, 4.0, 32.0, 12.0]),  # halved; 16 columns of grey on the left
        (16, 32, [32.0, 32.0, 64.0, 48.0]),  # doubled, and cut off by the small picture
    ],
)
def test_boxes_move_with_the_picture(height, width, expected):
    box = (16, 8, min(32, width), min(24, height))
    image, target = letterbox(paint(height, width, box), 64)
    assert target.boxes.tolist() == [expected]
    left, top, right, bottom = (int(value) for value in expected)
    inside = image[:, top + 1 : bottom - 1, left + 1 : right - 1]
    assert bool((inside == 1).all())
    border = image[:, :, 0] if height > width else image[:, 0]
    torch.testing.assert_close(border, torch.full_like(border, 114 / 255))


def test_batches():
    pictures = Painted([paint(32, 32, (index, 8, 12, 20)) for index in range(5)])
    batches = PictureBatches(pictures, [4, 0, 2], 2, "drawn", 32)
    assert (len(batches), batches.num_samples) == (2, 3)
    (images, targets), (last, _) = batches
    assert (images.shape, last.shape) == ((2, 3, 32, 32), (1, 3, 32, 32))
    assert [target.boxes[0, 0].item() for target in targets] == [4, 0]
    assert [len(images) for images, _ in batches.subset(2)] == [2]
    assert batches.subset(2).description == "the first 2 of: drawn"
    assert batches.subset(9) is batches


@pytest.mark.parametrize(
    ("indices", "size", "batch_size"), [([], 32, 2), ([0], 0, 2), ([0], 32, 0)]
)
def test_empty_batches_are_refused(indices, size, batch_size):
    with pytest.raises(ArgumentError):
        PictureBatches(Painted(), indices, batch_size, "none", size)

"""Reading image files of every kind, and those that are not images."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from qdq.errors import DataError
from qdq.workloads.classification.images import LABELLED_PHOTOGRAPHS, draw_crop, read_image


def test_truncated_image(tmp_path):
    file = tmp_path / "photo.jpg"
    spec = importlib.util.find_spec("foolbox")
    photograph = (Path(spec.origin).parent / "data" / "imagenet_00_243.jpg").read_bytes()
    file.write_bytes(photograph[: len(photograph) // 2])
    with pytest.raises(DataError, match=r"photo.jpg: expected an image, found .*truncated"):
        read_image(file)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "I;16"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    file = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    Image.new("L", (20, 30), 128).convert(mode).save(file)
    image = read_image(file)
    assert (image.mode, image.size) == ("RGB", (20, 30))


def test_a_fifo_is_refused_without_opening_it(tmp_path):
    os.mkfifo(tmp_path / "fifo.png")  # whoever opens it waits forever
    with pytest.raises(DataError, match="it is a FIFO, not a file"):
        read_image(tmp_path / "fifo.png")


def test_a_crop_is_drawn_as_torchvision_draws_it():
    image = Image.new("RGB", (60, 40))
    torch.manual_seed(3)
    box = draw_crop(image)
    torch.manual_seed(3)
    assert box == RandomResizedCrop.get_params(image, [0.25, 1.0], [3 / 4, 4 / 3])


def test_labelled_photographs_are_found_in_order():
    names = [file.name for file in LABELLED_PHOTOGRAPHS.find_files()]
    assert len(names) == 20
    assert names == sorted(names)
    assert LABELLED_PHOTOGRAPHS.description == "foolbox 3.3.4"

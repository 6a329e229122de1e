"""Data sets of ultralytics: every form of the YAML file and of the labels, and what is refused."""

import logging

import pytest
import torch
from PIL import Image

from qdq.errors import DataError
from qdq.workloads.detection.label_files import find_label_file, read_label_file
from qdq.workloads.detection.yolo_data import read_yolo_data

NAMES = ("cat", "dog")


@pytest.fixture
def folder(tmp_path):
    """Two training and two validation images of 40 x 20 pixels, with a label each."""
    for part in ("train", "val"):
        for index in range(2):
            image = tmp_path / "images" / part / f"{index}.png"
            image.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 20), (index, 0, 0)).save(image)
            label = tmp_path / "labels" / part / f"{index}.txt"
            label.parent.mkdir(parents=True, exist_ok=True)
            label.write_text(f"{index} 0.5 0.5 0.25 0.5\n")
    (tmp_path / "val.txt").write_text("images/val/1.png\n\nimages/val/0.png\n")
    return tmp_path


def read(folder, text):
    file = folder / "data.yaml"
    file.write_text(text)
    return read_yolo_data(file)


GOOD = {
    "folders": "train: images/train\nval: images/val\nnames: [cat, dog]",
    "indices": "train: images/train\nval: images/val\nnames: {0: cat, 1: dog}\nnc: 2",
    "path": "path: images\ntrain: train\nval: val\nnames: [cat, dog]",
    "list": "train: [images/train]\nval: val.txt\nnames: [cat, dog]",
}


@pytest.mark.parametrize("form", GOOD)
def test_every_form_names_the_same_images(folder, form):
    data = read(folder, GOOD[form])
    assert data.names == NAMES
    assert [file.name for file in data.train.files] == ["0.png", "1.png"]
    assert {file.name for file in data.val.files} == {"0.png", "1.png"}
    picture = data.train[1]
    assert picture.image[:, 0, 0].tolist() == [1, 0, 0]
    assert picture.image.shape == (3, 20, 40)
    assert picture.target.boxes.tolist() == [[15.0, 5.0, 25.0, 15.0]]
    assert picture.target.labels.tolist() == [1]


def test_the_order_of_a_list_is_kept(folder):
    assert [file.name for file in read(folder, GOOD["list"]).val.files] == ["1.png", "0.png"]


def test_an_image_without_labels_shows_nothing_and_is_logged(folder, caplog):
    (folder / "labels" / "val" / "0.txt").unlink()
    with caplog.at_level(logging.INFO, logger="qdq"):
        data = read(folder, GOOD["folders"])
    assert "1 of the 2 images of val have no label file" in caplog.text
    target = data.val[0].target
    assert (target.boxes.shape, target.labels.shape) == ((0, 4), (0,))
    assert target.labels.dtype == torch.int64


def test_the_orientation_of_a_photograph_counts(folder):
    file = folder / "images" / "train" / "0.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.new("RGB", (40, 20)).save(file, exif=exif)
    assert read(folder, GOOD["folders"]).train[0].image.shape == (3, 40, 20)


BAD = {
    "lacks train, val, names": "path: .",
    "lacks names": "train: images/train\nval: images/val",
    "expected a list, or the indices": "train: images/train\nval: images/val\nnames: {1: cat}",
    "there is no folder": "path: elsewhere\ntrain: train\nval: val\nnames: [cat]",
    "which does not exist": "train: images/nothing\nval: images/val\nnames: [cat]",
    "has no images": "train: labels\nval: images/val\nnames: [cat]",
    "expected a path": "train: [3]\nval: images/val\nnames: [cat]",
    "cannot be read as YAML": "train: [",
    "holds a list": "- train",
}


@pytest.mark.parametrize("message", BAD)
def test_a_bad_file_is_refused(folder, message):
    with pytest.raises(DataError, match=message):
        read(folder, BAD[message])


def test_a_missing_file_is_refused(folder):
    with pytest.raises(DataError, match="there is no file"):
        read_yolo_data(folder / "other.yaml")


def test_a_list_of_missing_images_is_refused(folder):
    (folder / "val.txt").write_text("images/val/7.png\n")
    with pytest.raises(DataError, match="1 of the 1 images in"):
        read(folder, GOOD["list"])


def test_a_set_without_any_labels_is_refused(folder):
    for label in (folder / "labels" / "val").iterdir():
        label.unlink()
    with pytest.raises(DataError, match="none of the 2 images of val has labels"):
        read(folder, GOOD["folders"])


def test_the_place_of_labels(tmp_path):
    image = tmp_path / "images" / "a" / "images" / "b" / "c.jpeg"
    assert find_label_file(image) == tmp_path / "images" / "a" / "labels" / "b" / "c.txt"
    assert find_label_file(tmp_path / "c.png") == tmp_path / "c.txt"


def test_an_outline_gives_its_box(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("1 0.1 0.4 0.3 0.2 0.5 0.9\n\n0 0.5 0.5 1 1\n")
    boxes, labels = read_label_file(file, NAMES)
    assert labels == [1, 0]
    assert boxes == [[0.1, 0.2, 0.5, 0.9], [0, 0, 1, 1]]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("2 0.5 0.5 0.2 0.2", "has the class 2; the data set has 2 classes"),
        ("0.5 0.5 0.5 0.2 0.2", "has the class 0.5"),
        ("nan 0.5 0.5 0.2 0.2", "has the class nan"),
        ("cat 0.5 0.5 0.2 0.2", "which is not numbers"),
        ("0 0.5 0.5 0.2", "has 4 numbers"),
        ("0 320 240 64 64", "not in the image"),
        ("0 0.5 0.5 0 0.2", "empty"),
        ("0 nan 0.5 0.2 0.2", "not in the image"),
    ],
)
def test_a_bad_label_is_refused_with_its_place(tmp_path, line, message):
    file = tmp_path / "a.txt"
    file.write_text(f"0 0.5 0.5 0.2 0.2\n{line}\n")
    with pytest.raises(DataError, match=message) as error:
        read_label_file(file, NAMES)
    assert error.value.message.startswith(f"line 2 of {file}")

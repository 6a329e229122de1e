"""Image folders against torchvision's ImageFolder, and with everything that can be wrong."""

from __future__ import annotations

import logging
import os

import pytest
import torch
import torchvision
from image_sets import CATEGORIES, all_images, all_labels, colours, make_folder, make_model

from qdq.errors import DataError
from qdq.workloads.classification import batches
from qdq.workloads.classification.folder import load_image_folder
from qdq.workloads.classification.models import load_model


def test_single_folder_is_split_disjointly(tmp_path):
    make_folder(tmp_path, cat=30, dog=30)
    calibration, evaluation = load_image_folder(tmp_path, make_model(), 20, 40, batch_size=7)
    assert len(colours(calibration)) == 20
    assert len(colours(evaluation)) == 40
    assert not colours(calibration) & colours(evaluation)
    assert calibration.description == f"20 of 60 images in {tmp_path}, drawn with seed 0"


def test_choice_depends_on_the_seed_alone(tmp_path):
    make_folder(tmp_path, cat=30, dog=30)
    random_state = torch.get_rng_state()
    first_sets = load_image_folder(tmp_path, make_model(), 10, 20)
    assert torch.equal(torch.get_rng_state(), random_state)
    repeated_sets = load_image_folder(str(tmp_path), make_model(), 10, 20, batch_size=3)
    reseeded_sets = load_image_folder(tmp_path, make_model(), 10, 20, seed=1)
    for first, repeated, reseeded in zip(first_sets, repeated_sets, reseeded_sets, strict=True):
        assert torch.equal(all_images(first), all_images(repeated))
        assert colours(first) != colours(reseeded)


def test_train_and_val_are_used_for_what_they_are(tmp_path):
    make_folder(tmp_path / "train", cat=9, dog=9)
    make_folder(tmp_path / "val", cat=5, dog=5)
    model = make_model(num_classes=2)
    calibration, evaluation = load_image_folder(tmp_path, model, 12, 10)
    green = {round(colour[1], 3) for colour in colours(calibration)}
    assert green == {round((0 - 0.4) / 0.3, 3)}
    assert {round(colour[1], 3) for colour in colours(evaluation)} == {
        round((100 / 255 - 0.4) / 0.3, 3)
    }
    assert (calibration.num_images, evaluation.num_images) == (12, 10)
    assert calibration.description.startswith(f"12 of 18 images in {tmp_path / 'train'}")


def test_images_and_labels_are_those_of_image_folder(tmp_path):
    model = load_model("resnet18", "random")
    make_folder(tmp_path, **{"0": 3, "7": 4, "10": 2})
    transform = torchvision.models.ResNet18_Weights.DEFAULT.transforms()
    reference = torchvision.datasets.ImageFolder(tmp_path, transform)
    _, evaluation = load_image_folder(tmp_path, model, 1, 8, batch_size=3)
    for images, labels in evaluation:
        for image, label in zip(images, labels.tolist(), strict=True):
            (index,) = (index for expected, index in reference if torch.equal(expected, image))
            assert int(reference.classes[index]) == label


def test_streamed_files_are_the_cached_ones(tmp_path, monkeypatch):
    make_folder(tmp_path, cat=9, dog=9)
    cached_sets = load_image_folder(tmp_path, make_model(), 6, 12, batch_size=5)
    monkeypatch.setattr(batches, "CACHE_BYTES", 0)
    streamed_sets = load_image_folder(tmp_path, make_model(), 6, 12, batch_size=5)
    for cached, streamed in zip(cached_sets, streamed_sets, strict=True):
        assert torch.equal(all_images(cached), all_images(streamed))


def test_if_there_are_too_few_images_all_are_used(tmp_path, caplog):
    make_folder(tmp_path, cat=5, dog=5)
    with caplog.at_level(logging.WARNING, "qdq"):
        calibration, evaluation = load_image_folder(tmp_path, make_model(2), 128, 512)
    assert (calibration.num_images, evaluation.num_images) == (2, 8)
    assert not colours(calibration) & colours(evaluation)
    assert "8 of 10 images" in evaluation.description
    assert "(512 were requested)" in evaluation.description
    assert [record.message for record in caplog.records] == [
        calibration.description,
        evaluation.description,
    ]


# ---- labels


@pytest.mark.parametrize(
    ("model", "classes", "expected", "note"),
    [
        (make_model(1000), {"3": 2, "20": 2}, {3, 20}, "named by class index"),
        (
            make_model(1000, CATEGORIES),
            {"dalmatian": 2, "Egyptian_cat": 2},
            {251, 285},
            "named by category",
        ),
        (make_model(2), {"n02110341": 2, "n02124075": 2}, {0, 1}, "sorted order"),
        (make_model(2), {"1": 2, "2": 2}, {0, 1}, "sorted order"),
    ],
)
def test_labels_from_folder_names(tmp_path, model, classes, expected, note):
    make_folder(tmp_path, **classes)
    _, evaluation = load_image_folder(tmp_path, model, 1, 3)
    assert set(all_labels(evaluation)) == expected
    assert note in evaluation.label_note


def test_sorted_order_counts_the_classes_of_both_folders(tmp_path):
    make_folder(tmp_path / "train", ant=2, bee=2, cow=2)
    make_folder(tmp_path / "val", bee=2, cow=2)
    _, evaluation = load_image_folder(tmp_path, make_model(3), 6, 4)
    assert sorted(all_labels(evaluation)) == [1, 1, 2, 2]


def test_labels_that_cannot_be_matched(tmp_path, caplog):
    make_folder(tmp_path, n01440764=2, dalmatian=2)
    with caplog.at_level(logging.WARNING, "qdq"):
        _, evaluation = load_image_folder(tmp_path, make_model(1000, CATEGORIES), 1, 3)
    assert [labels for _, labels in evaluation] == [None]
    assert (
        "top-1 cannot be measured: tiny has 1000 classes, the data 2 class folders"
        in evaluation.label_note
    )
    assert evaluation.label_note.endswith(": n01440764")
    assert evaluation.label_note in caplog.text


# ---- damaged and missing data


def check_refused(folder, *words, model=None):
    with pytest.raises(DataError) as caught:
        load_image_folder(folder, model or make_model(2), 4, 4)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_entries_that_are_not_files_are_skipped_and_named(tmp_path, caplog):
    folder = make_folder(tmp_path, a=4, b=4)
    os.mkfifo(folder / "a" / "fifo.png")  # whoever opens it waits for ever
    (folder / "b" / "nowhere.jpg").symlink_to("missing")
    (folder / "b" / "linked.png").symlink_to(folder / "a" / "1.png")
    calibration, evaluation = load_image_folder(folder, make_model(2), 4, 5)
    assert calibration.num_images + evaluation.num_images == 9
    skipped = f"{folder / 'a' / 'fifo.png'}, {folder / 'b' / 'nowhere.jpg'}"
    assert f"not regular files, and skipped: {skipped}" in caplog.text


def test_missing_folder(tmp_path):
    check_refused(tmp_path / "absent", f"{tmp_path / 'absent'} does not exist", "--data")


def test_file_instead_of_a_folder(tmp_path):
    (tmp_path / "images.zip").write_bytes(b"PK")
    check_refused(tmp_path / "images.zip", "is a file; expected a folder of class folders")


def test_empty_folder(tmp_path):
    check_refused(
        tmp_path, f"{tmp_path} contains neither class folders nor images", "one folder per class"
    )


def test_empty_class_folders(tmp_path):
    make_folder(tmp_path, a=0, b=0, c=0, d=0)
    (tmp_path / "a" / "notes.txt").write_text("none yet")
    check_refused(tmp_path, "the 4 class folders", "(a, b, c and 1 more) contain no images", ".jpg")


def test_some_empty_class_folders_are_named(tmp_path, caplog):
    make_folder(tmp_path, cat=4, dog=0)
    with caplog.at_level(logging.WARNING, "qdq"):
        load_image_folder(tmp_path, make_model(2), 1, 1)
    assert f"class folders without an image in {tmp_path}: dog" in caplog.text


def test_images_without_class_folders(tmp_path):
    make_folder(tmp_path / "cat", **{".": 3})
    check_refused(tmp_path / "cat", "contains 3 images but no class folders", "CLASS")


@pytest.mark.parametrize("present", ["train", "val"])
def test_only_one_of_train_and_val(tmp_path, present):
    make_folder(tmp_path / present, cat=3, dog=3)
    check_refused(
        tmp_path, f"{tmp_path / present} has class folders", f"--data {tmp_path / present}"
    )


def test_a_class_called_train_is_a_class(tmp_path):
    make_folder(tmp_path, bus=4, train=4)
    _, evaluation = load_image_folder(tmp_path, make_model(2), 2, 6)
    assert set(all_labels(evaluation)) == {0, 1}


def test_a_single_image_cannot_be_shared(tmp_path):
    make_folder(tmp_path, cat=1)
    check_refused(tmp_path, "contains 1 image; expected 2 or more")


@pytest.mark.parametrize(
    ("content", "described"),
    [
        (b"not an image,\nreally\n", "found text beginning 'not an image, really'"),
        (b"", "found an empty file"),
        (bytes(range(200)), "found unknown or damaged binary data"),
    ],
)
def test_file_that_is_no_image(tmp_path, content, described):
    make_folder(tmp_path, cat=3, dog=2)
    (tmp_path / "dog" / "bad.jpg").write_bytes(content)
    check_refused(tmp_path, str(tmp_path / "dog" / "bad.jpg"), "expected an image", described)


def test_file_that_is_no_image_in_a_streamed_set(tmp_path, monkeypatch):
    monkeypatch.setattr(batches, "CACHE_BYTES", 0)
    make_folder(tmp_path, cat=3, dog=2)
    (tmp_path / "dog" / "bad.jpg").write_text("text")
    calibration, evaluation = load_image_folder(tmp_path, make_model(2), 3, 3)
    with pytest.raises(DataError, match=r"bad\.jpg: expected an image"):
        list(calibration), list(evaluation)

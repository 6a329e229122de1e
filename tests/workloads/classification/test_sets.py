"""Sets of images: nothing that is tested on is trained or calibrated on, and fractions are what they say."""

import pytest
import torch

pytest.importorskip("torchvision", reason="needs the extra 'demo'")
from PIL import Image

from qdq.errors import ArgumentError, DataError
from qdq.workloads.classification.models import LoadedModel, Preprocess
from qdq.workloads.classification.sets import (
    load_evaluation_sets,
    load_training_sets,
    take_crops,
    take_images,
)

NET = LoadedModel("net", None, "none", Preprocess(8, 8, (0.0,) * 3, (1.0,) * 3), 2, None)


def write_images(folder, count, first):
    """Images of one colour each; the value of the colour is the number of the image."""
    for index in range(count):
        path = folder / str(index % 2) / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (first + index,) * 3).save(path)
    (folder / "0" / "notes.txt").touch()


@pytest.fixture
def splits(tmp_path):
    write_images(tmp_path / "train", 20, 0)
    write_images(tmp_path / "val", 6, 100)
    return tmp_path


def numbers_of(batches):
    numbers = []
    for images, _ in batches:
        numbers += (images[:, 0, 0, 0] * 255).round().int().tolist()
    return numbers


def labels_match(batches):
    matches = []
    for images, labels in batches:
        numbers = (images[:, 0, 0, 0] * 255).round().long()
        matches.append(torch.equal(labels, numbers % 2))
    return all(matches)


def test_train_and_val(splits):
    sets = load_evaluation_sets(splits, NET, 4)
    assert sorted(numbers_of(sets.test)) == list(range(100, 106))
    calibration = numbers_of(sets.calibration)
    assert len(calibration) == 6 and set(calibration) < set(range(20))
    assert labels_match(sets.test) and labels_match(sets.calibration)

    training = load_training_sets(splits, NET, 0.25, 4)
    validation = numbers_of(training.validation)
    crops = set(numbers_of(training.training))
    assert len(validation) == 5 and training.training.num_images == len(crops) == 15
    assert crops | set(validation) == set(range(20))
    assert labels_match(training.validation) and labels_match(training.training)


def test_a_single_folder(tmp_path):
    write_images(tmp_path, 11, 0)
    sets = load_evaluation_sets(tmp_path, NET, 4)
    test = set(numbers_of(sets.test))
    assert (len(test), sets.calibration.num_images) == (6, 5)
    training = load_training_sets(tmp_path, NET, 0.2, 4)
    seen = set(numbers_of(training.training)) | set(numbers_of(training.validation))
    assert seen == set(range(11)) - test


def test_no_validation(splits):
    training = load_training_sets(splits, NET, 0.0, 4)
    assert training.validation is None
    assert training.training.num_images == 20


def test_fractions(splits):
    test = load_evaluation_sets(splits, NET, 4).test
    assert numbers_of(take_images(test, 0.5)) == numbers_of(test)[:3]
    assert take_images(test, 0.01).num_images == 1
    crops = take_crops(load_training_sets(splits, NET, 0.0, 4).training, 0.5)
    assert len(crops.files) == len(crops.labels) == crops.num_images == 10
    for fraction in (0, 1.1, float("nan")):
        with pytest.raises(ArgumentError, match="the fraction of the images is"):
            take_images(test, fraction)


def test_what_cannot_be_trained_on(tmp_path):
    with pytest.raises(DataError, match="the packaged photographs to train on have no labels"):
        load_training_sets(None, NET, 0.1)
    for name in ("a", "b", "c"):
        write_images(tmp_path / name, 2, 0)
    with pytest.raises(DataError, match="are not classes of net"):
        load_training_sets(tmp_path, NET, 0.1)
    write_images(tmp_path / "few", 2, 0)
    with pytest.raises(DataError, match="too few images to train on"):
        load_training_sets(tmp_path / "few", NET, 0.9)

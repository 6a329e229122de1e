"""Batches: the same in every pass, or random crops that a seed decides."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from image_sets import all_images, all_labels, colours, make_folder, make_model
from PIL import Image

from qdq.errors import ArgumentError
from qdq.workloads.classification import load_images, load_training_images
from qdq.workloads.classification.batches import CropBatches, ImageBatches
from qdq.workloads.classification.images import read_image


def make_batches_of_seven():
    images = torch.arange(7.0).view(7, 1, 1, 1)
    return ImageBatches(images, [*range(7)], 3, 7, "seven", "numbers")


def test_batches_are_the_same_in_every_pass():
    batches = make_batches_of_seven()
    assert len(batches) == 3
    assert [images.flatten().tolist() for images, _ in batches] == [[0, 1, 2], [3, 4, 5], [6]]
    assert [labels.tolist() for _, labels in batches] == [[0, 1, 2], [3, 4, 5], [6]]
    assert {labels.dtype for _, labels in batches} == {torch.int64}
    for images, _ in batches:
        images.zero_()  # what a model with an in-place first layer does
    assert all_images(batches).flatten().tolist() == [*range(7)]


def test_subset_is_the_first_images():
    batches = make_batches_of_seven()
    part = batches.subset(4)
    assert (part.num_images, len(part), part.description) == (4, 2, "the first 4 of: seven")
    assert all_images(part).flatten().tolist() == [0, 1, 2, 3]
    assert all_labels(part) == [0, 1, 2, 3]
    assert batches.subset(8) is batches
    with pytest.raises(ArgumentError, match="n is 0"):
        batches.subset(0)


def test_crops_of_one_photograph_follow_each_other():
    """Seven crops of three photographs in turn; what is not held out is in turn, too."""
    crops = replace(make_batches_of_seven(), photographs=[0, 1, 2, 0, 1, 2, 0])
    assert all_images(crops.by_source()).flatten().tolist() == [0, 3, 6, 1, 4, 2, 5]
    assert all_labels(crops.by_source()) == [0, 3, 6, 1, 4, 2, 5]
    for fitted, judged in (crops.hold_out(2), crops.by_source().hold_out(2)):
        assert all_images(judged).flatten().tolist() == [0, 3, 6]
        assert all_images(fitted.by_source()).flatten().tolist() == [1, 4, 2, 5]
    assert make_batches_of_seven().by_source().description == "seven"


def test_batch_size_must_be_positive():
    with pytest.raises(ArgumentError, match="batch_size is 0; it must be 1 or more"):
        ImageBatches(torch.zeros(1, 3, 2, 2), None, 0, 1, "", "")


def seeded(batches, seed=0):
    torch.manual_seed(seed)
    return all_images(batches)


@pytest.mark.parametrize("split", [True, False])
def test_no_image_is_trained_on_and_evaluated_on(tmp_path, split):
    if split:
        make_folder(tmp_path / "train", cat=5, dog=7)
        make_folder(tmp_path / "val", cat=3, dog=2)
    else:
        make_folder(tmp_path, cat=8, dog=9)
    model = make_model(num_classes=2)
    calibration, evaluation = load_images(tmp_path, model, 4, 5, 2)
    training = load_training_images(tmp_path, model, None, 4, 5, 2)
    training_colours = colours(training)
    assert training.num_images == len(training_colours) == 12
    assert not training_colours & colours(evaluation)
    assert colours(calibration) <= training_colours
    rest = training.without_first(3)
    assert len(colours(rest)) == rest.num_images == 9
    assert not colours(rest) & colours(calibration.subset(3))
    for images, labels in training:
        for image, label in zip(images, labels.tolist(), strict=True):
            (file,) = (path for path in tmp_path.rglob("*.png") if has_colour(path, image))
            assert label == int(file.parent.name == "dog")
            assert "val" not in file.parts


def has_colour(path, image):
    return torch.equal(make_model().preprocess.normalize(read_image(path))[:, 0, 0], image[:, 0, 0])


def test_every_pass_draws_other_crops_and_the_seed_decides():
    model = make_model()
    training = load_training_images(None, model, 20, batch_size=8)
    assert len(training) == 3
    first = seeded(training)
    assert first.shape == (20, 3, 32, 32)
    assert torch.equal(seeded(training), first)
    assert not torch.equal(all_images(training), first)
    assert not torch.equal(seeded(training, 1), first)


def test_half_of_the_crops_are_mirrored(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        image = Image.new("RGB", (64, 64), "black")
        image.paste("white", (32, 0, 64, 64))
        image.save(tmp_path / name / "0.png")
        image.save(tmp_path / name / "1.png")
    images = seeded(load_training_images(tmp_path, make_model(num_classes=2), 200, 1, 1, 50))
    is_mirrored = images[:, :, :, :4].mean((1, 2, 3)) > images[:, :, :, -4:].mean((1, 2, 3))
    assert 60 < int(is_mirrored.sum()) < 140


def test_without_labels_half_of_the_crops_are_blended_with_another(tmp_path):
    make_folder(tmp_path, cat=400)
    files, preprocess = sorted(tmp_path.rglob("*.png")), make_model().preprocess
    plain = colours(CropBatches(files, [0] * 400, preprocess, 100, 400, "labelled"))
    blended = all_images(CropBatches(files, None, preprocess, 100, 400, "not labelled"))
    for image in blended[:20]:  # the fraction is one number for the whole crop
        assert torch.equal(image, image[:, :1, :1].expand_as(image))
    blended_colours = {tuple(image[:, 0, 0].tolist()) for image in blended}
    assert 140 < len(blended_colours & plain) < 260
    lowest, highest = torch.tensor(sorted(plain)).aminmax(dim=0)
    values = blended[:, :, 0, 0]
    assert ((values >= lowest - 1e-6) & (values <= highest + 1e-6)).all()


@pytest.mark.parametrize("name", ["num_images", "calibration", "evaluation", "batch_size"])
def test_numbers_for_training_must_be_positive(name):
    with pytest.raises(ArgumentError, match=f"{name} is 0"):
        load_training_images(None, make_model(), **{name: 0})

"""The image sets against torchvision's own transforms and ImageFolder, and on all that can be wrong."""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from PIL import Image
from torch import nn
from torchvision.transforms import Compose, Normalize, RandomResizedCrop, ToTensor

from qdq import data
from qdq.data import (
    CropBatches,
    ImageBatches,
    load_image_folder,
    load_images,
    load_sample_images,
    load_training_images,
    read_image,
)
from qdq.errors import ArgumentError, DataError, DependencyError
from qdq.models import LoadedModel, Preprocess, load_model

CATEGORIES = torchvision.models.ResNet18_Weights.DEFAULT.meta["categories"]


def make_model(num_classes=1000, categories=None, crop_size=32) -> LoadedModel:
    """A model that is small where only its preprocessing and its classes matter."""
    preprocess = Preprocess(crop_size + 8, crop_size, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    return LoadedModel("tiny", nn.Identity(), "none", preprocess, num_classes, categories)


def make_folder(root: Path, **classes: int) -> Path:
    """Class folders of images, each of another colour all over the dataset."""
    number = sum(1 for path in root.rglob("*.png")) if root.exists() else 0
    for name, count in classes.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for _ in range(count):
            number += 1
            colour = (number % 250, number // 250 + 100 * ("val" in root.name), 7)
            Image.new("RGB", (48, 40), colour).save(root / name / f"{number}.png")
    return root


def all_images(batches: ImageBatches) -> torch.Tensor:
    return torch.cat([images for images, _ in batches])


def all_labels(batches: ImageBatches) -> list[int]:
    return torch.cat([labels for _, labels in batches]).tolist()


def colours(batches: ImageBatches) -> set[tuple[float, ...]]:
    return {tuple(pixel.tolist()) for pixel in all_images(batches)[:, :, 0, 0]}


# ---- batches


def test_batches_are_the_same_in_every_pass():
    batches = ImageBatches(
        torch.arange(7.0).view(7, 1, 1, 1), [*range(7)], 3, 7, "seven", "numbers"
    )
    assert len(batches) == 3
    assert [images.flatten().tolist() for images, _ in batches] == [[0, 1, 2], [3, 4, 5], [6]]
    assert [labels.tolist() for _, labels in batches] == [[0, 1, 2], [3, 4, 5], [6]]
    assert {labels.dtype for _, labels in batches} == {torch.int64}
    for images, _ in batches:
        images.zero_()  # what a model with an in-place first layer does
    assert all_images(batches).flatten().tolist() == [*range(7)]


def test_subset_is_the_first_images():
    batches = ImageBatches(
        torch.arange(7.0).view(7, 1, 1, 1), [*range(7)], 3, 7, "seven", "numbers"
    )
    part = batches.subset(4)
    assert (part.num_images, len(part), part.description) == (4, 2, "the first 4 of: seven")
    assert all_images(part).flatten().tolist() == [0, 1, 2, 3]
    assert all_labels(part) == [0, 1, 2, 3]
    assert batches.subset(8) is batches
    with pytest.raises(ArgumentError, match="n is 0"):
        batches.subset(0)


def test_batch_size_must_be_positive():
    with pytest.raises(ArgumentError, match="batch_size is 0; it must be 1 or more"):
        ImageBatches(torch.zeros(1, 3, 2, 2), None, 0, 1, "", "")


# ---- the packaged photographs


def test_crops_are_those_of_torchvision():
    model = make_model()
    crop = RandomResizedCrop(32, scale=(0.25, 1.0))
    transform = Compose([crop, ToTensor(), Normalize(model.preprocess.mean, model.preprocess.std)])
    folder = Path(importlib.util.find_spec("foolbox").origin).parent / "data"
    photographs = [
        Image.open(path).convert("RGB") for path in sorted(folder.glob("imagenet_*.jpg"))
    ]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        expected = torch.stack([transform(photographs[index % 20]) for index in range(45)])
    _, evaluation = load_sample_images(model, 1, 45, batch_size=8, seed=5)
    assert torch.equal(all_images(evaluation), expected)


def test_crops_depend_on_the_seed_alone():
    model = make_model()
    before = torch.get_rng_state()
    first = load_sample_images(model, 24, 60, batch_size=32)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    again = load_sample_images(model, 24, 60, batch_size=32)
    fewer = load_sample_images(model, 12, 30, batch_size=7)
    other = load_sample_images(model, 24, 60, batch_size=32, seed=1)
    for one, two, part, different in zip(first, again, fewer, other, strict=True):
        assert torch.equal(all_images(one), all_images(two))
        assert torch.equal(all_images(one)[: part.num_images], all_images(part))
        assert not torch.equal(all_images(one), all_images(different))


def test_streamed_crops_are_the_cached_ones(monkeypatch):
    cached = load_sample_images(make_model(), 13, 21, batch_size=8)
    monkeypatch.setattr(data, "CACHE_BYTES", 0)
    streamed = load_sample_images(make_model(), 13, 21, batch_size=8)
    for one, two in zip(cached, streamed, strict=True):
        assert isinstance(one.images, torch.Tensor)
        assert not isinstance(two.images, torch.Tensor)
        assert torch.equal(all_images(one), all_images(two))
        assert torch.equal(all_images(one.subset(9)), all_images(two.subset(9)))
        assert torch.equal(one.images[:2], two.images[:2])


def test_sample_labels_and_descriptions():
    calibration, evaluation = load_sample_images(make_model(), 12, 60, batch_size=16)
    assert all_labels(evaluation.subset(4)) == [243, 559, 438, 990]  # imagenet_00_243.jpg and so on
    counts = torch.bincount(torch.tensor(all_labels(evaluation)))
    assert (
        counts[counts > 0].tolist() == [3] * 7 + [3] * 5 + [6] + [3] * 6
    )  # two photographs are of class 609
    assert counts[609] == 6
    assert calibration.labels is None
    assert [labels for _, labels in calibration] == [None]
    assert (
        "12 random-resized crops (area 25% to 100%, seed 0) of 8 photographs"
        in calibration.description
    )
    assert "60 random-resized crops" in evaluation.description
    assert "20 labelled ImageNet photographs in foolbox 3.3.4" in evaluation.description


def test_photographs_of_calibration_are_colourful_and_all_used():
    calibration, _ = load_sample_images(make_model(), 8, 1)
    images = all_images(calibration)
    assert len(images.flatten(1).unique(dim=0)) == 8
    scaled = (
        images * torch.tensor([0.2, 0.3, 0.4])[:, None, None]
        + torch.tensor([0.5, 0.4, 0.3])[:, None, None]
    )
    grey = (scaled.amax(1) - scaled.amin(1)).amax((1, 2)) < 0.01
    assert not grey.any()


def test_model_with_other_classes_gets_no_sample_labels():
    _, evaluation = load_sample_images(make_model(num_classes=10), 1, 20)
    assert evaluation.labels is None
    assert "tiny other classes" in evaluation.label_note


def test_packaged_model_recognises_the_crops():
    model = load_model()
    _, evaluation = load_sample_images(model, 1, 100, batch_size=50)
    with torch.inference_mode():
        hits = sum(
            int((model.module(images).argmax(1) == labels).sum()) for images, labels in evaluation
        )
    assert 78 <= hits <= 92  # 424 of 500


def test_sample_images_import_no_heavy_package():
    code = """if True:
        import sys
        from qdq.data import load_sample_images
        from qdq.models import LoadedModel, Preprocess
        preprocess = Preprocess(8, 8, (0.0,) * 3, (1.0,) * 3)
        load_sample_images(LoadedModel("", None, "", preprocess, 10, None), 1, 1)
        assert not {"foolbox", "skimage", "sklearn", "scipy"} & set(sys.modules)
    """
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


@pytest.mark.parametrize(
    ("module", "package"), [("foolbox", "foolbox"), ("skimage", "scikit-image")]
)
def test_package_of_photographs_not_installed(monkeypatch, module, package):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == module else find(name)
    )
    with pytest.raises(DependencyError, match=f"need {package}, which is not installed") as caught:
        load_sample_images(make_model(), 1, 1)
    assert "pip install 'qdq[demo]'" in caught.value.fix


@pytest.mark.parametrize("name", ["calibration", "evaluation", "batch_size"])
@pytest.mark.parametrize(
    "loader", [load_sample_images, lambda model, **n: load_image_folder(".", model, **n)]
)
def test_numbers_must_be_positive(loader, name):
    with pytest.raises(ArgumentError, match=f"{name} is 0"):
        loader(make_model(), **{name: 0})


def test_load_images_takes_the_folder_or_the_packaged_photographs(tmp_path):
    make_folder(tmp_path, cat=3, dog=3)
    assert (
        str(tmp_path)
        in load_images(tmp_path, make_model(), 2, 3, batch_size=1, seed=4)[1].description
    )
    evaluation = load_images(None, make_model(), 2, 3, batch_size=2, seed=4)[1]
    expected = load_sample_images(make_model(), 2, 3, seed=4)[1]
    assert (evaluation.description, len(evaluation)) == (expected.description, 2)


# ---- image folders: which images


def test_single_folder_is_split_disjointly(tmp_path):
    make_folder(tmp_path, cat=30, dog=30)
    calibration, evaluation = load_image_folder(tmp_path, make_model(), 20, 40, batch_size=7)
    assert len(colours(calibration)) == 20
    assert len(colours(evaluation)) == 40
    assert not colours(calibration) & colours(evaluation)
    assert calibration.description == f"20 of 60 images in {tmp_path}, drawn with seed 0"


def test_choice_depends_on_the_seed_alone(tmp_path):
    make_folder(tmp_path, cat=30, dog=30)
    before = torch.get_rng_state()
    first = load_image_folder(tmp_path, make_model(), 10, 20)
    assert torch.equal(torch.get_rng_state(), before)
    again = load_image_folder(str(tmp_path), make_model(), 10, 20, batch_size=3)
    other = load_image_folder(tmp_path, make_model(), 10, 20, seed=1)
    for one, two, different in zip(first, again, other, strict=True):
        assert torch.equal(all_images(one), all_images(two))
        assert colours(one) != colours(different)


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
            (found,) = [index for other, index in reference if torch.equal(other, image)]
            assert int(reference.classes[found]) == label


def test_streamed_files_are_the_cached_ones(tmp_path, monkeypatch):
    make_folder(tmp_path, cat=9, dog=9)
    cached = load_image_folder(tmp_path, make_model(), 6, 12, batch_size=5)
    monkeypatch.setattr(data, "CACHE_BYTES", 0)
    streamed = load_image_folder(tmp_path, make_model(), 6, 12, batch_size=5)
    for one, two in zip(cached, streamed, strict=True):
        assert torch.equal(all_images(one), all_images(two))


def test_fewer_images_than_asked_for_are_all_used_and_said_so(tmp_path, caplog):
    make_folder(tmp_path, cat=5, dog=5)
    with caplog.at_level(logging.WARNING, "qdq"):
        calibration, evaluation = load_image_folder(tmp_path, make_model(2), 128, 512)
    assert (calibration.num_images, evaluation.num_images) == (2, 8)
    assert not colours(calibration) & colours(evaluation)
    assert "8 of 10 images" in evaluation.description
    assert "(512 were asked for)" in evaluation.description
    assert [record.message for record in caplog.records] == [
        calibration.description,
        evaluation.description,
    ]


# ---- image folders: labels


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


# ---- image folders: what can be wrong


def check_refused(folder, *words, model=None):
    with pytest.raises(DataError) as caught:
        load_image_folder(folder, model or make_model(2), 4, 4)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_no_file_is_left_out_and_named(tmp_path, caplog):
    folder = make_folder(tmp_path, a=4, b=4)
    os.mkfifo(folder / "a" / "fifo.png")  # whoever opens it waits for ever
    (folder / "b" / "nowhere.jpg").symlink_to("missing")
    (folder / "b" / "linked.png").symlink_to(folder / "a" / "1.png")
    calibration, evaluation = load_image_folder(folder, make_model(2), 4, 5)
    assert calibration.num_images + evaluation.num_images == 9
    assert (
        f"no files, and left out: {folder / 'a' / 'fifo.png'}, {folder / 'b' / 'nowhere.jpg'}"
        in caplog.text
    )
    with pytest.raises(DataError, match="it is a FIFO, not a file"):
        read_image(folder / "a" / "fifo.png")


def test_missing_folder(tmp_path):
    check_refused(tmp_path / "absent", f"{tmp_path / 'absent'} does not exist", "--data-dir")


def test_file_instead_of_a_folder(tmp_path):
    (tmp_path / "images.zip").write_bytes(b"PK")
    check_refused(tmp_path / "images.zip", "is a file; expected a folder of class folders")


def test_empty_folder(tmp_path):
    check_refused(
        tmp_path, f"{tmp_path} holds neither class folders nor images", "one folder a class"
    )


def test_empty_class_folders(tmp_path):
    make_folder(tmp_path, a=0, b=0, c=0, d=0)
    (tmp_path / "a" / "notes.txt").write_text("none yet")
    check_refused(tmp_path, "the 4 class folders", "(a, b, c, ...) hold no image", ".jpg")


def test_some_empty_class_folders_are_named(tmp_path, caplog):
    make_folder(tmp_path, cat=4, dog=0)
    with caplog.at_level(logging.WARNING, "qdq"):
        load_image_folder(tmp_path, make_model(2), 1, 1)
    assert f"class folders without an image in {tmp_path}: dog" in caplog.text


def test_images_without_class_folders(tmp_path):
    make_folder(tmp_path / "cat", **{".": 3})
    check_refused(tmp_path / "cat", "holds 3 images but no class folders", "CLASS")


@pytest.mark.parametrize("present", ["train", "val"])
def test_only_one_of_train_and_val(tmp_path, present):
    make_folder(tmp_path / present, cat=3, dog=3)
    check_refused(
        tmp_path, f"{tmp_path / present} has class folders", f"--data-dir {tmp_path / present}"
    )


def test_a_class_called_train_is_a_class(tmp_path):
    make_folder(tmp_path, bus=4, train=4)
    _, evaluation = load_image_folder(tmp_path, make_model(2), 2, 6)
    assert set(all_labels(evaluation)) == {0, 1}


def test_a_single_image_cannot_be_shared(tmp_path):
    make_folder(tmp_path, cat=1)
    check_refused(tmp_path, "holds 1 image; expected 2 or more")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"not an image,\nreally\n", "found text beginning 'not an image, really'"),
        (b"", "found an empty file"),
        (bytes(range(200)), "found unknown or damaged binary data"),
    ],
)
def test_file_that_is_no_image(tmp_path, content, found):
    make_folder(tmp_path, cat=3, dog=2)
    (tmp_path / "dog" / "bad.jpg").write_bytes(content)
    check_refused(tmp_path, str(tmp_path / "dog" / "bad.jpg"), "expected an image", found)


def test_truncated_image(tmp_path):
    file = tmp_path / "photo.jpg"
    spec = importlib.util.find_spec("foolbox")
    photograph = (Path(spec.origin).parent / "data" / "imagenet_00_243.jpg").read_bytes()
    file.write_bytes(photograph[: len(photograph) // 2])
    with pytest.raises(DataError, match=r"photo.jpg: expected an image, found .*truncated"):
        read_image(file)


def test_file_that_is_no_image_in_a_streamed_set(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "CACHE_BYTES", 0)
    make_folder(tmp_path, cat=3, dog=2)
    (tmp_path / "dog" / "bad.jpg").write_text("text")
    calibration, evaluation = load_image_folder(tmp_path, make_model(2), 3, 3)
    with pytest.raises(DataError, match=r"bad\.jpg: expected an image"):
        list(calibration), list(evaluation)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "I;16"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    Image.new("L", (20, 30), 128).convert(mode).save(
        file := tmp_path / f"image.{'tif' if mode == 'CMYK' else 'png'}"
    )
    image = read_image(file)
    assert (image.mode, image.size) == ("RGB", (20, 30))


# ---- training


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
    arguments = (tmp_path, make_model(num_classes=2))
    calibration, evaluation = load_images(*arguments, 4, 5, 2)
    training = load_training_images(*arguments, None, 4, 5, 2)
    seen = colours(training)
    assert training.num_images == len(seen) == 12
    assert not seen & colours(evaluation)
    assert colours(calibration) <= seen
    label_of = {
        tuple(image[:, 0, 0].tolist()): label
        for batch in training
        for image, label in zip(*batch, strict=True)
    }
    files = [path for path in tmp_path.rglob("*.png") if "val" not in path.parts]
    expected = {tuple(read_training(path)): int(path.parent.name == "dog") for path in files}
    assert label_of == {colour: expected[colour] for colour in seen}


def read_training(path):
    return make_model().preprocess.normalize(read_image(path))[:, 0, 0].tolist()


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
    blended = torch.cat(
        [images for images, _ in CropBatches(files, None, preprocess, 100, 400, "not labelled")]
    )
    assert all(
        torch.equal(image, image[:, :1, :1].expand_as(image)) for image in blended[:20]
    )  # one share a crop
    found = {tuple(image[:, 0, 0].tolist()) for image in blended}
    assert 140 < len(found & plain) < 260
    lowest, highest = torch.tensor(sorted(plain)).aminmax(dim=0)
    values = blended[:, :, 0, 0]
    assert ((values >= lowest - 1e-6) & (values <= highest + 1e-6)).all()


@pytest.mark.parametrize("name", ["num_images", "calibration", "evaluation", "batch_size"])
def test_numbers_for_training_must_be_positive(name):
    with pytest.raises(ArgumentError, match=f"{name} is 0"):
        load_training_images(None, make_model(), **{name: 0})

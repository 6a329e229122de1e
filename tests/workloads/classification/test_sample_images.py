"""The crops of packaged photographs against torchvision's own transforms."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from image_sets import all_images, all_labels, make_folder, make_model
from PIL import Image
from torchvision.transforms import Compose, Normalize, RandomResizedCrop, ToTensor

from qdq.errors import ArgumentError, DependencyError
from qdq.workloads.classification import batches, load_images
from qdq.workloads.classification.folder import load_image_folder
from qdq.workloads.classification.models import load_model
from qdq.workloads.classification.samples import load_sample_images


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
    random_state = torch.get_rng_state()
    first_sets = load_sample_images(model, 24, 60, batch_size=32)
    assert torch.equal(torch.get_rng_state(), random_state)
    torch.rand(3)
    repeated_sets = load_sample_images(model, 24, 60, batch_size=32)
    smaller_sets = load_sample_images(model, 12, 30, batch_size=7)
    reseeded_sets = load_sample_images(model, 24, 60, batch_size=32, seed=1)
    for first, repeated, smaller, reseeded in zip(
        first_sets, repeated_sets, smaller_sets, reseeded_sets, strict=True
    ):
        assert torch.equal(all_images(first), all_images(repeated))
        assert torch.equal(all_images(first)[: smaller.num_images], all_images(smaller))
        assert not torch.equal(all_images(first), all_images(reseeded))


def test_streamed_crops_are_the_cached_ones(monkeypatch):
    cached_sets = load_sample_images(make_model(), 13, 21, batch_size=8)
    monkeypatch.setattr(batches, "CACHE_BYTES", 0)
    streamed_sets = load_sample_images(make_model(), 13, 21, batch_size=8)
    for cached, streamed in zip(cached_sets, streamed_sets, strict=True):
        assert isinstance(cached.images, torch.Tensor)
        assert not isinstance(streamed.images, torch.Tensor)
        assert torch.equal(all_images(cached), all_images(streamed))
        assert torch.equal(all_images(cached.subset(9)), all_images(streamed.subset(9)))
        assert torch.equal(cached.images[:2], streamed.images[:2])


def test_sample_labels_and_descriptions():
    calibration, evaluation = load_sample_images(make_model(), 12, 60, batch_size=16)
    assert all_labels(evaluation.subset(4)) == [243, 559, 438, 990]  # imagenet_00_243.jpg and so on
    counts = torch.bincount(torch.tensor(all_labels(evaluation)))
    # Two photographs are of class 609.
    assert counts[counts > 0].tolist() == [3] * 7 + [3] * 5 + [6] + [3] * 6
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
        hits = 0
        for images, labels in evaluation:
            hits += int((model.module(images).argmax(1) == labels).sum())
    assert 78 <= hits <= 92  # 424 of 500


def test_sample_images_import_no_heavy_package():
    code = """if True:
        import sys
        from qdq.workloads.classification.samples import load_sample_images
        from qdq.workloads.classification.models import LoadedModel, Preprocess
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

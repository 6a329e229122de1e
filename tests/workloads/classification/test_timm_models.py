"""Classifiers of timm by name, against timm's own transform."""

import pytest
import torch

from qdq import ModelError
from qdq.workloads.classification.images import CALIBRATION_PHOTOGRAPHS, read_image
from qdq.workloads.classification.models import load_model

timm = pytest.importorskip("timm")


def test_images_are_preprocessed_as_timm_does():
    loaded = load_model("timm/test_vit", "random")
    reference = timm.create_model("test_vit", pretrained=False)
    config = timm.data.resolve_model_data_config(reference)
    transform = timm.data.create_transform(**config)
    image = read_image(CALIBRATION_PHOTOGRAPHS[1].find_files()[0])
    assert torch.equal(loaded.preprocess(image), transform(image))
    assert loaded.num_classes == 1000
    assert loaded.categories[:2] == ["tench", "goldfish"]
    with torch.no_grad():
        assert loaded.module(transform(image)[None]).shape == (1, 1000)


@pytest.mark.parametrize("name", ["timm/test_vit", "timm/test_resnet"])
def test_another_image_size(name):
    loaded = load_model(name, "random", image_size=96)
    assert loaded.preprocess.crop_size == 96
    with torch.no_grad():
        assert loaded.module(torch.zeros(1, 3, 96, 96)).shape == (1, 1000)


def test_a_checkpoint_decides_the_number_of_classes(tmp_path):
    trained = timm.create_model("test_resnet", pretrained=False, num_classes=7).eval()
    torch.save(trained.state_dict(), tmp_path / "seven.pth")
    loaded = load_model("timm/test_resnet", str(tmp_path / "seven.pth"))
    assert loaded.num_classes == 7
    images = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        torch.testing.assert_close(loaded.module(images), trained(images), rtol=1e-4, atol=1e-5)


def test_unknown_names_and_missing_weights(monkeypatch):
    with pytest.raises(ModelError, match="timm has no model 'resnet5'") as caught:
        load_model("timm/resnet5")
    assert "timm/resnet50" in caught.value.fix

    def fail(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(ModelError, match="cannot fetch the weights of timm/test_vit: no network"):
        load_model("timm/test_vit")

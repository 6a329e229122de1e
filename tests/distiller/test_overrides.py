"""Settings of layers against the cases of Distiller, whose faults are mended, and their errors."""

import builtins
import json
import logging
import re
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

from qdq.distiller.ranges.clipping import ClipMode
from qdq.distiller.ranges.modes import LinearQuantMode, ModePair
from qdq.distiller.settings.layer_settings import LayerSettings, update_settings
from qdq.distiller.settings.names import plain_names
from qdq.distiller.settings.overrides import override_layers, resolve
from qdq.errors import QdqError

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
CASES = json.loads((GOLDEN / "distiller_overrides.json").read_text())["cases"]
ERRORS = {
    case["when"]: getattr(builtins, case["error"])
    for case in json.loads((GOLDEN / "distiller_errors.json").read_text())["cases"]
}


def make_block(numbers):
    layers = OrderedDict()
    for number in numbers:
        layers[f"conv{number}"] = nn.Conv2d(3, 3, 1)
        layers[f"bn{number}"] = nn.BatchNorm2d(3)
        layers[f"relu{number}"] = nn.ReLU()
        layers[f"pool{number}"] = nn.MaxPool2d(2)
    return layers


def make_published_model():
    layers = make_block([1])
    for name in ("sub1", "sub2"):
        layers[name] = nn.Sequential(make_block([1, 2]))
    layers |= {"fc": nn.Linear(3, 3), "last_relu": nn.ReLU()}
    return nn.Sequential(layers)


def make_small_model():
    inner = nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 3, 1)))
    outer = OrderedDict(conv1=nn.Conv2d(3, 3, 1), conv2=nn.Conv2d(3, 3, 1), my_module=inner)
    return nn.Sequential(outer)


def make_defaults(case):
    names = {"acts": "bits_activations", "wts": "bits_weights", "bias": "bits_bias"}
    return LayerSettings(**{names[key]: bits for key, bits in case["defaults"].items()})


def bits_of(settings):
    return {
        "acts": settings.bits_activations,
        "wts": settings.bits_weights,
        "bias": settings.bits_bias,
    }


MENDED = {
    # A capture group no longer moves the next patterns.
    "reference_run:capture_group_then_patterns": {"conv2": {"acts": 8, "wts": 4, "bias": 32}},
    # Names keep "module." unless it is the prefix of a wrapper.
    "reference_run:name_with_module_dot": {"my_module.conv": {"acts": 8, "wts": 2, "bias": 32}},
}


@pytest.mark.parametrize("case", CASES, ids=[case["id"] for case in CASES])
def test_bits_are_those_of_the_published_cases(case):
    is_reference_run = case["id"].startswith("reference_run")
    model = make_small_model() if is_reference_run else make_published_model()
    defaults = make_defaults(case)
    settings = resolve(model, defaults, OrderedDict(case["overrides"])).settings
    expected = case["expected"] | MENDED.get(case["id"], {})
    assert expected.keys() <= settings.keys()
    for name, module in list(model.named_modules())[1:]:
        bits = dict(case["defaults"])
        if not isinstance(module, nn.Conv2d | nn.Linear):
            bits |= {"wts": None, "bias": None}
        assert bits_of(settings[name]) == expected.get(name, bits), name


def test_a_wrapper_hides_its_prefix():
    model = nn.DataParallel(make_small_model())
    assert list(plain_names(model)) == ["conv1", "conv2", "my_module", "my_module.conv"]
    settings = resolve(model, LayerSettings(), OrderedDict(conv1={"bits_weights": 2})).settings
    assert settings["conv1"].bits_weights == 2


def test_an_exact_name_wins_even_behind_a_pattern():
    overrides = OrderedDict({"conv.*": {"bits_weights": 4}, "conv1": {"bits_weights": 2}})
    settings = resolve(make_small_model(), LayerSettings(), overrides).settings
    assert settings["conv1"].bits_weights == 2
    assert settings["conv2"].bits_weights == 4


def test_a_pattern_must_match_the_whole_name():
    overrides = OrderedDict({"conv|my": {"bits_weights": 4}})
    resolution = resolve(make_small_model(), LayerSettings(), overrides)
    assert resolution.settings["conv1"].bits_weights == 8
    assert resolution.unused == {"conv|my": "matches no layer"}


def test_patterns_that_apply_to_no_layer_are_reported(caplog):
    overrides = OrderedDict(
        {
            "conv1": {"bits_weights": 4},
            "conv[1]": {"bits_weights": 5},
            "conv2": {"bits_weights": 6},
            "my_module": {"bits_weights": 7},
            "convv.*": {"bits_weights": 8},
        }
    )
    with caplog.at_level(logging.WARNING):
        unused = resolve(make_small_model(), LayerSettings(), overrides).unused
    assert list(unused) == ["conv[1]", "my_module", "convv.*"]
    assert "other entries come first" in unused["conv[1]"]
    assert unused["convv.*"] == "matches no layer"
    assert caplog.messages == [f"override '{pattern}' {why}" for pattern, why in unused.items()]


class PaddedConv(nn.Conv2d):
    """A convolution with a module of its own, as the packaged EfficientNet-Lite0 has."""

    def __init__(self):
        super().__init__(3, 3, 1)
        self.padding_module = nn.ZeroPad2d(1)


def test_a_layer_with_a_module_of_its_own_takes_an_override(caplog):
    entries = OrderedDict(stem={"bits_weights": 4})
    model = nn.Sequential(OrderedDict(stem=PaddedConv(), relu=nn.ReLU()))
    resolution = resolve(model, LayerSettings(), entries)
    assert resolution.settings["stem"].bits_weights == 4
    assert resolution.unused == {}
    assert not caplog.messages


def test_the_example_of_the_documentation():
    overrides = OrderedDict(
        {
            "conv1": {
                "bits_weights": 8,
                "bits_activations": 8,
                "input_overrides": {"0": {"from_output": True}},
            },
            "conv2": {"clip_acts": "NONE", "input_overrides": {0: {"clip_acts": "AVG"}}},
        }
    )
    mode = {"activations": "ASYMMETRIC_UNSIGNED", "weights": "SYMMETRIC"}
    arguments = {"bits_activations": 6, "bits_weights": 6, "mode": mode, "clip_acts": "GAUSS"}
    defaults = update_settings(LayerSettings(), arguments, "quantizer")
    settings = resolve(make_small_model(), defaults, overrides).settings
    asymmetric, symmetric = LinearQuantMode.ASYMMETRIC_UNSIGNED, LinearQuantMode.SYMMETRIC
    assert settings["conv1"].mode == ModePair(asymmetric, symmetric)
    first = settings["conv1"].input_overrides[0]
    assert (first.bits_activations, first.mode, first.clip_acts) == (8, asymmetric, ClipMode.GAUSS)
    assert settings["conv2"].clip_acts is ClipMode.NONE
    second = settings["conv2"].input_overrides[0]
    assert (second.bits_activations, second.mode, second.clip_acts) == (6, asymmetric, ClipMode.AVG)
    assert settings["my_module.conv"].input_overrides == {}


@pytest.mark.parametrize("bits", [0, None])
def test_no_bits_are_float(bits):
    settings = update_settings(LayerSettings(), {"bits_activations": bits}, "here")
    assert settings.bits_activations is None


def test_no_quant_wins_over_no_clip():
    overrides = override_layers(no_clip=["conv1", "conv2"], no_quant=["conv1"])
    settings = resolve(
        make_small_model(), LayerSettings(clip_acts=ClipMode.AVG), overrides
    ).settings
    assert bits_of(settings["conv1"]) == {"acts": None, "wts": None, "bias": 32}
    assert settings["conv1"].clip_acts is ClipMode.AVG
    assert settings["conv2"].clip_acts is ClipMode.NONE
    assert settings["conv2"].bits_weights == 8


def test_fp16_is_fpq_module_16(caplog):
    settings = update_settings(LayerSettings(), {"fp16": True}, "override 'conv1'")
    assert settings.fpq_module == 16
    assert "override 'conv1': fp16 is deprecated; write fpq_module: 16" in caplog.text
    assert update_settings(LayerSettings(), {"fp16": False}, "here").fpq_module is None


REFUSED = [
    ("overrides is a plain dict", {"conv1": {}}, "OrderedDict"),
    ("override key 'acts','wts' or 'bias'", OrderedDict(conv1={"acts": 8}), "bits_activations"),
    ("override key 'acts','wts' or 'bias'", OrderedDict(conv1={"wts": 8}), "bits_weights"),
    ("override key 'acts','wts' or 'bias'", OrderedDict(conv1={"bias": 8}), "bits_bias"),
    (
        "unknown override argument",
        OrderedDict(conv1={"bits_wieghts": 8}),
        "bits_weights, bits_bias",
    ),
    (
        "unknown input_overrides key",
        OrderedDict(conv1={"input_overrides": {0: {"bits": 8}}}),
        "from_output: true, or some of bits_activations, mode, clip_acts, clip_n_stds",
    ),
    ("N_STD without clip_n_stds", OrderedDict(conv1={"clip_acts": "N_STD"}), "set clip_n_stds"),
    (
        "N_STD without clip_n_stds",
        OrderedDict(conv1={"input_overrides": {1: {"clip_acts": "N_STD"}}}),
        "input 1",
    ),
    ("n_stds <= 0", OrderedDict(conv1={"clip_n_stds": 0}), "a number above 0"),
    ("mode or clip string unknown", OrderedDict(conv1={"mode": "SYM"}), "SYMMETRIC_RESTRICTED"),
    ("mode or clip string unknown", OrderedDict(conv1={"clip_acts": "MEAN"}), "LAPLACE"),
    ("mode of another type", OrderedDict(conv1={"mode": 1}), "SYMMETRIC_RESTRICTED"),
    ("mode of another type", OrderedDict(conv1={"clip_acts": 1}), "LAPLACE"),
]


@pytest.mark.parametrize(("when", "overrides", "text"), REFUSED)
def test_errors_have_the_types_that_scripts_catch(when, overrides, text):
    with pytest.raises(ERRORS[when], match=re.escape(text)) as caught:
        resolve(make_small_model(), LayerSettings(), overrides)
    assert isinstance(caught.value, QdqError)


INVALID = [
    ({"bits_weights": 8.0}, "bits_weights is 8.0; expected a whole number up to 32"),
    ({"bits_weights": True}, "bits_weights is true"),
    ({"bits_activations": 33}, "bits_activations is 33"),
    ({"bits_bias": torch.tensor(8)}, "bits_bias is of type Tensor"),
    ({"per_channel_wts": "yes"}, "per_channel_wts is 'yes'; expected true or false"),
    ({"clip_n_stds": float("nan")}, "clip_n_stds is NaN"),
    ({"input_quantization_settings": {}}, "is the former name of input_overrides"),
    ({"scale_approx_mult_bits": 0}, "scale_approx_mult_bits is 0; expected a whole number from 1"),
    ({"fpq_module": 8}, "fpq_module is 8; expected 16, 32, 64 or null"),
    ({"fp16": True, "fpq_module": 16}, "fp16 and fpq_module are both set"),
    ({"input_overrides": [8]}, "input_overrides is a list of 1"),
    ({"input_overrides": {"-1": {"from_output": True}}}, "has the key -1"),
    ({"input_overrides": {0: {}}}, "input 0 is an object of 0 entries; expected from_output"),
    ({"input_overrides": {0: None}}, "input 0 is null"),
    ({"input_overrides": {0: {"from_output": True, "clip_acts": "AVG"}}}, "and clip_acts too"),
]


@pytest.mark.parametrize(("values", "text"), INVALID)
def test_invalid_values_are_named(values, text):
    with pytest.raises(ValueError, match=re.escape("override 'conv.*'")) as caught:
        resolve(make_small_model(), LayerSettings(), OrderedDict({"conv.*": values}))
    assert isinstance(caught.value, QdqError)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (OrderedDict({"conv(": {}}), "no regular expression"),
        (OrderedDict({"conv1": None}), "conv1 has the value None"),
        (OrderedDict({1: {}}), "override 1"),
    ],
)
def test_entries_that_are_none(overrides, text):
    with pytest.raises(QdqError, match=re.escape(text)):
        resolve(make_small_model(), LayerSettings(), overrides)


def test_only_allowed_keys():
    overrides = OrderedDict(conv1={"mode": "SYMMETRIC"})
    with pytest.raises(
        TypeError, match="'mode' is unknown; expected bits_activations, bits_weights"
    ):
        resolve(
            make_small_model(), LayerSettings(), overrides, ("bits_weights", "bits_activations")
        )

"""Configurations of quantizers in YAML: keys and defaults of Distiller, and what is refused."""

import enum
import inspect
import json
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import yaml
from damage import BOMB
from torch import nn

from qdq.distiller.files.config import read_post_training, read_quantizers, read_sections
from qdq.distiller.files.quantizer_classes import CLASSES, find_class, list_keys
from qdq.distiller.ranges.clipping import ClipMode
from qdq.distiller.ranges.modes import LinearQuantMode, ModePair
from qdq.distiller.settings.values import read_value
from qdq.errors import ArgumentError, DataError, QdqError

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
CASES = json.loads((GOLDEN / "distiller_yaml.json").read_text())["cases"]
EXAMPLE = """
quantizers:
  post_train_quantizer:
    class: PostTrainLinearQuantizer
    bits_activations: 8          # null or 0: float
    bits_parameters: 8
    bits_accum: 32
    mode: {activations: ASYMMETRIC_UNSIGNED, weights: SYMMETRIC}
    per_channel_wts: True
    clip_acts: AVG
    overrides:
      "0": {bits_weights: 6, bits_activations: 6, input_overrides: {0: {from_output: True}}}
      .*add: {bits_weights: 8, bits_activations: 8}
      "2": {clip_acts: NONE, input_overrides: {0: {clip_acts: AVG}}}
"""


def write(folder, content):
    path = folder / "quant.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def as_text(default):
    return default.name if isinstance(default, enum.Enum) else default


@pytest.mark.parametrize("key", ["clip_n_stds", "ema_decay", "act_clip_decay", "act_clip_init_val"])
def test_numbers_without_a_point_are_numbers(key):
    """YAML 1.1 has 2e-1 as text."""
    assert read_value(key, yaml.safe_load("2e-1"), "here") == 0.2
    for value in ("2e-1x", True, "nan", "inf", [0.2]):
        with pytest.raises(ArgumentError, match=f"^here: {key} is "):
            read_value(key, value, "here")


def read_keys(case):
    """The golden keys, which one class has by those of another."""
    if isinstance(case["keys"], dict):
        return case["keys"]
    assert case["keys"].startswith("as QuantAwareTrainRangeLinearQuantizer without quantize_inputs")
    (other,) = [row for row in CASES if row.get("class_") == "QuantAwareTrainRangeLinearQuantizer"]
    return {key: value for key, value in other["keys"].items() if key != "quantize_inputs"}


@pytest.mark.parametrize("name", CLASSES)
def test_keys_and_defaults_of_a_class(name):
    (case,) = [case for case in CASES if case.get("class_") == name]
    quantizer_class = find_class(name, "here")
    parameters = inspect.signature(quantizer_class).parameters
    defaults = {key: as_text(parameters[key].default) for key in list_keys(quantizer_class)}
    defaults.pop("freeze_bn_delay", None)  # the source folds BatchNorm outside of its files
    assert defaults == read_keys(case)


def test_the_example_builds_a_quantizer(tmp_path):
    config = read_post_training(write(tmp_path, EXAMPLE))
    assert isinstance(config.arguments["overrides"], OrderedDict)
    assert list(config.arguments["overrides"]) == ["0", ".*add", "2"]
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    quantizer = config.build(model)
    quantizer.prepare_model(torch.randn(2, 3))
    settings = quantizer.resolution.settings
    unsigned, symmetric = LinearQuantMode.ASYMMETRIC_UNSIGNED, LinearQuantMode.SYMMETRIC
    assert settings["0"].mode == ModePair(unsigned, symmetric)
    assert settings["0"].bits_weights == 6
    assert settings["0"].per_channel_wts
    assert settings["2"].bits_weights == 8
    assert settings["2"].clip_acts is ClipMode.NONE
    assert settings["2"].input_overrides[0].clip_acts is ClipMode.AVG
    assert list(quantizer.resolution.unused) == [".*add"]


def configure(**arguments):
    return {"quantizers": {"post": {"class": "PostTrainLinearQuantizer"} | arguments}}


REFUSED = [
    ({"quantizers": {"post": {"bits_activations": 8}}}, "quantizers.post has no class"),
    ({"quantizers": {"post": None}}, "quantizers.post has no class"),
    ({"quantizers": {"post": {"class": "os.system"}}}, "class is 'os.system'; expected PostTrain"),
    ({"quantizers": {"post": {"class": ["PACTQuantizer"]}}}, "class is a list of 1"),
    ({"quantizers": []}, "has 0 quantizers of the class PostTrainLinearQuantizer"),
    ({"quantizers": ["post"]}, "quantizers is a list of 1; expected names"),
    (configure(bits_weights=8), "'bits_weights' is unknown; expected bits_activations, bits_param"),
    (configure(model="net"), "'model' is unknown"),
    (configure(bits_overrides={}), "bits_overrides is the former name of overrides"),
    (configure() | {"pruners": {}}, "the section 'pruners' is unknown; expected version, quantiz"),
    ({"pruners": {}}, "is no configuration of quantizers"),
    ({"conv1": {"output": {}}}, "It is statistics, which belong to --qe-stats-file"),
    (
        {"conv1": {"bits_activations": 8}},
        "It is the settings of layers, such as layer_quant_params",
    ),
    ("- a\n", "is no configuration of quantizers. It is a list of 1"),
    ("quantizers: {", "is not YAML"),
    ("quantizers: !!python/name:os.system", "is not YAML"),
]


@pytest.mark.parametrize(("content", "text"), REFUSED)
def test_what_is_refused(tmp_path, content, text):
    with pytest.raises(QdqError) as caught:
        read_post_training(write(tmp_path, content))
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_keys_have_the_type_that_scripts_catch(tmp_path):
    with pytest.raises(TypeError):
        read_post_training(write(tmp_path, configure(bits=8)))
    with pytest.raises(ValueError, match="bits_activations is 'eight'"):
        read_post_training(write(tmp_path, configure(bits_activations="eight"))).build(nn.ReLU())


def test_several_quantizers_keep_their_names(tmp_path):
    post = {"class": "PostTrainLinearQuantizer"}
    content = {"version": 1, "quantizers": {"first": post, "second": dict(post)}}
    path = write(tmp_path, content)
    sections = read_sections(path)
    assert sections["policies"] == {}
    quantizers = read_quantizers(sections, "the file")
    assert list(quantizers) == ["first", "second"]
    assert quantizers["second"].place == "the file: quantizers.second"
    with pytest.raises(QdqError, match="has 2 quantizers"):
        read_post_training(path)


def test_a_file_that_is_absent():
    with pytest.raises(QdqError, match="cannot read absent"):
        read_post_training("absent.yaml")


ALIASES = """
quantizers:
  post_train_quantizer:
    class: PostTrainLinearQuantizer
    overrides:
      conv1: &eight {bits_weights: 8, bits_activations: 8}
      conv2: &six
        <<: *eight
        bits_weights: 6
        input_overrides: &inputs {0: {clip_acts: AVG}}
      conv3: *six
      conv4: {<<: [{clip_acts: NONE}, *six], bits_activations: 4}
      fc: {"input_overrides": *inputs}
"""


def test_aliases_and_merge_keys_are_those_of_yaml(tmp_path):
    sections = read_sections(write(tmp_path, ALIASES))
    expected = yaml.safe_load(ALIASES.replace("{0: ", '{"0": '))  # keys are text here
    assert sections["quantizers"] == expected["quantizers"]
    overrides = read_post_training(tmp_path / "quant.yaml").arguments["overrides"]
    assert overrides["conv4"] == {
        "bits_weights": 6,
        "bits_activations": 4,
        "clip_acts": "NONE",
        "input_overrides": {"0": {"clip_acts": "AVG"}},
    }
    overrides["conv2"]["input_overrides"]["0"]["clip_acts"] = "GAUSS"  # nothing is shared
    assert overrides["fc"]["input_overrides"]["0"]["clip_acts"] == "AVG"


MERGE_BOMB = "\n".join(
    f"  a{number}: &a{number} {{<<: [{', '.join([f'*a{number - 1}'] * 9)}]}}"
    for number in range(1, 12)
)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (f"{BOMB}\nquantizers: *a8\n", "stand for more than 131072 values"),
        (f"quantizers:\n  a0: &a0 {{x: 1}}\n{MERGE_BOMB}\n", "stand for more than"),
        ("quantizers: &x {a: *x}", "inside of its own value"),
        ("quantizers: &x {<<: *x}", "inside of its own value"),
        ("quantizers: {<<: 1}", "<< takes a mapping"),
        ("quantizers: {<<: [{a: 1}, 2]}", "<< takes a mapping"),
        ("quantizers: {a: *x}", "undefined alias"),
        ("quantizers: {a: 1, <<: {b: 1}, a: 2}", "'a' occurs twice"),
        ("quantizers: &x !!python/object/apply:os.getcwd []", "not YAML"),
    ],
)
def test_aliases_that_are_refused(tmp_path, content, text):
    with pytest.raises(DataError, match=text):
        read_sections(write(tmp_path, content))

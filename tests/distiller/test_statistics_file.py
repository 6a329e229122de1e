"""The YAML file of statistics: what is written is read, and other or damaged files are named."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from qdq.distiller.statistics.records import LayerStatistics, TensorRecord
from qdq.distiller.statistics.statistics_file import read_statistics, save_statistics
from qdq.distiller.statistics.two_passes import collect_quant_stats
from qdq.errors import QdqError

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
ERRORS = json.loads((GOLDEN / "distiller_errors.json").read_text())["cases"]
RECORD = {"min": -1.5, "max": 2.0, "avg_min": -1.0, "avg_max": 1.0, "mean": 0.25}
PUBLISHED = """conv1:
  inputs:
    0: {min: -2.1179, max: 2.64, avg_min: -2.0179, avg_max: 2.4849, mean: -0.0264, std: 1.1905, b: 1.0038,
        shape: "(256, 3, 224, 224)", total_numel: 376320000}
  output: {min: -37.17, max: 36.09, avg_min: -22.43, avg_max: 22.79, mean: -0.0002, std: 1.758, b: 1.0786,
           shape: "(256, 64, 112, 112)"}
"""


def write(folder, content):
    path = folder / "stats.yaml"
    path.write_text(
        content if isinstance(content, str) else yaml.safe_dump(json.loads(json.dumps(content)))
    )
    return path


def test_what_is_saved_is_read(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Bilinear(4, 4, 2))
    model.forward = lambda values: model[2](model[1](model[0](values)), model[0](values))
    statistics = collect_quant_stats(model, [torch.randn(5, 3), torch.randn(2, 3)])
    path = save_statistics(tmp_path / "acts_quantization_stats.yaml", statistics)
    assert read_statistics(path) == statistics
    assert list(statistics["2"].inputs) == [0, 1]
    content = yaml.safe_load(path.read_text())
    keys = ["min", "max", "avg_min", "avg_max", "mean", "std", "b", "shape", "total_numel"]
    assert list(content) == ["0", "1", "2"]
    assert list(content["0"]) == ["inputs", "output"]
    assert list(content["2"]["inputs"]) == [0, 1]
    assert list(content["0"]["output"]) == keys
    assert read_statistics(content) == statistics
    assert read_statistics(statistics) == statistics


def test_the_published_file(tmp_path):
    statistics = read_statistics(write(tmp_path, PUBLISHED))
    first = statistics["conv1"].inputs[0]
    assert (first.min, first.b, first.total_numel) == (-2.1179, 1.0038, 376320000)
    assert first.shape == "(256, 3, 224, 224)"
    assert statistics["conv1"].output == TensorRecord(
        -37.17, 36.09, -22.43, 22.79, -0.0002, 1.758, 1.0786, "(256, 64, 112, 112)"
    )


def test_other_keys_and_forms_of_numbers(tmp_path):
    text = "'1':\n  output: {min: -1e-05, max: 2, avg_min: 0, avg_max: 1, mean: 0.5, std: null, extra: [1]}\n"
    statistics = read_statistics(write(tmp_path, text))
    assert statistics == {"1": LayerStatistics({}, TensorRecord(-1e-05, 2.0, 0.0, 1.0, 0.5))}
    assert save_statistics(tmp_path / "again.yaml", statistics).read_text() == (
        "'1':\n  inputs: {}\n  output:\n    min: -1.0e-05\n    max: 2.0\n    avg_min: 0.0\n    avg_max: 1.0\n"
        "    mean: 0.5\n"
    )


def test_a_record_may_be_cut(tmp_path):
    statistics = read_statistics(write(tmp_path, PUBLISHED))
    cut = replace(statistics["conv1"].output, min=0.0)
    statistics["conv1"].output = cut
    assert (
        read_statistics(save_statistics(tmp_path / "cut.yaml", statistics))["conv1"].output == cut
    )


def test_a_record_needs_no_mean(tmp_path):
    ends = {"min": -1.5, "max": 2.0, "avg_min": -1.0, "avg_max": 1.0}
    statistics = read_statistics(write(tmp_path, {"conv1": {"output": ends}}))
    assert statistics["conv1"].output == TensorRecord(-1.5, 2.0, -1.0, 1.0)
    path = save_statistics(tmp_path / "again.yaml", statistics)
    assert read_statistics(path) == statistics


OTHER_FILES = [
    (
        {"conv1": {"bits_activations": 8, "mode": "SYMMETRIC"}, "linear_quant_params": {}},
        "the settings of layers, such as layer_quant_params.yaml",
    ),
    ({"conv1": {"bits_activations": 8}}, "the settings of layers"),
    ({"quantizers": {"post": {"class": "PostTrainLinearQuantizer"}}}, "a configuration"),
]


@pytest.mark.parametrize(("content", "text"), OTHER_FILES)
def test_another_file_of_distiller_is_recognised(tmp_path, content, text):
    with pytest.raises(QdqError, match=text) as caught:
        read_statistics(write(tmp_path, content))
    assert "give the acts_quantization_stats.yaml" in caught.value.fix


DAMAGED = [
    ("", "has no statistics: it is null"),
    ("[1, 2]", "has no statistics: it is a list of 2"),
    ("conv1: {inputs: {}", "is not YAML"),
    ("conv1: {}\n", "is damaged: conv1 has no output statistics"),
    ("conv1: !!python/object/apply:os.system ['true']", "is not YAML"),
    ({"conv1": {"output": None}}, "conv1.output is null; expected a record"),
    ({"conv1": {"output": {"min": 0, "max": 1}}}, "avg_min, avg_max missing"),
    ({"conv1": {"output": RECORD | {"min": 3}}}, "min 3.0 is above max 2.0"),
    (
        {"conv1": {"output": RECORD | {"min": "low"}}},
        "conv1.output.min is 'low'; expected a number",
    ),
    (
        {"conv1": {"output": RECORD | {"mean": True}}},
        "conv1.output.mean is true; expected a number",
    ),
    (
        {"conv1": {"output": RECORD | {"std": -1}}},
        "conv1.output.std is -1; expected a number of at",
    ),
    ({"conv1": {"output": RECORD | {"b": [1]}}}, "conv1.output.b is a list of 1"),
    (
        "conv1: {output: {min: .nan, max: 1, avg_min: 0, avg_max: 1, mean: 0}}",
        "nan is not a number",
    ),
    ({"conv1": {"output": RECORD, "inputs": [RECORD]}}, "conv1.inputs is a list of 1"),
    ({"conv1": {"output": RECORD, "inputs": {"first": RECORD}}}, "conv1.inputs is 'first'"),
    ({"a\x1b[31m": {"output": None}}, r"a\x1b[31m.output is null"),
]


@pytest.mark.parametrize(("content", "text"), DAMAGED)
def test_damaged_files_are_refused_in_one_line(tmp_path, content, text):
    with pytest.raises(QdqError, match=re.escape(text)) as caught:
        read_statistics(write(tmp_path, content))
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)


def read_names(path):
    """The layers of a file; None if it is refused."""
    try:
        return list(read_statistics(path))
    except QdqError:
        return None


def test_every_cut_off_file_is_read_or_refused(tmp_path):
    """A file that ends early is either refused, or has fewer layers or keys, never a traceback."""
    for size in range(0, len(PUBLISHED), 7):
        path = write(tmp_path, PUBLISHED[:size])
        if read_names(path) is not None:
            assert read_names(path) == ["conv1"]


@pytest.mark.parametrize(
    ("when", "source"),
    [
        ("statistics file does not exist", "absent.yaml"),
        ("statistics file does not exist", "a" * 5000),
        ("statistics file does not exist", "a\0"),
        ("statistics neither str nor dict", 8),
    ],
)
def test_errors_have_the_types_that_scripts_catch(when, source):
    error = next(case["error"] for case in ERRORS if case["when"] == when)
    with pytest.raises((ValueError, TypeError)) as caught:
        read_statistics(source)
    assert error in [base.__name__ for base in type(caught.value).__mro__]
    assert isinstance(caught.value, QdqError)


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(QdqError, match="cannot read"):
        read_statistics(tmp_path)
    with pytest.raises(QdqError, match="cannot write"):
        save_statistics(tmp_path, {})

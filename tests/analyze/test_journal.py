"""What a journal knows is used only for the model that it was measured on."""

import re

import numpy as np
import pytest
import torch
from torch import nn

from qdq import analyze_layers, calibrate_model, enable_quantization, swap_modules


class Chain(nn.Module):
    """Its forward depends on what no state_dict holds."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(32, 32) for _ in range(3))
        self.activation = torch.relu
        self.scale = 1.0
        self.factor = torch.ones(32)  # no buffer

    def forward(self, x):
        x = self.second(torch.relu(self.first(x))) * self.factor
        return self.third(self.activation(x) * self.scale)


@pytest.fixture
def chain():
    model, batches = Chain().eval(), [torch.randn(8, 32) for _ in range(2)]
    swap_modules(model, batches[0], include=["*"])
    calibrate_model(model, batches, method="max")
    return model, batches


@pytest.mark.parametrize(
    ("name", "value"),
    [("activation", torch.sin), ("scale", 1.001), ("factor", torch.linspace(-1, 3, 32))],
)
def test_another_forward_is_another_model(chain, tmp_path, name, value):
    model, batches = chain
    path = tmp_path / "analysis.jsonl"
    first = analyze_layers(model, batches, path=path, max_float_layers=1, max_float_share=1)
    enable_quantization(model)
    setattr(model, name, value)
    fresh = analyze_layers(model, batches)
    assert fresh.layers != first.layers
    for _ in range(2):  # what was forgotten stays forgotten
        assert analyze_layers(model, batches, path=path) == fresh


@pytest.mark.parametrize("mode", ["one-at-a-time", "leave-one-out"])
def test_another_function_of_the_same_name(chain, tmp_path, mode):
    model, batches = chain
    path = tmp_path / "analysis.jsonl"
    functions = [
        lambda m: float(m(batches[0]).abs().mean()),
        lambda m: 100 + float(m(batches[0]).std()),
    ]
    for function in functions:
        expected = analyze_layers(model, batches, metric=function, mode=mode)
        assert analyze_layers(model, batches, metric=function, mode=mode, path=path) == expected


@pytest.mark.parametrize(
    "value",
    [
        '"abc"',
        "[[1]]",
        "{}",
        "[[null, 1]]",
        "5",
        "[[NaN, 1]]",
        "[[1, 2]]",
        "1" + "0" * 400,
        "[[1], [1, 2]]",
    ],
)
def test_lines_of_another_form_are_not_read(chain, tmp_path, value):
    model, batches = chain
    path = tmp_path / "analysis.jsonl"
    expected = analyze_layers(model, batches, path=path)
    lines = path.read_text().splitlines()
    changed = [re.sub(r'"value": .*(?=\}$)', f'"value": {value}', line) for line in lines]
    path.write_text("\n".join(["[1]", "5", "null", *changed]) + "\n")
    assert analyze_layers(model, batches, path=path) == expected
    assert len(path.read_text().splitlines()) == 3 + 2 * len(lines)


@pytest.mark.parametrize("value", ['"abc"', "[[1]]", "NaN", "true"])
def test_values_of_a_function_of_another_form_are_not_read(chain, tmp_path, value):
    model, batches = chain
    path = tmp_path / "analysis.jsonl"
    options = {"metric": lambda m: float(m(batches[0]).abs().mean()), "path": path}
    expected = analyze_layers(model, batches, **options)
    text = re.sub(r'("metric"\], "value": )[^}]*', rf"\g<1>{value}", path.read_text())
    assert text != path.read_text()
    path.write_text(text)
    assert analyze_layers(model, batches, **options) == expected


def test_any_flipped_bit_is_measured_again(chain, tmp_path, caplog):
    model, batches = chain
    path = tmp_path / "analysis.jsonl"
    expected = analyze_layers(model, batches, path=path)
    sound = path.read_bytes()
    random = np.random.default_rng(0)
    for place in random.choice(len(sound), 60, replace=False):
        damaged = bytearray(sound)
        damaged[place] ^= 1 << random.integers(8)
        path.write_bytes(damaged)
        assert analyze_layers(model, batches, path=path) == expected
    # A value that looks as good.
    path.write_text(re.sub(r'"value": \[\[\d', '"value": [[7', sound.decode(), count=1))
    caplog.clear()
    assert analyze_layers(model, batches, path=path) == expected
    (record,) = caplog.records
    assert "1 lines are damaged" in record.getMessage()
    caplog.clear()
    # What was measured again replaces the line.
    assert analyze_layers(model, batches, path=path) == expected
    assert not caplog.records


def test_lines_of_a_version_without_checksums_are_measured_again(chain, tmp_path, caplog):
    model, batches = chain
    path = tmp_path / "analysis.jsonl"
    expected = analyze_layers(model, batches, path=path)
    lines = path.read_text().splitlines()
    path.write_text("".join(re.sub(r', "checksum": "\w+"', "", line) + "\n" for line in lines))
    assert analyze_layers(model, batches, path=path) == expected
    assert len(path.read_text().splitlines()) == 2 * len(lines)
    assert f"{len(lines)} lines are damaged or of an earlier version" in caplog.text


def test_a_path_with_brackets(chain, tmp_path):
    model, batches = chain
    path = tmp_path / "j[1]" / "a[2].jsonl"
    expected = analyze_layers(model, batches, path=path)
    size = path.stat().st_size
    assert analyze_layers(model, batches, path=path) == expected
    assert path.stat().st_size == size  # all of it was read


def test_an_empty_last_batch(chain):
    model, batches = chain
    assert analyze_layers(model, [*batches, torch.empty(0, 32)]) == analyze_layers(model, batches)

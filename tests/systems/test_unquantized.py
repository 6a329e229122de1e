"""`list_unquantized`: which layers and calls, with which reason."""

import pytest
import torch
from torch import nn

from qdq.systems import duplicate_model_with_quant, list_unquantized


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.body = nn.Sequential(nn.Conv1d(4, 4, 1), nn.Linear(9, 9), nn.ReLU())
        self.norm = nn.LayerNorm(9)
        self.pool = nn.MaxPool2d(1)

    def forward(self, x):
        x = self.pool(self.stem(x)).flatten(2)
        y = self.body(x)
        x = torch.cat([x, y]) + 1
        x += self.norm(x)
        return torch.relu(x).mean(1).add(1)


def test_layers_and_calls():
    model = duplicate_model_with_quant(Network().eval(), 8)
    report = list_unquantized(model)
    entries = [(entry.name, entry.kind, entry.reason) for entry in report.entries]
    unknown = "no quantizer is defined for this class"
    assert entries == [
        ("stem", "Conv2d", "outside a Sequential"),
        ("body.0", "Conv1d", unknown),
        ("norm", "LayerNorm", unknown),
        ("cat", "cat", "a function call"),
        ("add", "add", "a function call"),
        ("add_1", "add", "a function call"),
        ("mean", "mean", "a function call"),
        ("add_2", "add", "a function call"),
    ]
    assert report.format_table().splitlines() == [
        "8 layers and calls have no quantizer, their results stay float",
        "  1 Conv2d (stem): outside a Sequential",
        f"  1 Conv1d (body.0): {unknown}",
        f"  1 LayerNorm (norm): {unknown}",
        "  1 cat (cat): a function call",
        "  3 add (add, add_1, add_2): a function call",
        "  1 mean (mean): a function call",
    ]


def test_a_model_that_cannot_be_traced():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x):
            return self.fc(x) + 1 if x.sum() > 0 else x

    report = list_unquantized(Branches())
    assert [entry.name for entry in report.entries] == ["fc"]
    assert "function calls are not listed: torch.fx cannot trace" in report.format_table()


def test_a_float_model():
    report = list_unquantized(nn.Sequential(nn.Linear(3, 3)))
    assert report.entries[0].reason == "put in without a quantizer"


def test_not_a_module():
    with pytest.raises(TypeError):
        list_unquantized(3)

"""What a fingerprint depends on, and that one trace serves units, costs and fingerprint."""

import pytest
import torch
from torch import nn

import qdq.analyze
import qdq.analyze.cost
import qdq.units
from qdq import analyze_layers, calibrate_model, rewire_operations, swap_modules
from qdq.analyze.cost import trace_costs
from qdq.analyze.fingerprint import fingerprint_analysis
from qdq.forward import trace_forward
from qdq.quantizer import disable_quantization
from qdq.units import find_units


class Residual(nn.Module):
    """A shortcut, so that units need the data flow, and a product that costs count."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = torch.relu(self.first(x))
        x = x + self.second(x)
        return self.head(x.mean((2, 3)))


@pytest.fixture
def rewired():
    model, batches = Residual().eval(), [torch.randn(2, 3, 8, 8) for _ in range(2)]
    swap_modules(model, batches[0], include=["*"])
    rewire_operations(model, batches[0])
    calibrate_model(model, batches, method="max")
    return model, batches


@pytest.mark.parametrize("options", [{}, {"gpu": "orin"}, {"metric": "kl", "confirm": 1}])
def test_the_model_is_traced_once(rewired, monkeypatch, options):
    model, batches = rewired
    traces = []

    def count_trace(*arguments):
        traces.append(trace_forward(*arguments))
        return traces[-1]

    for module in (qdq.work, qdq.units):
        monkeypatch.setattr(module, "trace_forward", count_trace)
    analysis = analyze_layers(model, batches, max_float_layers=1, max_float_share=1, **options)
    assert len(analysis.layers) == 3  # the shortcut belongs to `second`
    assert len(traces) == 1


def fingerprint(model, batches, trace=None, metric="sqnr"):
    if trace is None:
        with disable_quantization(model):
            trace = trace_forward(model, batches[0])
    units = find_units(model, batches[0], trace)
    return fingerprint_analysis(model, trace, batches, metric, units)


def test_it_is_the_same_with_and_without_costs(rewired):
    """A journal continues when a GPU is asked for."""
    model, batches = rewired
    trace, costs = trace_costs(model, batches[0])
    assert costs[""].macs > 0
    assert fingerprint(model, batches, trace) == fingerprint(model, batches)


def test_it_changes_with_all_that_is_measured(rewired):
    model, batches = rewired
    fingerprints = [
        fingerprint(model, batches),
        fingerprint(model, batches, metric="kl"),
        fingerprint(model, batches[:1]),
    ]
    model.head.input_quantizer.amax = model.head.input_quantizer.amax * 2
    fingerprints.append(fingerprint(model, batches))
    model.head.input_quantizer.is_enabled = False
    fingerprints.append(fingerprint(model, batches))
    model.head.bias.data += 1
    fingerprints.append(fingerprint(model, batches))
    assert len(set(fingerprints)) == len(fingerprints)

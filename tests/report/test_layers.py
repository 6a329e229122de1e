"""Records of layers against what the network, its data and the engine say themselves."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import qdq
from qdq.check import Coverage
from qdq.files import to_jsonable
from qdq.nn import QuantInputMixin
from qdq.quantizer import disable_quantization, named_quantizers
from qdq.report.layers import NO_STATISTICS, describe_layers
from qdq.report.load import load_report
from qdq.report.page import layers_in, list_figures, render_report
from qdq.report.records import LayerRecord
from qdq.report.tables import list_skipped
from qdq.schema import validate

pytestmark = pytest.mark.trt
NO_BUILD = qdq.BuildReport(
    onnx=None,
    engine=None,
    engine_bytes=0,
    backend="rtx",
    backend_version="",
    sm=89,
    seconds=0.0,
    profiles={},
    layers=[],
    coverage=Coverage(()),
    attention=[],
    trtexec={},
    warnings=[],
)


def describe(stages, **changes):
    arguments = {
        "plan": stages["plan"],
        "rewired": stages["rewired"],
        "ranges": stages["ranges"],
        "analysis": stages["analysis"],
        "build": stages["build"],
        "statistics": None,
        **changes,
    }
    records = describe_layers(
        stages["workload"].module, stages["workload"].calibration.images, **arguments
    )
    return {layer.name: layer for layer in records}


@pytest.fixture(scope="module")
def layers(finished):
    return {layer.name: layer for layer in load_report(finished[0]).layers}


def decibels(expected, quantized):
    expected = np.asarray(expected.detach(), np.float64)
    quantized = np.asarray(quantized.detach(), np.float64)
    return 10 * math.log10((expected**2).sum() / ((expected - quantized) ** 2).sum())


def test_order_and_neighbours(layers):
    edges = {name: (layer.reads, layer.feeds) for name, layer in layers.items()}
    assert edges == {
        "stem": ((), ("conv", "add")),
        "conv": (("stem",), ("add",)),
        "add": (("conv", "stem"), ("conv2d",)),
        "conv2d": (("add",), ("pool",)),
        "pool": (("conv2d",), ("hidden",)),
        "hidden": (("pool",), ("head",)),
        "head": (("hidden",), ()),
    }
    assert list(layers) == list(edges)
    assert [name for name, layer in layers.items() if layer.reads_input] == ["stem"]
    assert [name for name, layer in layers.items() if layer.writes_output] == ["head"]


def test_precision_is_that_of_the_quantizers_and_of_the_engine(finished, layers):
    model = finished[1]["workload"].module
    modules = dict(model.named_modules())
    for name, layer in layers.items():
        module = modules.get(name)
        if isinstance(module, QuantInputMixin):
            is_on = module.input_quantizer.is_enabled
            assert (layer.precision == "int8") == is_on == layer.tensors[0].is_on, name
        if layer.engine is not None:
            assert layer.engine == layer.precision, name
            assert layer.kernels, name
    (step,) = finished[1]["analysis"].steps
    assert layers[step.layer].precision == "float"
    assert {layer.precision for layer in layers.values()} == {"int8", "float"}


def test_reasons(finished, layers):
    (step,) = finished[1]["analysis"].steps
    assert layers[step.layer].reason.startswith(
        "step 1 of 1 of the search left it in float: SQNR of the outputs "
    )
    assert layers["hidden"].reason == "pinned to int8 by the plan"
    assert layers["head"].reason == "excluded by 'head'"
    assert layers["pool"].rules == ("R-GAP",)
    assert "R-ADD-1" in layers["add"].rules or layers["add"].precision == "float"
    int8_name = next(name for name in ("stem", "conv", "conv2d") if name != step.layer)
    assert (
        "in sensitivity (measured); the search ended: 1 of at most 1 layers are in float"
        in layers[int8_name].reason
    )


def test_reasons_of_what_was_passed_over(finished):
    """The step took the least sensitive unit: what stands before it did not fit, or cost too much."""
    analysis = finished[1]["analysis"]
    *first, last = sorted(analysis.layers, key=lambda unit: unit.name == analysis.steps[0].layer)

    def explain(**changes):
        units = (replace(first[0], **changes), *first[1:], last)
        records = describe(
            finished[1],
            analysis=replace(analysis, layers=units, mode=changes.pop("mode", analysis.mode)),
        )
        return records[first[0].name].reason

    start = f"rank 1 of {len(analysis.layers)} in sensitivity (measured), but passed over for less sensitive ones: "
    assert explain().endswith(start + "it did not fit the limits")
    assert explain(cost=12.5).endswith(
        "they gain more per microsecond (this one costs 12.5), or it did not fit the limits"
    )
    both = (first[0].name, first[1].name)
    assert explain(layers=both).endswith(": with its 2 layers it did not fit the limits")


def test_what_the_metric_of_the_user_says(finished):
    analysis = finished[1]["analysis"]
    (step,) = analysis.steps
    units = tuple(replace(unit, metric=0.25, cost=3.5) for unit in analysis.layers)
    records = describe(
        finished[1],
        analysis=replace(
            analysis,
            metric_name="mAP",
            metric=0.125,
            steps=(replace(step, metric=0.5),),
            layers=units,
        ),
    )
    reason = records[step.layer].reason
    assert reason.startswith(
        "step 1 of 1 of the search left it in float: mAP of the outputs 0.125 -> 0.5, SQNR of the "
    )
    assert (
        records[step.layer].sensitivity.metric == 0.25
        and records[step.layer].sensitivity.cost == 3.5
    )


def test_a_call_in_float_says_which_layer_it_goes_with(finished):
    stages = finished[1]
    model = stages["workload"].module
    quantizers = dict(named_quantizers(model))
    states = {name: quantizer.is_enabled for name, quantizer in quantizers.items()}
    try:
        for name in ("conv._input_quantizer", "conv._weight_quantizer", "_add_quantizer"):
            quantizers[name].is_enabled = False
        analysis = replace(stages["analysis"], steps=())
        records = describe(stages, analysis=analysis)
    finally:
        for name, state in states.items():
            quantizers[name].is_enabled = state
    assert records["add"].reason == "it exists only for conv, which is in float"
    assert records["conv"].reason == "its quantizers are switched off"


def test_weights_are_measured_exactly(finished, layers):
    conv = finished[1]["workload"].module.conv
    amax = conv.weight.detach().double().abs().amax((1, 2, 3), keepdim=True)
    scale = amax / 127
    expected = (conv.weight.double() / scale).round().clamp(-128, 127) * scale
    weight = layers["conv"].tensor("weight")
    assert weight.sqnr_db == pytest.approx(decibels(conv.weight, expected), abs=0.01)
    assert (weight.ranges, weight.clipped) == (32, 0.0)
    assert weight.amax == pytest.approx(float(amax.max()))
    assert weight.least_amax == pytest.approx(float(amax.min()))
    assert layers["conv"].weights == 32 * 32 * 9
    assert layers["conv"].weight_bytes == 32 * 32 * 9 * (
        1 if layers["conv"].precision == "int8" else 4
    )
    assert layers["head"].weight_bytes == 4 * 32 * 16


def test_activations_are_measured_on_the_calibration_data(finished, layers):
    stages = finished[1]
    model, inputs = stages["workload"].module, []
    hook = model.conv.register_forward_pre_hook(
        lambda _, arguments: inputs.append(arguments[0].double())
    )
    with disable_quantization(model), torch.no_grad():
        model(stages["workload"].calibration.images)
    hook.remove()
    record = layers["conv"].tensor("input")
    scale = record.amax / 127
    quantized = (inputs[0] / scale).round().clamp(-128, 127) * scale
    assert record.sqnr_db == pytest.approx(decibels(inputs[0], quantized), abs=0.1)
    assert record.clipped == pytest.approx(
        float((inputs[0].abs() > record.amax).double().mean()), abs=2e-4
    )
    # Which reads the same tensor; it was collected at both.
    assert record.shares == ("_add_quantizer",)
    assert sum(record.histogram) == 2 * int((inputs[0] != 0).sum())
    assert 2 <= len(record.histogram) <= 64
    counts, _ = np.histogram(
        inputs[0].abs()[inputs[0] != 0], bins=len(record.histogram), range=(0, record.histogram_end)
    )
    assert np.abs(2 * counts - record.histogram).sum() <= 8  # float32 against float64 on an edge
    statistics = qdq.Statistics.load(finished[0] / "calibration.safetensors")
    assert {method: choice.amax for method, choice in record.methods.items()} == {
        method: pytest.approx(statistics.solve("conv._input_quantizer", method))
        for method in record.methods
    }
    assert len(record.methods) == 9


def test_output_of_a_layer_by_itself(finished, layers):
    stages = finished[1]
    conv = stages["workload"].module.conv
    inputs = torch.relu(
        torch.nn.functional.conv2d(
            stages["workload"].calibration.images[:4],  # the first batch
            stages["workload"].module.stem.weight,
            stages["workload"].module.stem.bias,
            padding=1,
        )
    )
    ranges = {record.role: record for record in layers["conv"].tensors}
    scale = ranges["input"].amax / 127
    rounded = (inputs.double() / scale).round().clamp(-128, 127) * scale
    weight_scale = conv.weight.double().abs().amax((1, 2, 3), keepdim=True) / 127
    weight = (conv.weight.double() / weight_scale).round().clamp(-128, 127) * weight_scale
    bias = conv.bias.double()
    expected = torch.nn.functional.conv2d(inputs.double(), conv.weight.double(), bias, padding=1)
    quantized = torch.nn.functional.conv2d(rounded, weight, bias, padding=1)
    assert layers["conv"].output_sqnr_db == pytest.approx(decibels(expected, quantized), abs=0.05)


def test_macs(layers):
    expected = {
        "stem": 144 * 32 * 27,
        "conv": 144 * 32 * 32 * 9,
        "conv2d": 144 * 32 * 32,
        "hidden": 1024,
        "head": 512,
    }
    assert {name: layers[name].macs for name in expected} == expected
    assert sum(layer.macs_share or 0 for layer in layers.values()) == pytest.approx(1)


def test_calls_with_weights_are_layers_with_weights(finished, layers):
    """The module around `F.conv2d(x, self.mix)` is none, and was not missed: its only product was decided."""
    report = load_report(finished[0])
    weighted = {name: layer.weights for name, layer in layers.items() if layer.weights}
    assert weighted == {"stem": 864, "conv": 9216, "conv2d": 1024, "hidden": 1024, "head": 512}
    assert layers["conv2d"].weight_bytes == 1024 * (
        1 if layers["conv2d"].precision == "int8" else 4
    )
    summary = report.data["summary"]
    assert (
        summary["weighted_layers"],
        summary["weighted_layers_swapped"],
        summary["missed_modules"],
    ) == (5, 4, [])
    assert (
        layers_in(report, "int8") == sum(layers[name].precision == "int8" for name in weighted) == 3
    )
    assert list_figures(report)[0].value == "3 of 5"
    assert "3 of 5 layers with weights are int8" in render_report(report)
    assert [module.name for module in finished[1]["plan"].of("missed")] == [""]
    assert not [row for row in list_skipped(report) if row.stage == "swap" and row.is_bad]
    text = (finished[0] / "report.txt").read_text()
    assert "missed: 0" in text
    plan = finished[1]["plan"]  # the work of the call counts
    assert f"{plan.share_of(plan.of('quantize')):.1%} of all MACs in quantized layers" in text
    with pytest.raises(
        qdq.ArgumentError,
        match=r"the model is a Branches that is represented by its calls.* choose one of .*conv2d",
    ):
        qdq.explain_layer(finished[0], "")


def test_a_module_with_one_product_out_of_reach_is_missed_still():
    """Of two products with its weights the rewiring decides about one; a layer read around its forward has one."""

    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.mix, self.sum = (torch.nn.Parameter(torch.randn(32, 32)) for _ in range(2))
            self.inner, self.first = torch.nn.Linear(32, 32), torch.nn.Linear(32, 32)

        def forward(self, x):
            x = self.first(x)
            x = torch.nn.functional.linear(x, self.mix) + torch.nn.functional.linear(
                x, self.inner.weight
            )
            return torch.nn.functional.conv_transpose1d(x[..., None], self.sum[..., None])[..., 0]

    model, batch = Odd().eval(), torch.randn(4, 32)
    plan = qdq.swap_modules(model, batch)
    rewired = qdq.rewire_operations(model, batch)
    assert {module.name for module in plan.of("missed")} == {"", "inner"}
    analysis = qdq.Analysis("one-at-a-time", 4, 30.0, None, (), (), "nothing was asked for")
    records = describe_layers(
        model,
        batch,
        plan=plan,
        rewired=rewired,
        ranges=qdq.calibrate_model(model, [batch]),
        analysis=analysis,
        build=NO_BUILD,
        statistics=None,
    )
    assert [(layer.name, layer.weights) for layer in records if layer.weights] == [
        ("first", 1024),
        ("linear", 1024),
        ("linear_1", 1024),
        ("", 2048),
    ]


def test_nothing_is_blank_without_a_reason(finished, layers):
    without_statistics = describe(finished[1]).values()
    for layer in [*layers.values(), *without_statistics]:
        for field in ("sensitivity", "output_sqnr_db", "macs", "engine"):
            assert getattr(layer, field) is not None or layer.unknown[field], (layer.name, field)
        assert layer.tensors or layer.unknown["tensors"]
        for tensor in layer.tensors:
            for field in ("amax", "sqnr_db", "clipped"):
                assert getattr(tensor, field) is not None or tensor.unknown[field], (
                    tensor.quantizer,
                    field,
                )
            assert tensor.methods or tensor.unknown["methods"]
            assert tensor.histogram or tensor.unknown["histogram"]
    inputs = [layer.tensor("input") for layer in without_statistics if layer.tensors]
    assert {tensor.unknown["histogram"] for tensor in inputs} == {NO_STATISTICS}


def test_describing_changes_nothing(finished):
    stages = finished[1]
    model = stages["workload"].module.train()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    states = {name: quantizer.is_enabled for name, quantizer in named_quantizers(model)}
    hooks = [len(module._forward_hooks) for module in model.modules()]
    describe(stages)
    assert model.training and all(module.training for module in model.modules())
    model.eval()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert {name: quantizer.is_enabled for name, quantizer in named_quantizers(model)} == states
    assert [len(module._forward_hooks) for module in model.modules()] == hooks


def test_a_gpu_gives_the_figures_of_the_cpu(residual, images, gpu):
    """TF32, which is on, would change the errors of convolutions."""
    plan = qdq.swap_modules(residual, images)
    rewired = qdq.rewire_operations(residual, images)
    arguments = {
        "plan": plan,
        "rewired": rewired,
        "ranges": qdq.calibrate_model(residual, [images]),
        "analysis": qdq.Analysis("one-at-a-time", 4, 30.0, None, (), (), "nothing was asked for"),
        "build": NO_BUILD,
        "statistics": None,
    }
    expected = describe_layers(residual, images, **arguments)
    records = describe_layers(residual.to(gpu), images, **arguments)
    for record, twin in zip(records, expected, strict=True):
        assert record.output_sqnr_db == pytest.approx(twin.output_sqnr_db, abs=0.01)
        assert [tensor.sqnr_db for tensor in record.tensors] == pytest.approx(
            [tensor.sqnr_db for tensor in twin.tensors], abs=0.01
        )


def test_a_layer_that_does_not_run_and_one_without_range():
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 3), torch.nn.ReLU(), torch.nn.Conv2d(16, 16, 3)
    ).eval()
    model.spare = torch.nn.Conv2d(16, 16, 3)
    model.forward = lambda images: model[2](model[1](model[0](images)) * 0)
    batch = torch.randn(2, 3, 8, 8)
    plan = qdq.swap_modules(model, include=["*"])
    rewired = qdq.rewire_operations(model, batch)
    ranges = qdq.calibrate_model(model, [batch])
    analysis = qdq.Analysis("one-at-a-time", 2, 30.0, None, (), (), "nothing was asked for")
    records = describe_layers(
        model,
        batch,
        plan=plan,
        rewired=rewired,
        ranges=ranges,
        analysis=analysis,
        build=NO_BUILD,
        statistics=None,
    )
    records = {layer.name: layer for layer in records}
    assert list(records)[-1] == "spare"
    assert records["spare"].precision == "float"
    assert "saw no batch" in records["spare"].reason
    assert records["spare"].unknown["neighbours"] == "it does not run on the example"
    assert records["2"].reason == "left in float: it saw zeros only"
    assert records["2"].unknown["output_sqnr_db"] == "it has no range"
    assert records["0"].engine is None and records["0"].unknown["engine"]


def test_records_survive_json(layers):
    for layer in layers.values():
        assert validate(LayerRecord, to_jsonable(layer), "report.json", "") == layer

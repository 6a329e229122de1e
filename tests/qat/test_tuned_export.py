"""What was fine-tuned is exported as what was only calibrated."""

import copy

import pytest
import torch

import qdq
from qdq.quantize import quantize_codes


def make_batches(count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(8, 3, 12, 12, generator=generator) for _ in range(count)]


def graph_of(path):
    """Operators with the shapes of their constants, in order."""
    import onnx

    graph = onnx.load(path).graph
    shapes = {constant.name: tuple(constant.dims) for constant in graph.initializer}
    return [
        (node.op_type, node.name, [shapes.get(name) for name in node.input]) for node in graph.node
    ]


def prepare(model, images, *, fold):
    if fold:
        qdq.fold_batchnorm(model, images)
    qdq.swap_modules(model, images)
    qdq.rewire_operations(model, images)
    qdq.calibrate_model(model, make_batches(2))
    return model


@pytest.mark.parametrize("ranges", ["frozen", "lsq"])
@pytest.mark.parametrize("live", [False, True])
def test_the_graph_is_that_of_a_calibrated_model(residual, images, tmp_path, ranges, live):
    calibrated = prepare(copy.deepcopy(residual), images, fold=True)
    tuned = prepare(residual, images, fold=not live)
    qdq.finetune(tuned, make_batches(4), schedule=qdq.Schedule(steps=8, lr=1e-4), ranges=ranges)
    if live:
        (pair,) = qdq.fold_batchnorm(tuned, images)
        assert pair.folded, pair.reason
    reports = [
        qdq.export_onnx(model, images, tmp_path / f"{name}.onnx")
        for name, model in (("calibrated", calibrated), ("tuned", tuned))
    ]
    assert graph_of(reports[0].path) == graph_of(reports[1].path)
    assert reports[0].layers == reports[1].layers
    found, expected = qdq.predict(reports[1].path, [images]), qdq.predict(tuned, [images])
    assert qdq.check_onnx(reports[1].path, expected=expected, found=found).problems == ()


def test_folding_after_fine_tuning_keeps_the_codes(residual, images):
    tuned = prepare(residual, images, fold=False)
    # A negative factor turns the codes around.
    torch.nn.init.constant_(residual.norm.weight[:3], -0.7)
    qdq.finetune(tuned, make_batches(3), schedule=qdq.Schedule(steps=6))
    gain = tuned.norm.weight.detach()

    def codes():
        quantizer = tuned.stem.weight_quantizer
        return quantize_codes(
            tuned.stem.weight.detach(), quantizer.scale.flatten(), quantizer.format, 0
        )

    before, expected = codes(), tuned(images)
    qdq.fold_batchnorm(tuned, images)
    sign = gain.sign().reshape(-1, 1, 1, 1)
    different = codes() != before * sign
    assert (before[different].abs() >= 127).all()  # -128 has no counterpart
    assert torch.allclose(tuned(images), expected, atol=1e-3)


def test_four_bits_stay_a_simulation(residual, images, tmp_path):
    qdq.fold_batchnorm(residual, images)
    qdq.swap_modules(residual, images, weight_desc=qdq.QuantDescriptor(4, axis=0))
    qdq.calibrate_model(residual, make_batches(2))
    qdq.finetune(residual, make_batches(2), schedule=qdq.Schedule(steps=2))
    with pytest.raises(qdq.ExportError, match=r"cannot be written for TensorRT: .*4") as error:
        qdq.export_onnx(residual, images, tmp_path / "model.onnx")
    assert "8 bit" in error.value.fix
    assert not list(tmp_path.iterdir())

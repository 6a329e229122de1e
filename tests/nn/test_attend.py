"""Attention that is written out, against `F.scaled_dot_product_attention` in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qdq
from qdq.build import build_engine
from qdq.check.parity import OnnxModel
from qdq.nn.attend import KEY, QUERY, SOFTMAX, VALUE, attend

OFF = {operand: nn.Identity() for operand in (QUERY, KEY, VALUE, SOFTMAX)}
DIAGONAL = torch.eye(16, dtype=torch.bool)
BOOLEAN = torch.ones(5, 7, dtype=torch.bool).tril(2)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale": 0.3},
        {"is_causal": True},
        {"attn_mask": BOOLEAN},
        {"attn_mask": torch.randn(2, 1, 5, 7, dtype=torch.float64)},
        {"enable_gqa": True},
    ],
    ids=["plain", "scale", "causal", "boolean mask", "float mask", "groups"],
)
def test_equals_the_function_of_torch(options):
    num_key_heads = 2 if "enable_gqa" in options else 4
    query = torch.randn(2, 4, 5, 8, dtype=torch.float64)
    key, value = torch.randn(2, 2, num_key_heads, 7, 8, dtype=torch.float64)
    expected = F.scaled_dot_product_attention(query, key, value, **options)
    torch.testing.assert_close(attend(OFF, query, key, value, **options), expected)


@pytest.mark.parametrize(
    "mask", [BOOLEAN & (torch.arange(5) != 2)[:, None], BOOLEAN[:1] & False], ids=["row", "all"]
)
@pytest.mark.parametrize("is_boolean", [True, False])
def test_a_query_that_sees_no_key_is_zero(mask, is_boolean, tmp_path):
    """In torch as in `F.scaled_dot_product_attention`, and in ONNX Runtime as in torch."""
    query = torch.randn(2, 4, 5, 8, dtype=torch.float64)
    key, value = torch.randn(2, 2, 4, 7, 8, dtype=torch.float64)
    if not is_boolean:
        mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -math.inf)
    expected = F.scaled_dot_product_attention(query, key, value, mask)
    assert (expected == 0).all(-1).any()
    torch.testing.assert_close(attend(OFF, query, key, value, mask), expected)

    class Masked(nn.Module):
        def forward(self, query, key, value, mask):
            return F.scaled_dot_product_attention(query, key, value, mask)

    mask = mask if is_boolean else mask.float()
    batch = {"query": query.float(), "key": key.float(), "value": value.float(), "mask": mask}
    model = Masked().eval()
    qdq.rewire_operations(model, batch, formats=("fp8",))
    qdq.calibrate_model(model, [batch], method="max")
    torch.testing.assert_close(model(**batch), expected.float(), atol=0.3, rtol=0.1)
    for precision in ("fp32", "fp16"):
        path = tmp_path / f"{precision}.onnx"
        qdq.export_onnx(model, batch, path, precision=precision, dynamic_batch=False)
        (outputs,) = OnnxModel(path)(*(tensor.numpy() for tensor in batch.values()))
        torch.testing.assert_close(torch.from_numpy(outputs), model(**batch), atol=0.05, rtol=0.01)


def test_dropout_drops_weights():
    query = key = torch.zeros(1, 4, 8)
    outputs = attend(OFF, query, key, torch.ones(1, 4, 8), dropout_p=0.5)
    assert not torch.allclose(outputs, torch.ones(1, 4, 8))


class Attention(nn.Module):
    """Self-attention in one of three ways."""

    def __init__(self, way):
        super().__init__()
        self.way = way
        self.qkv = nn.Linear(64, 192)
        self.proj = nn.Linear(64, 64)

    def forward(self, x):
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, 2, 32).permute(2, 0, 3, 1, 4)
        if self.way == "function":
            out = F.scaled_dot_product_attention(q, k, v)
        elif self.way == "scale first":
            out = ((q * 32**-0.5) @ k.transpose(-2, -1)).softmax(-1) @ v
        else:
            scores = torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(32)
            out = torch.matmul(F.dropout(F.softmax(scores, -1), 0.1, self.training), v)
        return self.proj(out.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """The attention of torch."""

    def __init__(self, need_weights):
        super().__init__()
        self.need_weights = need_weights
        self.attention = nn.MultiheadAttention(64, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=self.need_weights)[0]


WAYS = ["function", "scale first", "scale last", "module"]


def make(way):
    if way in ("module", "weights"):
        return Layer(need_weights=way == "weights").eval()
    return Attention(way).eval()


def quantize(model, x, formats=("fp8",)):
    qdq.swap_modules(model, x, formats=formats)
    plan = qdq.rewire_operations(model, x, formats=formats)
    qdq.calibrate_model(model, [x], method="max")
    return plan


def codes(tensor, amax):
    scale = amax / 448
    return (tensor / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


@pytest.mark.parametrize("way", WAYS)
def test_all_four_operands_are_quantized(way):
    x = torch.randn(2, 16, 64)
    model = make(way)
    plan = quantize(model, x)
    assert {operation.action for operation in plan.operations} == {"quantize"}
    ranges = {
        name: quantizer.amax
        for name, quantizer in model.named_modules()
        if isinstance(quantizer, qdq.TensorQuantizer) and "proj" not in name and "qkv" not in name
    }
    fixed = [name for name, quantizer in model.named_modules() if getattr(quantizer, "is_fixed", 0)]
    assert len(fixed) == 1
    assert ranges[fixed[0]].item() == 1
    expected_scale = torch.tensor(1.0) / 448
    assert model.get_submodule(fixed[0]).scale == expected_scale


def test_values_are_those_of_the_definition():
    x = torch.randn(2, 16, 64)
    model = make("function")
    quantize(model, x)
    q, k, v = (
        (
            codes(model.qkv.input_quantizer(x), model.qkv.input_quantizer.amax)
            @ model.qkv.weight_quantizer(model.qkv.weight).T
            + model.qkv.bias
        )
        .reshape(2, 16, 3, 2, 32)
        .permute(2, 0, 3, 1, 4)
    )
    site = "_scaled_dot_product_attention_input"
    query, key, value = (getattr(model, f"{site}{i}_quantizer").amax for i in range(3))
    scores = codes(q * 32**-0.5, query) @ codes(k, key).transpose(-2, -1)
    out = codes(scores.softmax(-1), torch.tensor(1.0)) @ codes(v, value)
    with qdq.disable_quantization(model.proj):
        result = model(x)
    torch.testing.assert_close(result, model.proj.float_class.forward(_off(model.proj), _join(out)))


def _off(layer):
    for quantizer in layer.quantizers().values():
        quantizer.disable()
    return layer


def _join(heads):
    return heads.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("way", WAYS)
def test_switched_off_and_restored_it_is_the_float_model(way):
    x = torch.randn(2, 16, 64)
    model = make(way)
    expected = model(x)
    keys = list(model.state_dict())
    quantize(model, x)
    with qdq.disable_quantization(model):
        torch.testing.assert_close(model(x), expected)
    qdq.restore_modules(model)
    torch.testing.assert_close(model(x), expected)
    assert list(model.state_dict()) == keys
    assert type(model) in (Attention, Layer)


@pytest.mark.parametrize("way", WAYS)
def test_int8_leaves_attention_alone(way):
    x = torch.randn(2, 16, 64)
    model = make(way)
    plan = quantize(model, x, formats=("int8",))
    assert all(operation.action == "float" for operation in plan.operations)


@pytest.mark.trt
@pytest.mark.parametrize("way", [*WAYS, "weights"])
def test_an_exported_file_breaks_no_rule_and_is_one_kernel(way, tmp_path):
    """Of one layer for query, key and value, which have different scales."""
    pytest.importorskip("tensorrt_rtx")
    x = torch.randn(2, 64, 64)
    model = make(way)
    quantize(model, x)
    path = qdq.export_onnx(model, x, tmp_path / "m.onnx", dynamic_batch=False).path
    rules = {finding.rule for finding in qdq.check_onnx(path, sm=89).findings}
    # float32 at the outputs, a quantized layer that computes them, and the sessions of ONNX Runtime
    assert rules <= {"QDQ121", "QDQ124", "QDQ138"}
    (attention,) = build_engine(path, backend="rtx", sm=89).attention
    assert attention.is_fused


class Product(nn.Module):
    """Attention whose weights a function changes."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, q, k, v):
        return self.change((q @ k.transpose(-2, -1)).softmax(-1)) @ v


@pytest.mark.parametrize(
    ("change", "is_fixed"),
    [
        (lambda weights: weights.masked_fill(DIAGONAL, 0.0).to(torch.float32), True),
        (lambda weights: F.dropout(weights, 0.1, False).reshape(1, 2, 16, 16), True),
        (lambda weights: weights * 8, False),
        (lambda weights: weights.masked_fill(DIAGONAL, 8.0), False),
    ],
    ids=["mask and cast", "dropout and reshape", "factor", "fill"],
)
def test_the_range_is_fixed_only_below_1(change, is_fixed):
    model = Product(change).eval()
    inputs = dict(zip("qkv", torch.randn(3, 1, 2, 16, 32), strict=True))
    expected = model(**inputs)
    qdq.rewire_operations(model, inputs, formats=("fp8",))
    qdq.calibrate_model(model, [inputs], method="max")
    quantizer = model.get_submodule("_matmul_1_input0_quantizer")
    assert quantizer.is_fixed == is_fixed
    assert quantizer.amax.item() == (1 if is_fixed else pytest.approx(8, abs=0.5))
    error = model(**inputs) - expected
    assert 10 * (expected.square().sum() / error.square().sum()).log10() > 18


def test_the_softmax_keeps_its_range_in_training():
    x = torch.randn(2, 16, 64)
    model = make("function")
    quantize(model, x)
    quantizer = model._scaled_dot_product_attention_softmax_quantizer
    qdq.calibrate_model(model, [3 * x], method="mse")
    assert quantizer.amax.item() == 1
    model(x).square().sum().backward()
    assert model.qkv.weight.grad.abs().sum() > 0

"""`QuantMultiheadAttention`: the numbers of torch's module, int8 projections, float attention, one fused kernel."""

import copy
import io
import itertools

import pytest
import torch
from torch import nn

from qdq import (
    analyze_layers,
    build_engine,
    calibrate_model,
    disable_quantization,
    export_onnx,
    plan_swap,
    restore_modules,
    swap_modules,
)
from qdq.check import OnnxModel
from qdq.nn import QuantMultiheadAttention
from qdq.quantize import fake_quantize
from qdq.swap import quantized_layers
from qdq.trt.census import take_census

EMBED, HEADS, BATCH, LENGTH, KEYS = 12, 3, 2, 4, 5


def make_attention(**options):
    """A float64 module with biases that are not zero, and the same one swapped."""
    torch.manual_seed(1)
    layer = nn.MultiheadAttention(EMBED, HEADS, dtype=torch.float64, **options)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    swapped = copy.deepcopy(layer)
    swap_modules(swapped, include=["*"])
    assert type(swapped) is QuantMultiheadAttention
    return layer, swapped


def make_inputs(kind, layout, kdim=EMBED, vdim=EMBED):
    """Query, key and value: "self", "memory" (key is value) or "three" tensors; two cannot be one if sizes differ."""

    def tensor(length, width):
        shape = {"unbatched": (length, width), "batch first": (BATCH, length, width)}
        return torch.randn(
            shape.get(layout, (length, BATCH, width)), dtype=torch.float64, requires_grad=True
        )

    query = tensor(LENGTH, EMBED)
    if kind == "self":
        return query, query, query
    key = tensor(KEYS, kdim)
    return (query, key, key) if kind == "memory" else (query, key, tensor(KEYS, vdim))


def make_masks(masks, inputs, layout):
    """Keyword arguments: padding and attention masks of the named kinds."""
    query, key, _ = inputs
    where = {"unbatched": 0, "batch first": 1}.get(layout, 0)
    length, keys = query.shape[where], key.shape[where]
    batch = 1 if layout == "unbatched" else BATCH
    masks_by_name = {}
    if "padding" in masks:
        padding = torch.zeros(batch, keys, dtype=torch.bool)
        padding[:, -1] = True
        padding[0, 0] = True
        padding = padding[0] if layout == "unbatched" else padding
        masks_by_name["key_padding_mask"] = padding
    if "attention" in masks:
        shape = (batch * HEADS, length, keys) if "3-D" in masks else (length, keys)
        masks_by_name["attn_mask"] = torch.rand(shape) > 0.7
        masks_by_name["attn_mask"][..., 1] = False
    if "causal" in masks:
        masks_by_name["attn_mask"] = torch.ones(length, keys, dtype=torch.bool).triu(1)
        masks_by_name["is_causal"] = True
    if "float" in masks:
        for name in {"key_padding_mask", "attn_mask"} & masks_by_name.keys():
            mask = masks_by_name[name]
            masks_by_name[name] = torch.randn(mask.shape, dtype=torch.float64).masked_fill(
                mask, -torch.inf
            )
    return masks_by_name


def assert_equal(layer, swapped, inputs, **options):
    """Outputs, weights and all gradients; dropout from the same seed."""
    results = []
    for module in (layer, swapped):
        module.zero_grad()
        leaves = list(dict.fromkeys(inputs))
        torch.manual_seed(2)
        output, weights = module(*inputs, **options)
        loss = output.sin().sum() + (0 if weights is None else weights.cos().sum())
        grads = torch.autograd.grad(loss, [*leaves, *module.parameters()], allow_unused=True)
        results.append((output, weights, *grads))
    for expected, output in zip(*results, strict=True):
        assert (expected is None) == (output is None)
        if expected is not None:
            torch.testing.assert_close(output, expected, atol=1e-12, rtol=1e-12, equal_nan=True)


LAYOUTS = ("batch first", "sequence first", "unbatched")
MASKS = (
    "",
    "padding",
    "attention",
    "attention 3-D",
    "padding attention",
    "padding attention 3-D",
    "causal",
    "causal padding",
    "float padding",
    "float attention",
    "float attention 3-D",
    "float padding attention 3-D",
    "float causal",
)


class TestNumbers:
    """With its quantizers off it is `nn.MultiheadAttention`, whatever the options."""

    @pytest.mark.parametrize("masks", MASKS)
    @pytest.mark.parametrize("kind", ["self", "memory", "three"])
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_masks_and_layouts(self, layout, kind, masks):
        inputs = make_inputs(kind, layout)
        options = make_masks(masks, inputs, layout)
        for bias, extra in ((True, False), (False, True)):
            layer, swapped = make_attention(
                batch_first=layout == "batch first",
                bias=bias,
                add_bias_kv=extra,
                add_zero_attn=extra,
            )
            with disable_quantization(swapped):
                for need_weights, average in ((False, True), (True, True), (True, False)):
                    arguments = {
                        **options,
                        "need_weights": need_weights,
                        "average_attn_weights": average,
                    }
                    if is_refused(layer, inputs, arguments):
                        assert is_refused(swapped, inputs, arguments)
                        continue
                    assert_equal(layer, swapped, inputs, **arguments)

    @pytest.mark.parametrize("extra", list(itertools.product((True, False), repeat=2)))
    @pytest.mark.parametrize(("kdim", "vdim"), [(8, None), (None, 10), (8, 10), (8, 8)])
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_other_sizes_of_key_and_value(self, layout, kdim, vdim, extra):
        kind = "memory" if kdim == vdim else "three"
        inputs = make_inputs(kind, layout, kdim or EMBED, vdim or EMBED)
        for bias in (True, False):
            layer, swapped = make_attention(
                batch_first=layout == "batch first",
                bias=bias,
                kdim=kdim,
                vdim=vdim,
                add_bias_kv=extra[0],
                add_zero_attn=extra[1],
            )
            with disable_quantization(swapped):
                for need_weights in (True, False):
                    masks = make_masks("padding attention", inputs, layout)
                    assert_equal(layer, swapped, inputs, need_weights=need_weights, **masks)

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("need_weights", [True, False])
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_dropout(self, layout, need_weights, training):
        layer, swapped = make_attention(dropout=0.4, batch_first=layout == "batch first")
        inputs = make_inputs("self", layout)
        layer.train(training)
        swapped.train(training)
        with disable_quantization(swapped):
            assert_equal(layer, swapped, inputs, need_weights=need_weights)

    def test_the_fused_kernel_of_evaluation(self):
        layer, swapped = make_attention(batch_first=True)
        inputs = [x.detach() for x in make_inputs("self", "batch first")]
        inputs = (inputs[0],) * 3
        padding = torch.tensor([[False] * 4, [False, False, True, True]])
        with disable_quantization(swapped), torch.no_grad():
            for options in ({}, {"key_padding_mask": padding}, {"need_weights": False}):
                expected, output = (
                    layer.eval()(*inputs, **options),
                    swapped.eval()(*inputs, **options),
                )
                torch.testing.assert_close(output, expected, atol=1e-12, rtol=1e-12)

    def test_key_that_is_query_but_not_value(self):
        layer, swapped = make_attention()
        query, _, value = make_inputs("three", "sequence first")
        value = value[:LENGTH].detach().requires_grad_()
        with disable_quantization(swapped):
            assert_equal(layer, swapped, (query, query, value))
            assert_equal(layer, swapped, (query, value, query))

    @pytest.mark.parametrize(
        "options", [{"is_causal": True}, {"attn_mask": torch.zeros(3, 3, 3, 3)}]
    )
    def test_what_torch_refuses(self, options):
        layer, swapped = make_attention()
        inputs = make_inputs("self", "sequence first")
        assert is_refused(layer, inputs, options)
        assert is_refused(swapped, inputs, options)


def is_refused(layer, inputs, options):
    try:
        layer(*inputs, **options)
    except (RuntimeError, AssertionError, ValueError):
        return True
    return False


class Encoder(nn.Module):
    """Two transformer layers on a batch alone."""

    def __init__(self, width=64, **options):
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            width, 2, 2 * width, 0.0, "gelu", batch_first=True, **options
        )
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x, padding=None):
        return self.encoder(x, src_key_padding_mask=padding)


class Decoder(nn.Module):
    """A whole `nn.Transformer`: one input is source and target."""

    def __init__(self):
        super().__init__()
        self.transformer = nn.Transformer(32, 2, 1, 1, 64, 0.0, batch_first=True)

    def forward(self, x):
        return self.transformer(x, x + 1)


class TestSwap:
    def test_projections_are_quantized_once_and_by_output(self):
        layer, swapped = make_attention(batch_first=True)
        x = torch.randn(2, 4, EMBED, dtype=torch.float64)
        calls = []
        swapped.input_quantizer.register_forward_hook(lambda *_: calls.append(1))
        output, _ = swapped(x, x, x, need_weights=False)
        assert len(calls) == 1

        def dynamic(tensor, axis=None):
            amax = tensor.abs().amax() if axis is None else tensor.abs().amax(1)
            return fake_quantize(tensor, amax, axis=axis)

        with torch.no_grad():
            layer.in_proj_weight.copy_(dynamic(layer.in_proj_weight, 0))
            out = layer.out_proj
            layer.out_proj = nn.Identity()
            layer.out_proj.weight, layer.out_proj.bias = torch.eye(EMBED, dtype=torch.float64), None
            heads, _ = layer(*[dynamic(x)] * 3, need_weights=False)
            expected = nn.functional.linear(dynamic(heads), dynamic(out.weight, 0), out.bias)
        torch.testing.assert_close(output, expected, atol=1e-10, rtol=0)

    @pytest.mark.parametrize("kdim", [None, 20])
    def test_calibrated_saved_copied_restored(self, kdim):
        model = nn.MultiheadAttention(32, 4, kdim=kdim, vdim=kdim)
        keys = set(model.state_dict())
        inputs = {name: torch.randn(5, 2, kdim or 32) for name in ("key", "value")} | {
            "query": torch.randn(5, 2, 32)
        }
        swap_modules(model, inputs)
        assert set(model.state_dict()) == keys
        ranges = {entry.name: entry for entry in calibrate_model(model, [inputs], method="max")}
        assert {name for name in ranges if "out_proj" not in name} == set(model.quantizers())
        for attribute, parameter in model.weights_of(model).items():
            expected = getattr(model, parameter).detach().abs().amax(1)
            torch.testing.assert_close(
                getattr(model, attribute).amax.flatten(), expected, atol=0, rtol=0
            )
            assert ranges[attribute].batches == 0
        torch.testing.assert_close(
            model._key_quantizer.amax, inputs["key"].abs().max(), atol=0, rtol=0
        )
        assert {entry.name for entry in analyze_layers(model, [inputs]).layers} == {"", "out_proj"}
        expected, _ = model(**inputs)

        loaded = nn.MultiheadAttention(32, 4, kdim=kdim, vdim=kdim)
        swap_modules(loaded)
        loaded.load_state_dict(model.state_dict())
        stream = io.BytesIO()
        torch.save(model, stream)
        stream.seek(0)
        for twin in (loaded, copy.deepcopy(model), torch.load(stream, weights_only=False)):
            assert torch.equal(twin(**inputs)[0], expected)
        assert restore_modules(model) == 2
        assert type(model) is nn.MultiheadAttention
        assert set(model.state_dict()) == keys

    def test_self_attention_gives_all_inputs_one_range(self):
        model = Encoder()
        x = torch.randn(2, 5, 64)
        swap_modules(model, x)
        assert not any(
            "saw no batch" in entry.note for entry in calibrate_model(model, [x], method="max")
        )
        for layer in quantized_layers(model).values():
            if isinstance(layer, QuantMultiheadAttention):
                assert (
                    layer._key_quantizer.amax
                    == layer._value_quantizer.amax
                    == layer.input_quantizer.amax
                )

    def test_zeros_leave_the_whole_layer_in_float(self):
        model = nn.MultiheadAttention(32, 4)
        x, zeros = torch.randn(5, 2, 32), torch.zeros(5, 2, 32)
        swap_modules(model)
        calibrate_model(model, [{"query": x, "key": zeros, "value": zeros}])
        assert all(quantizer._disabled for quantizer in model.quantizers().values())

    def test_what_the_plan_says(self):
        plan = plan_swap(Encoder(), torch.randn(2, 5, 64))
        assert not plan.of("missed")
        assert len(plan.weighted) == 8
        plan = plan_swap(Encoder(), torch.randn(2, 5, 64), exclude=[nn.MultiheadAttention])
        assert {m.name for m in plan.of("missed")} == {
            f"encoder.layers.{i}.self_attn.out_proj" for i in range(2)
        }

    def test_a_forward_of_its_own_is_not_replaced(self):
        class Rotary(nn.MultiheadAttention):
            def forward(self, query, key, value, **options):
                return super().forward(query * 2, key, value, **options)

        class Same(nn.MultiheadAttention):
            pass

        (missed,) = plan_swap(Rotary(32, 4)).of("missed")
        assert "would replace it" in missed.reason
        assert not plan_swap(Same(32, 4)).of("missed")

    @pytest.mark.parametrize("training", [True, False])
    def test_transformers_call_it(self, training):
        x = torch.randn(2, 5, 32)
        model = Decoder().train(training)
        with torch.no_grad():
            expected = model(x)
            plan = swap_modules(model, x)
            assert len(plan.weighted) == 10
            output = model(x)
            assert not torch.equal(output, expected)
            with disable_quantization(model):
                torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)

    def test_padding_does_not_bring_the_fused_kernel_back(self):
        """With padding `nn.TransformerEncoder` makes nested tensors, which only its fused kernel takes."""
        model = Encoder().eval()
        states = [dict(vars(module)) for module in model.modules()]
        x, padding = torch.randn(2, 5, 64), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
        with torch.no_grad():
            expected = model(x, padding)
            swap_modules(model, x)
            assert not torch.equal(model(x, padding), expected)
            with disable_quantization(model):
                output = model(x, padding)
        torch.testing.assert_close(output[~padding], expected[~padding], atol=1e-5, rtol=1e-5)
        restore_modules(model)
        for module, state in zip(model.modules(), states, strict=True):
            assert {key: vars(module)[key] for key in state} == state


def sqnr(expected, output):
    expected, output = torch.as_tensor(expected).double(), torch.as_tensor(output).double()
    return float(10 * torch.log10(expected.square().sum() / (expected - output).square().sum()))


def run_onnx(path, x):
    # Not ONNX Runtime's own defaults: its int8 kernels clamp sums in 16 bits on a CPU without VNNI.
    return OnnxModel(path, session="default")(x.numpy())[0]


class TestExport:
    @pytest.mark.parametrize("build", [Encoder, Decoder])
    def test_onnxruntime_computes_the_same(self, build, tmp_path):
        model = build().eval()
        x = torch.randn(2, 6, 64 if build is Encoder else 32)
        plan = swap_modules(model, x)
        calibrate_model(model, [x], method="max")
        report = export_onnx(model, x, tmp_path / "m.onnx")
        assert set(report.layers) == {module.name for module in plan.weighted}
        with torch.no_grad():
            assert sqnr(model(x), run_onnx(tmp_path / "m.onnx", x)) >= 30

    @pytest.mark.trt
    @pytest.mark.parametrize("build", [Encoder, Decoder])
    def test_projections_in_int8_and_attention_in_one_kernel(self, build, tmp_path, monkeypatch):
        pytest.importorskip("tensorrt_rtx")
        x = torch.randn(2, 64, 64 if build is Encoder else 32)
        model = build().eval()
        count = sum(isinstance(module, nn.MultiheadAttention) for module in model.modules())
        swap_modules(model, x)
        calibrate_model(model, [x], method="max")
        export_onnx(model, x, tmp_path / "m.onnx", precision="fp16")
        kernels = []
        monkeypatch.setattr(
            "qdq.build.take_census",
            lambda nodes, built: kernels.extend(built) or take_census(nodes, built),
        )
        report = build_engine(tmp_path / "m.onnx", backend="rtx")
        assert not report.missing_int8
        # Key and value of a decoder are one product.
        assert report.expected_int8 == (8 if build is Encoder else 11)
        assert sum(kernel.name.startswith("_gemm_mha") for kernel in kernels) == count

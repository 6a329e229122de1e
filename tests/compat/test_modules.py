"""Quantized layers against torch: its functions on quantized operands, its modules with quantizers off, bit for bit."""

import copy
import importlib
import inspect
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from pretended_device import list_waits, watch
from torch import nn

import qdq.compat as pytorch_quantization
from qdq.compat import nn as quant_nn
from qdq.compat import tensor_quant
from qdq.compat.nn.modules import (
    _utils,
    quant_conv,
    quant_instancenorm,
    quant_linear,
    quant_pooling,
)
from qdq.compat.tensor_quant import QuantDescriptor
from qdq.errors import QdqError

CONV = (
    "in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, groups=1, bias=True, "
    "padding_mode='zeros'"
)
TRANSPOSE = (
    "in_channels, out_channels, kernel_size, stride=1, padding=0, output_padding=0, groups=1, bias=True, dilation=1, "
    "padding_mode='zeros'"
)
MAX_POOL = "kernel_size, stride=None, padding=0, dilation=1, return_indices=False, ceil_mode=False"
AVG_POOL = "kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True"
NORM = "num_features, eps=1e-05, momentum=0.1, affine=False, track_running_stats=False"
SIGNATURES = {"Linear": "in_features, out_features, bias=True"}
for rank in "123":
    SIGNATURES[f"Conv{rank}d"] = CONV
    SIGNATURES[f"ConvTranspose{rank}d"] = TRANSPOSE
    SIGNATURES[f"MaxPool{rank}d"] = MAX_POOL
    SIGNATURES[f"AvgPool{rank}d"] = AVG_POOL + (", divisor_override=None" if rank != "1" else "")
    SIGNATURES[f"AdaptiveAvgPool{rank}d"] = "output_size"
    SIGNATURES[f"InstanceNorm{rank}d"] = NORM
NAMES = sorted(SIGNATURES)
WEIGHTED = [name for name in NAMES if name.startswith(("Conv", "Linear"))]
INPUT_ONLY = [name for name in NAMES if name not in WEIGHTED]


def quant_class(name):
    return getattr(quant_nn, f"Quant{name}")


def least_args(name):
    """The fewest arguments, and an input that fits."""
    if name == "Linear":
        return (6, 5), (3, 6)
    spatial = (7, 6, 5)[: int(name[-2])]
    first = {"Conv": (4, 5, 3), "Inst": (4,), "Adap": (3,)}.get(name[:4], (2,))
    return first, (2, 4, *spatial)


# every argument of every class, in combinations that torch takes
VARIANTS = {
    "Linear": [
        {},
        {"bias": False},
        {"dtype": torch.float64},
        {"device": "cpu", "dtype": torch.bfloat16},
    ],
    "Conv": [
        {},
        {"stride": 2, "padding": 1, "bias": False},
        {"dilation": 2, "padding": 2, "groups": 2, "out_channels": 6},
        {"padding": "same"},
        {"padding": "same", "dilation": 2, "padding_mode": "reflect"},
        {"padding": "same", "kernel_size": 4, "padding_mode": "circular"},
        {"padding": "valid", "stride": 2},
        {"padding": 1, "padding_mode": "reflect"},
        {"padding": 2, "padding_mode": "replicate", "stride": 2},
        {"padding": 1, "padding_mode": "circular", "dilation": 2},
        {"device": "cpu", "dtype": torch.float64, "padding": 1, "groups": 4, "out_channels": 8},
    ],
    "ConvTranspose": [
        {},
        {"stride": 2, "padding": 1, "output_padding": 1},
        {"groups": 2, "out_channels": 6, "bias": False, "dilation": 2},
        {"device": "cpu", "dtype": torch.float64, "stride": 3},
    ],
    "MaxPool": [
        {},
        {"stride": 1, "padding": 1, "dilation": 2},
        {"return_indices": True},
        {"ceil_mode": True},
    ],
    "AvgPool": [
        {},
        {"stride": 1, "padding": 1},
        {"padding": 1, "count_include_pad": False, "ceil_mode": True},
        {"divisor_override": 3},
    ],
    "AdaptiveAvgPool": [{}, {"output_size": 1}, {"output_size": 4}],
    "InstanceNorm": [
        {},
        {"affine": True, "eps": 0.1},
        {"track_running_stats": True, "momentum": 0.3},
        {"affine": True, "device": "cpu", "dtype": torch.float64},
    ],
}
CASES = [
    pytest.param(name, variant, id=f"{name}-{'-'.join(f'{k}={v}' for k, v in variant.items())}")
    for name in NAMES
    for variant in VARIANTS[name.rstrip("d").rstrip("123")]
    if not (name == "AvgPool1d" and "divisor_override" in variant)
]


def make_pair(name, variant):
    """A float layer, a quantized one with its parameters, and an input."""
    args, shape = least_args(name)
    keys = [
        key for key in inspect.signature(getattr(nn, name).__init__).parameters if key != "self"
    ]
    named = {**dict(zip(keys, args, strict=False)), **variant}
    original, quantized = getattr(nn, name)(**named), quant_class(name)(**named)
    with torch.no_grad():
        for parameter in original.parameters():
            parameter.normal_()
    quantized.load_state_dict(original.state_dict(), strict=True)
    return original, quantized, torch.randn(*shape, dtype=variant.get("dtype", torch.float32))


def switched_off(module):
    for child in module.modules():
        if isinstance(child, quant_nn.TensorQuantizer):
            child.disable()
    return module


def same(left, right):
    if isinstance(left, tuple):
        return all(same(*pair) for pair in zip(left, right, strict=True))
    return left.dtype == right.dtype and torch.equal(left, right)


def by_hand(name, layer, x, weight):
    """What torch's function of that name gives; padding is worked out here."""
    rank = int(name[-2]) if name != "Linear" else 0
    if name == "Linear":
        return F.linear(x, weight, layer.bias)
    if name.startswith("ConvTranspose"):
        function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[rank - 1]
        return function(
            x,
            weight,
            layer.bias,
            layer.stride,
            layer.padding,
            layer.output_padding,
            layer.groups,
            layer.dilation,
        )
    if name.startswith("Conv"):
        function, padding = (F.conv1d, F.conv2d, F.conv3d)[rank - 1], layer.padding
        if layer.padding_mode != "zeros":
            widths = []
            for axis in reversed(range(rank)):
                total = layer.dilation[axis] * (layer.kernel_size[axis] - 1)
                widths += (
                    [total // 2, total - total // 2] if padding == "same" else [padding[axis]] * 2
                )
            x, padding = F.pad(x, widths, mode=layer.padding_mode), 0
        return function(x, weight, layer.bias, layer.stride, padding, layer.dilation, layer.groups)
    if name.startswith("MaxPool"):
        return (F.max_pool1d, F.max_pool2d, F.max_pool3d)[rank - 1](
            x,
            layer.kernel_size,
            layer.stride,
            layer.padding,
            layer.dilation,
            layer.ceil_mode,
            layer.return_indices,
        )
    if name.startswith("AvgPool"):
        last = (layer.divisor_override,) if rank > 1 else ()
        return (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[rank - 1](
            x,
            layer.kernel_size,
            layer.stride,
            layer.padding,
            layer.ceil_mode,
            layer.count_include_pad,
            *last,
        )
    if name.startswith("Adaptive"):
        functions = F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d
        return functions[rank - 1](x, layer.output_size)
    mean, var = (
        (None, None)
        if layer.running_mean is None
        else (layer.running_mean.clone(), layer.running_var.clone())
    )
    train = layer.training or not layer.track_running_stats
    return F.instance_norm(
        x, mean, var, layer.weight, layer.bias, train, layer.momentum or 0.0, layer.eps
    )


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_equal_to_torch(name, variant):
    original, quantized, x = make_pair(name, variant)
    assert list(quantized.state_dict()) == list(original.state_dict())
    quantized_x = quantized._input_quantizer(x)
    weight = quantized._weight_quantizer(quantized.weight) if name in WEIGHTED else None
    assert not torch.equal(quantized_x, x)
    expected = by_hand(name, quantized, quantized_x, weight)
    assert same(quantized(x), expected)
    if name in WEIGHTED:
        assert isinstance(quantized.weight, nn.Parameter) and torch.equal(
            quantized.weight, original.weight
        )
        if name != "Linear":
            assert same(quantized._quant(x), (quantized_x, weight))
    else:
        quantized.load_state_dict(original.state_dict())
    assert same(switched_off(quantized)(x), original(x))
    assert same(quantized(input=x), original(input=x))


@pytest.mark.parametrize("name", [name for name in WEIGHTED if "Transpose" in name])
def test_transpose_output_size(name):
    original, quantized, x = make_pair(name, {"stride": 2})
    size = [2 * (n - 1) + 4 for n in x.shape[2:]]
    assert quantized(x, output_size=size).shape[2:] == torch.Size(size)
    switched_off(quantized)
    assert same(quantized(x, size), original(x, size))
    quantized.padding_mode = "reflect"
    with pytest.raises(ValueError, match="padding mode"):
        quantized(x)


@pytest.mark.parametrize("name", WEIGHTED)
def test_weight_axis_and_gradient(name):
    _, quantized, x = make_pair(name, {})
    axis = 1 if "Transpose" in name else 0
    desc = quant_class(name).default_quant_desc_weight
    kind = (
        "LINEAR_WEIGHT_PER_ROW" if name == "Linear" else f"{name[:-1].upper()}D_WEIGHT_PER_CHANNEL"
    )
    assert desc == getattr(tensor_quant, f"QUANT_DESC_8BIT_{kind}")
    assert quantized._weight_quantizer.axis in (axis, (axis,))
    assert quant_class(name).default_quant_desc_input == tensor_quant.QUANT_DESC_8BIT_PER_TENSOR
    shape = [1] * quantized.weight.dim()
    shape[axis] = quantized.weight.shape[axis]
    assert quantized._weight_quantizer._get_amax(quantized.weight).shape == torch.Size(shape)
    quantized(x).sum().backward()
    assert quantized.weight.grad.abs().sum() > 0 and quantized.bias.grad is not None
    half = quant_class(name)(*least_args(name)[0], quant_desc_weight=QuantDescriptor(num_bits=4))
    assert half._weight_quantizer.num_bits == 4 and half._weight_quantizer.axis is None


@pytest.mark.parametrize("name", NAMES)
def test_signature(name):
    cls, base = quant_class(name), getattr(nn, name)
    parameters = list(inspect.signature(cls.__init__).parameters.values())
    assert parameters[-1].kind is inspect.Parameter.VAR_KEYWORD and parameters[-1].name == "kwargs"
    plain = [
        p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters[1:-1]
    ]
    assert ", ".join(plain) == SIGNATURES[name]
    args, _ = least_args(name)
    original = base(*args)
    # what converters do: each named parameter read off the float module
    made = cls(
        **{
            p.name: getattr(original, p.name) is not None
            if p.name == "bias"
            else getattr(original, p.name)
            for p in parameters[1:-1]
        }
    )
    assert made.extra_repr().split("\n")[0] == original.extra_repr()
    assert isinstance(made, base) and isinstance(made, cls)
    assert isinstance(made, _utils.QuantMixin if name in WEIGHTED else _utils.QuantInputMixin)
    assert not isinstance(made, _utils.QuantInputMixin if name in WEIGHTED else _utils.QuantMixin)


@pytest.mark.parametrize("name", NAMES)
def test_wrong_arguments(name):
    cls, (args, _) = quant_class(name), least_args(name)
    wrong = ["quant_desc", "num_bits"] + (
        ["device", "quant_desc_weight"] if name in INPUT_ONLY else []
    )
    for key in wrong:
        if key == "device" and name.startswith("Instance"):
            continue
        with pytest.raises(TypeError, match="Unused keys") as caught:
            cls(*args, **{key: "cpu"})
        assert isinstance(caught.value, QdqError) and key in str(caught.value)
    for key in ["quant_desc_input"] + (["quant_desc_weight"] if name in WEIGHTED else []):
        with pytest.raises(ValueError, match="Only fake quantization is supported") as caught:
            cls(*args, **{key: QuantDescriptor(fake_quant=False)})
        assert isinstance(caught.value, QdqError)
        for value in (None, "int8", 8):
            with pytest.raises(TypeError, match=key):
                cls(*args, **{key: value})


@pytest.mark.parametrize("name", NAMES)
def test_class_defaults(name, monkeypatch):
    cls = quant_class(name)
    kinds = ["input", "weight"] if name in WEIGHTED else ["input"]
    others = [quant_class(other) for other in NAMES if other != name]
    for kind in kinds:
        key = f"default_quant_desc_{kind}"
        before = getattr(cls, key)
        existing = cls(*least_args(name)[0])
        untouched = {other: getattr(other, key, None) for other in others}
        child = type("Child", (cls,), {})
        own = type("Own", (cls,), {key: QuantDescriptor(num_bits=3)})
        monkeypatch.setattr(cls, key, before)  # puts it back at the end
        given = QuantDescriptor(num_bits=5, calib_method="histogram")
        getattr(cls, f"set_{key}")(given)
        assert getattr(cls, key) == given and getattr(cls, key) is not given
        assert all(getattr(other, key, None) is value for other, value in untouched.items())
        for made, bits in ((cls, 5), (child, 5), (own, 3)):
            assert getattr(made(*least_args(name)[0]), f"_{kind}_quantizer").num_bits == bits
        assert getattr(existing, f"_{kind}_quantizer").num_bits == 8
        for wrong in (None, "8bit", {"num_bits": 8}):
            with pytest.raises(ValueError, match="QuantDescriptor"):
                getattr(cls, f"set_{key}")(wrong)
        assert getattr(cls, key) == given


@pytest.mark.parametrize("name", NAMES)
def test_made_without_constructor(name):
    original, quantized, x = make_pair(
        name, {"affine": True} if name.startswith("Instance") else {}
    )
    cls = quant_class(name)
    made = cls.__new__(cls)
    for key, value in vars(original).items():
        setattr(made, key, value)

    def attach():  # any caller may: F33
        found = _utils.pop_quant_desc_in_kwargs(cls)
        assert isinstance(found, tuple) and (found[1] is None) == (name in INPUT_ONLY)  # F34
        if isinstance(made, _utils.QuantInputMixin):
            made.init_quantizer(_utils.pop_quant_desc_in_kwargs(cls, input_only=True))
        else:
            made.init_quantizer(*found)

    attach()
    assert same(made(x), quantized(x))
    assert all(
        new is old for new, old in zip(made.parameters(), original.parameters(), strict=True)
    )
    assert made.input_quantizer is made._input_quantizer
    assert [key for key, _ in made.named_modules() if key] == (
        ["_input_quantizer", "_weight_quantizer"] if name in WEIGHTED else ["_input_quantizer"]
    )
    for again in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):  # noqa: S301
        assert same(again(x), made(x)) and again._input_quantizer is not made._input_quantizer
    stream = io.BytesIO()
    torch.save(made.state_dict(), stream)
    original.load_state_dict(torch.load(io.BytesIO(stream.getvalue())), strict=True)


def test_pop_quant_desc():
    cls, mine = quant_nn.QuantConv2d, QuantDescriptor(num_bits=4)
    pop = _utils.pop_quant_desc_in_kwargs
    assert pop(cls) == (cls.default_quant_desc_input, cls.default_quant_desc_weight)
    assert pop(cls, quant_desc_weight=mine) == (cls.default_quant_desc_input, mine)
    assert pop(cls, False, quant_desc_input=mine)[0] is mine
    assert pop(cls, input_only=True) == cls.default_quant_desc_input
    assert pop(quant_nn.QuantMaxPool2d, input_only=True, quant_desc_input=mine) is mine
    assert pop(quant_nn.QuantMaxPool2d) == (quant_nn.QuantMaxPool2d.default_quant_desc_input, None)
    with pytest.raises(TypeError, match="Unused keys"):
        pop(cls, input_only=True, quant_desc_weight=mine)
    with pytest.raises(TypeError, match="Unused keys"):
        pop(cls, stride=1)


def test_init_quantizer_lists():
    class Layers(nn.Module, _utils.QuantMixin):
        def __init__(self):
            super().__init__()
            self.init_quantizer(QuantDescriptor(), QuantDescriptor(axis=0), num_layers=3)

    layers = Layers()
    assert len(layers._input_quantizers) == len(layers._weight_quantizers) == 3
    assert isinstance(layers._weight_quantizers, nn.ModuleList) and not hasattr(
        layers, "_weight_quantizer"
    )
    for count in (None, 2):
        with pytest.raises(ValueError, match="Only fake quantization is supported"):
            layers.init_quantizer(
                QuantDescriptor(), QuantDescriptor(fake_quant=False), num_layers=count
            )


@pytest.mark.parametrize(
    "base", [quant_conv._QuantConvNd, quant_conv._ConvNd, quant_nn.modules.quant_conv._ConvNd]
)
def test_own_convolution(base):
    class Scaled(base):
        default_quant_desc_weight = QuantDescriptor(axis=0, num_bits=6)

        def __init__(self, cin, cout, size, gain=2.0, **kwargs):
            pair = _utils.pop_quant_desc_in_kwargs(self.__class__, **kwargs)
            sizes = (size, size), (1, 1), (1, 1), (1, 1)
            super().__init__(cin, cout, *sizes, False, (0, 0), 1, True, "zeros", *pair)
            self.gain = gain

        def forward(self, x):
            x, weight = self._quant(x)
            return F.conv2d(
                x,
                weight * self.gain,
                self.bias,
                self.stride,
                self.padding,
                self.dilation,
                self.groups,
            )

    layer, x = Scaled(3, 4, 3), torch.randn(2, 3, 5, 5)
    layer = copy.deepcopy(layer)
    assert layer.weight_quantizer.num_bits == 6
    xq = tensor_quant.fake_tensor_quant(x, x.abs().max(), 8, False, False)
    weight = layer.weight.detach()
    wq = tensor_quant.fake_tensor_quant(
        weight, weight.abs().amax((1, 2, 3), keepdim=True), 6, False, False
    )
    assert torch.equal(layer(x), F.conv2d(xq, wq * 2.0, layer.bias, 1, 1))
    with pytest.raises(TypeError, match="Unused keys"):
        Scaled(3, 4, 3, gian=1.0)
    with pytest.raises(ValueError, match="Only fake quantization is supported"):
        Scaled(3, 4, 3, quant_desc_input=QuantDescriptor(fake_quant=False))


def test_attached_class_method(monkeypatch):
    @classmethod
    def from_float(cls, layer):
        skip = {"self", "kwargs"}
        values = {
            key: getattr(layer, key)
            for key in inspect.signature(cls.__init__).parameters
            if key not in skip
        }
        made = cls(**{**values, "bias": layer.bias is not None})
        made.load_state_dict(layer.state_dict())
        return made

    original, x = (
        nn.Conv2d(3, 4, (3, 1), padding="same", padding_mode="replicate", bias=False),
        torch.randn(1, 3, 4, 4),
    )
    monkeypatch.setattr(quant_nn.QuantConv2d, "from_float", from_float, raising=False)
    assert torch.equal(switched_off(quant_nn.QuantConv2d.from_float(original))(x), original(x))


def test_meta_and_forward_fails():
    layer = quant_nn.QuantConv2d(3, 4, 3, device="meta", dtype=torch.float16)
    assert layer.weight.device.type == "meta" and layer.weight.dtype is torch.float16
    layer = quant_nn.QuantLinear(3, 4)
    with pytest.raises(RuntimeError):
        layer(torch.randn(2, 5))
    assert isinstance(layer.weight, nn.Parameter)
    with pytest.raises(AttributeError):
        layer.input_quantizer = None


TREE = {
    "": "initialize deactivate enable_onnx_export __version__ calib nn quant_modules tensor_quant utils",
    "quant_modules": "initialize deactivate enable_onnx_export QuantModuleReplacementHelper _quant_entry "
    "_DEFAULT_QUANT_MAP _quant_module_helper_object",
    "tensor_quant": "ScaledQuantDescriptor QuantDescriptor tensor_quant fake_tensor_quant legacy_fake_tensor_quant "
    "fake_affine_tensor_quant scaled_e4m3 TensorQuantFunction FakeTensorQuantFunction LegacyFakeTensorQuantFunction "
    "FakeAffineTensorQuantFunction ScaledE4M3Function QUANT_DESC_8BIT_PER_TENSOR QUANT_DESC_UNSIGNED_8BIT_PER_TENSOR "
    "QUANT_DESC_8BIT_LINEAR_WEIGHT_PER_ROW "
    + " ".join(
        f"QUANT_DESC_8BIT_CONV{t}{n}D_WEIGHT_PER_CHANNEL" for t in ("", "TRANSPOSE") for n in "123"
    ),
    "cuda_ext": "fake_tensor_quant_ fake_tensor_quant fake_tensor_quant_with_axis fake_e4m3fy",
    "calib": "MaxCalibrator HistogramCalibrator calibrate_weights calibrator max histogram",
    "calib.calibrator": "_Calibrator",
    "calib.max": "MaxCalibrator",
    "calib.histogram": "HistogramCalibrator",
    "nn": "TensorQuantizer Clip functional modules LSTM LSTMCell QuantLSTM QuantLSTMCell "
    + " ".join(f"Quant{name}" for name in NAMES)
    + " "
    + " ".join(name for name in NAMES if not name.startswith("Instance")),
    "nn.functional": "clip ClipFunction",
    "nn.modules": "tensor_quantizer _utils clip quant_linear quant_conv quant_pooling quant_instancenorm quant_rnn",
    "nn.modules._utils": "QuantMixin QuantInputMixin pop_quant_desc_in_kwargs",
    "nn.modules.quant_conv": "_QuantConvNd _ConvNd _QuantConvTransposeNd QuantConv2d Conv2d ConvTranspose3d",
    "nn.modules.quant_linear": "QuantLinear Linear",
    "nn.modules.quant_pooling": "QuantMaxPool2d MaxPool2d AdaptiveAvgPool1d",
    "nn.modules.quant_instancenorm": "QuantInstanceNorm1d QuantInstanceNorm2d QuantInstanceNorm3d",
    "nn.modules.quant_rnn": "QuantLSTM QuantLSTMCell LSTM LSTMCell",
    "nn.modules.tensor_quantizer": "TensorQuantizer",
    "nn.modules.clip": "Clip",
    "optim.helper": "match_parameters group_parameters freeze_parameters quant_weight_inplace",
    "utils": "reduce_amax",
    "utils.quant_logging": "reset_logger_handler",
}


@pytest.mark.parametrize("path", TREE)
def test_import_tree(path):
    imported = importlib.import_module(f"qdq.compat.{path}".rstrip("."))
    chained = pytorch_quantization
    for part in path.split(".") if path else []:
        chained = getattr(chained, part)
    assert chained is imported or path == "tensor_quant"
    for name in TREE[path].split():
        assert hasattr(imported, name), name


def test_aliases():
    assert tensor_quant.ScaledQuantDescriptor is QuantDescriptor
    assert quant_conv._ConvNd is quant_conv._QuantConvNd
    assert issubclass(quant_conv._QuantConvTransposeNd, _utils.QuantMixin)
    assert issubclass(quant_nn.QuantConvTranspose2d, quant_conv._QuantConvTransposeNd)
    assert issubclass(quant_nn.QuantConv2d, quant_conv._QuantConvNd)
    assert not hasattr(quant_nn, "InstanceNorm2d") and not hasattr(
        quant_instancenorm, "InstanceNorm2d"
    )
    for name in NAMES:
        if not name.startswith("Instance"):
            assert getattr(quant_nn, name) is quant_class(name)
    assert quant_nn.modules.quant_linear.QuantLinear is quant_linear.Linear is quant_nn.QuantLinear
    assert quant_pooling.MaxPool2d is quant_nn.QuantMaxPool2d


def test_pruned_weight_is_quantized_and_a_parametrized_one_refused():
    layer = quant_nn.QuantLinear(4, 3)
    inputs = torch.randn(2, 4)
    torch.nn.utils.prune.l1_unstructured(layer, "weight", amount=0.5)
    expected = F.linear(
        layer._input_quantizer(inputs), layer._weight_quantizer(layer.weight), layer.bias
    )
    for _ in range(2):  # the pruned weight is there again after a forward
        assert torch.equal(layer(inputs), expected)
    layer = torch.nn.utils.parametrizations.weight_norm(quant_nn.QuantLinear(4, 3))
    with pytest.raises(RuntimeError, match="parametrized"):
        layer(inputs)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda **device: quant_nn.QuantConv1d(3, 4, 3, padding="same", **device), (2, 3, 6)),
        (lambda **device: quant_nn.QuantConv2d(3, 4, 3, **device), (2, 3, 6, 6)),
        (lambda **device: quant_nn.QuantConvTranspose2d(3, 4, 3, **device), (2, 3, 6, 6)),
        (lambda **device: quant_nn.QuantLinear(3, 4, **device), (2, 3)),
        (lambda **device: quant_nn.QuantLSTM(3, 4, 2, bidirectional=True, **device), (5, 2, 3)),
        (lambda **device: quant_nn.QuantLSTMCell(3, 4, **device), (2, 3)),
        (lambda **device: quant_nn.QuantAvgPool2d(2), (2, 3, 6, 6)),
        (lambda **device: quant_nn.QuantMaxPool2d(2), (2, 3, 6, 6)),
        (lambda **device: quant_nn.QuantInstanceNorm2d(3), (2, 3, 6, 6)),
        (lambda **device: quant_nn.Clip(-1.0, 1.0), (2, 3)),
    ],
)
def test_a_calibrated_layer_does_not_wait_for_the_gpu(make, shape, gpu):
    layer, inputs = make(device=gpu), torch.randn(shape).to(gpu)
    quantizers = [q for q in layer.modules() if isinstance(q, quant_nn.TensorQuantizer)]
    for quantizer in quantizers:
        quantizer.enable_calib()
        quantizer.disable_quant()
    layer(inputs)
    for quantizer in quantizers:
        quantizer.disable_calib()
        quantizer.enable_quant()
        quantizer.load_calib_amax()
        assert quantizer.device == quantizer.amax.device == gpu
    with watch(gpu) as events:
        layer(inputs)
    assert list_waits(events) == []

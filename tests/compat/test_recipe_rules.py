"""Rule scripts: they export before calibration, find layers in the graph, let their quantizers be one, and go on.

Held, for the scripts in the shape that YOLO and residual recipes have them, by both exporters: the pairs found in the
temporary file are those that the structure of the network gives by hand; sharing survives calibration, export and
`state_dict`; one range covers the data of all sharers and stands in the file at each of their convolutions; ONNX
Runtime computes what torch computes.
"""

import collections
import io

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torchvision
from field_scripts import collect_stats, compute_amax
from onnx import numpy_helper
from torch import nn

from qdq.compat import nn as quant_nn
from qdq.compat import quant_modules
from qdq.compat.nn.modules import _utils
from qdq.compat.nn.modules.tensor_quantizer import TensorQuantizer
from qdq.compat.tensor_quant import QuantDescriptor

EXPORTERS = pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning"
)


@pytest.fixture(autouse=True)
def _restore():
    """Scripts leave class defaults, switches and rebound forwards behind."""
    classes = [entry.replace_mod for entry in quant_modules._DEFAULT_QUANT_MAP]
    saved = [
        (cls, {key: value for key, value in vars(cls).items() if key.startswith("default_")})
        for cls in classes
    ]
    blocks = (
        Bottleneck,
        torchvision.models.resnet.BasicBlock,
        torchvision.models.resnet.Bottleneck,
    )
    forwards = [cls.forward for cls in blocks]
    yield
    TensorQuantizer.use_fb_fake_quant = False
    for cls, forward in zip(blocks, forwards, strict=True):
        cls.forward = forward
    for cls, before in saved:
        for key in [key for key in vars(cls) if key.startswith("default_")]:
            delattr(cls, key)
        for key, value in before.items():
            setattr(cls, key, value)


# --------------------------------------------------------------------------------------------------------- the network


class Conv(nn.Module):
    def __init__(self, c1, c2, k=1, s=1):
        super().__init__()
        self.conv = nn.Conv2d(c1, c2, k, s, k // 2, bias=False)
        self.bn = nn.BatchNorm2d(c2)
        self.act = nn.SiLU()

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))


class Bottleneck(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.cv1 = Conv(c, c)
        self.cv2 = Conv(c, c, 3)
        self.add = True

    def forward(self, x):
        return x + self.cv2(self.cv1(x)) if self.add else self.cv2(self.cv1(x))


class Concat(nn.Module):
    def forward(self, xs):
        return torch.cat(xs, 1)


class SPP(nn.Module):
    """The pools' outputs go to a Concat, not to a convolution."""

    def __init__(self, c):
        super().__init__()
        self.pools = nn.ModuleList([nn.MaxPool2d(k, 1, k // 2) for k in (3, 5)])

    def forward(self, x):
        return torch.cat([x, *[pool(x) for pool in self.pools]], 1)


class Yolo(nn.Module):
    """`fan_out`: tensors of the rules are read by two convolutions, not one."""

    def __init__(self, fan_out):
        super().__init__()
        layers = [
            (-1, Conv(3, 8, 3, 2)),
            (-1, Conv(8, 16, 3)),
            (1, Conv(16, 8)),  # 2: one branch
            (1, Conv(16, 8)),  # 3: the other
            (-1, Bottleneck(8)),
            ([4, 2], Concat()),
            (5, Conv(16, 16)),  # 6: first behind the Concat
            (2, Conv(8, 8, 3)),  # 7: reads one input of the Concat
            (6, nn.MaxPool2d(2, 2)),
            (-1, Conv(16, 8)),  # 9: behind the pool
            (6, Conv(16, 8, 3, 2)),  # 10: reads what the pool reads
            ([10, 9], Concat()),
            (-1, Conv(16, 8, 3)),  # 12: behind the second Concat
            (-1, SPP(8)),
            (-1, Conv(24, 8)),  # 14: behind the pools' Concat
            (7, Conv(8, 8, 3, 2)),  # 15: nobody's
        ]
        if fan_out:
            layers += [
                (5, Conv(16, 8, 1, 2)),  # 16: second behind the first Concat
                (6, Conv(16, 8, 1, 2)),  # 17: second that reads what the pool reads
            ]
        ends = [14, 15, 16, 17][: 4 if fan_out else 2]
        layers += [(ends, Concat()), (-1, nn.Conv2d(8 * len(ends), 5, 1))]
        self.model = nn.Sequential(*[layer for _, layer in layers])
        for layer, (source, _) in zip(self.model, layers, strict=True):
            layer.f = source

    def forward(self, x):
        seen = []
        for layer in self.model:
            source = layer.f
            x = (
                [seen[i] for i in source]
                if isinstance(source, list)
                else seen[source]
                if seen
                else x
            )
            x = layer(x)
            seen.append(x)
        return x


# By hand from the list above; per group first the major.
GROUPS = {
    False: [(6, 7), (9, 10), (12,), (14,), (17,)],
    True: [(6, 16, 7), (9, 10, 17), (12,), (14,), (19,)],
}


def conv_name(model, index):
    return f"model.{index}.conv" if isinstance(model.model[index], Conv) else f"model.{index}"


def groups_of(model, fan_out):
    return [[conv_name(model, index) for index in group] for group in GROUPS[fan_out]]


def make_yolo(fan_out, seed=0):
    """Different gains, so that the tensors of a group have different ranges."""
    torch.manual_seed(seed)
    model = Yolo(fan_out).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 1, 4)
            nn.init.normal_(module.bias, std=0.5)
    return model


# ------------------------------------------------------------------------------------------- the scripts' own functions


def transfer_torch_to_quantization(module, cls):
    made = cls.__new__(cls)
    for key, value in vars(module).items():
        setattr(made, key, value)

    def __init__(self):
        if isinstance(self, _utils.QuantInputMixin):
            self.init_quantizer(_utils.pop_quant_desc_in_kwargs(self.__class__, input_only=True))
        else:
            self.init_quantizer(*_utils.pop_quant_desc_in_kwargs(self.__class__))
            self._weight_quantizer._calibrator._torch_hist = True
        self._input_quantizer._calibrator._torch_hist = True

    __init__(made)
    return made


def replace_to_quantization_module(model):
    table = {
        id(getattr(e.orig_mod, e.mod_name)): e.replace_mod for e in quant_modules._DEFAULT_QUANT_MAP
    }

    def recursive(module):
        for name in module._modules:
            child = module._modules[name]
            recursive(child)
            if id(type(child)) in table:
                module._modules[name] = transfer_torch_to_quantization(
                    child, table[id(type(child))]
                )

    recursive(model)


def initialize():
    for cls in (quant_nn.QuantConv2d, quant_nn.QuantLinear, quant_nn.QuantAdaptiveAvgPool2d):
        cls.set_default_quant_desc_input(QuantDescriptor(num_bits=8, calib_method="histogram"))


class QuantAdd(nn.Module, _utils.QuantMixin):
    def __init__(self, quantization):
        super().__init__()
        if quantization:
            self._input0_quantizer = TensorQuantizer(
                QuantDescriptor(num_bits=8, calib_method="histogram")
            )
            self._input1_quantizer = TensorQuantizer(
                QuantDescriptor(num_bits=8, calib_method="histogram")
            )
            self._input0_quantizer._calibrator._torch_hist = True
            self._input1_quantizer._calibrator._torch_hist = True
            self._fake_quant = True
        self.quantization = quantization

    def forward(self, x, y):
        if self.quantization:
            return self._input0_quantizer(x) + self._input1_quantizer(y)
        return x + y


def bottleneck_quant_forward(self, x):
    if hasattr(self, "addop"):
        return self.addop(x, self.cv2(self.cv1(x))) if self.add else self.cv2(self.cv1(x))
    return x + self.cv2(self.cv1(x)) if self.add else self.cv2(self.cv1(x))


def replace_bottleneck_forward(model):
    for _, module in model.named_modules():
        if (
            module.__class__.__name__ == "Bottleneck"
            and module.add
            and not hasattr(module, "addop")
        ):
            module.addop = QuantAdd(module.add)
            module.__class__.forward = bottleneck_quant_forward


def find_with_input_node(model, name):
    for node in model.graph.node:
        if name in node.input:
            return node
    return None


def find_all_with_input_node(model, name):
    return [node for node in model.graph.node if name in node.input]


def find_with_output_node(model, name):
    for node in model.graph.node:
        if name in node.output:
            return node
    return None


def find_quantizelinear_conv(model, qnode):
    """The layer behind a pair: the one reader that scripts look at."""
    dq = find_with_input_node(model, qnode.output[0])
    return find_with_input_node(model, dq.output[0])


def find_quantize_conv_name(model, weight):
    dq = find_with_output_node(model, weight)
    q = find_with_output_node(model, dq.input[0])
    return ".".join(q.input[0].split(".")[:-1])


def find_quantizer_pairs(path):
    model = onnx.load(path)
    pairs = []
    for node in model.graph.node:
        if node.op_type == "Concat":
            pairs += find_concat_pairs(model, node)
        elif node.op_type == "MaxPool":
            pairs += find_pooling_pairs(model, node)
    return pairs


def name_reader(model, quantize):
    """The layer that reads what a QuantizeLinear makes."""
    return find_quantize_conv_name(model, find_quantizelinear_conv(model, quantize).input[1])


def find_concat_pairs(model, concat):
    readers = find_all_with_input_node(model, concat.output[0])
    behind = [name_reader(model, node) for node in readers if node.op_type == "QuantizeLinear"]
    if not behind:
        return []
    major, *minors = behind
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear" and node.input[0] in concat.input:
            minors.append(name_reader(model, node))
    return [[major, minor] for minor in minors]


def find_pooling_pairs(model, pooling):
    quantize = find_with_input_node(model, pooling.output[0])
    if quantize is None or quantize.op_type != "QuantizeLinear":
        return []
    major = name_reader(model, quantize)
    beside = find_all_with_input_node(model, pooling.input[0])
    return [
        [major, name_reader(model, node)] for node in beside if node.op_type == "QuantizeLinear"
    ]


def get_attr_with_path(module, path):
    for name in path.split("."):
        module = getattr(module, name)
    return module


def apply_custom_rules_to_quantizer(model, export_onnx, path):
    export_onnx(model, path)
    pairs = find_quantizer_pairs(path)
    for major, sub in pairs:
        get_attr_with_path(model, sub)._input_quantizer = get_attr_with_path(
            model, major
        )._input_quantizer
    path.unlink()
    for _, module in model.named_modules():
        if module.__class__.__name__ == "Bottleneck" and module.add:
            major = module.cv1.conv._input_quantizer
            module.addop._input0_quantizer = major
            module.addop._input1_quantizer = major
    return pairs


def export_onnx(model, inputs, path, **options):
    quant_nn.TensorQuantizer.use_fb_fake_quant = True
    model.eval()
    with torch.no_grad():
        torch.onnx.export(model, inputs, path, opset_version=13, **options)
    quant_nn.TensorQuantizer.use_fb_fake_quant = False


def set_disabled(model, disabled):
    for module in model.modules():
        if isinstance(module, TensorQuantizer):
            module._disabled = disabled


# ------------------------------------------------------------------------------------------- what the tests look at


def constant(model, name):
    for tensor in model.graph.initializer:
        if tensor.name == name:
            return numpy_helper.to_array(tensor)
    node = find_with_output_node(model, name)
    assert node.op_type == "Constant"
    return numpy_helper.to_array(node.attribute[0].t)


def exported_scales(path):
    """Name of every layer with a weight: the scale of its input, and the tensor that was quantized."""
    model, scales = onnx.load(path), {}
    for node in model.graph.node:
        if node.op_type in ("Conv", "Gemm", "MatMul"):
            dq = find_with_output_node(model, node.input[0])
            q = find_with_output_node(model, dq.input[0])
            assert (dq.op_type, q.op_type) == ("DequantizeLinear", "QuantizeLinear") and dq.input[
                1
            ] == q.input[1]
            if node.op_type == "Conv":
                scales[find_quantize_conv_name(model, node.input[1])] = (
                    constant(model, q.input[1]),
                    q.input[0],
                )
    return scales


def run_onnx(path, inputs):
    session = onnxruntime.InferenceSession(path)
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: inputs.numpy()})[0])


def distance(a, b):
    a, b = a.double().flatten(), b.double().flatten()
    return float(1 - torch.dot(a, b) / (a.norm() * b.norm()))


def make_quantized(fan_out, seed=0):
    initialize()
    model = make_yolo(fan_out, seed)
    replace_bottleneck_forward(model)
    replace_to_quantization_module(model)
    return model


def apply_rules(model, inputs, tmp_path, dynamo):
    return apply_custom_rules_to_quantizer(
        model,
        lambda model, path: export_onnx(model, inputs, path, dynamo=dynamo),
        tmp_path / "quantization-temp.onnx",
    )


@pytest.fixture
def inputs():
    return torch.randn(1, 3, 32, 32)


@pytest.fixture
def loader():
    return [torch.randn(2, 3, 32, 32) * gain for gain in (0.5, 1, 2)]


# ------------------------------------------------------------------------------------------------------------- tests


@EXPORTERS
@pytest.mark.parametrize("fan_out", [False, True], ids=["single", "fan-out"])
def test_rules_to_the_final_file(fan_out, dynamo, inputs, loader, tmp_path):
    model = make_quantized(fan_out)
    keys = list(make_yolo(fan_out).state_dict())
    assert list(model.state_dict()) == keys
    pairs = apply_rules(model, inputs, tmp_path, dynamo)
    assert list(model.state_dict()) == keys  # the temporary export leaves no range behind
    assert sorted(pairs) == sorted(
        [group[0], sub] for group in groups_of(model, fan_out) for sub in group[1:]
    )
    sharers = collections.defaultdict(list)
    for name, module in model.named_modules():
        if isinstance(module, quant_nn.QuantConv2d):
            sharers[id(module._input_quantizer)].append(name)
    shared = [sorted(group) for group in sharers.values() if len(group) > 1]
    assert sorted(shared) == sorted(
        sorted(group) for group in groups_of(model, fan_out) if len(group) > 1
    )

    seen, hooks = collections.defaultdict(list), []
    for name, module in model.named_modules():
        if isinstance(module, quant_nn.QuantConv2d):
            hooks.append(
                module.register_forward_hook(
                    lambda m, args, out, name=name: seen[name].append(args[0])
                )
            )
    collect_stats(model, loader, len(loader))
    for hook in hooks:
        hook.remove()
    compute_amax(model, method="mse")

    path = tmp_path / "final.onnx"
    export_onnx(model, inputs, path, dynamo=dynamo)
    onnx.checker.check_model(path, full_check=True)
    scales = exported_scales(path)
    assert sorted(scales) == sorted(
        name for name, m in model.named_modules() if isinstance(m, nn.Conv2d)
    )
    for group in groups_of(model, fan_out):
        quantizer = get_attr_with_path(model, group[0])._input_quantizer
        values = torch.cat([x.flatten().abs() for name in group for x in seen[name]])
        # One histogram of all their data.
        assert int(quantizer._calibrator._calib_hist.sum()) == values.numel()
        assert quantizer._calibrator._calib_bin_edges[-1] >= values.max()
        for name in group:
            assert get_attr_with_path(model, name)._input_quantizer is quantizer
            assert scales[name][0].shape == () and scales[name][0] == np.float32(
                quantizer.amax.numpy() / 127
            )
    tensors = collections.defaultdict(set)
    for group in groups_of(model, fan_out):
        for name in group:
            tensors[scales[name][1]].add(float(scales[name][0]))
    # No tensor is quantized in two ways.
    assert all(len(values) == 1 for values in tensors.values())
    # Ranges are not all one.
    assert len({float(scale) for scale, _ in scales.values()}) > len(GROUPS[fan_out])

    block = model.model[4]
    assert (
        block.addop._input0_quantizer
        is block.addop._input1_quantizer
        is block.cv1.conv._input_quantizer
    )

    with torch.no_grad():
        expected = model(inputs)
        set_disabled(model, True)
        floating = model(inputs)
        set_disabled(model, False)
    # found: 1e-15 where no value lies on the edge of two codes; one scale that is off by 1 % gives 6e-5 to 1e-2
    assert distance(run_onnx(path, inputs), expected) <= 1e-6
    assert distance(floating, expected) > 1e-4


def test_state_dict(inputs, loader, tmp_path):
    first, second = make_quantized(False), make_quantized(False, seed=1)
    for model in (first, second):
        apply_rules(model, inputs, tmp_path, dynamo=False)
    collect_stats(first, loader, len(loader))
    compute_amax(first, method="mse")
    stream = io.BytesIO()
    torch.save(first.state_dict(), stream)
    stream.seek(0)
    state = torch.load(stream)
    for group in groups_of(first, False):
        kept = [state[f"{name}._input_quantizer._amax"] for name in group]
        assert all(torch.equal(value, kept[0]) for value in kept)
    block = "model.4"
    for key in (f"{block}.cv1.conv._input_quantizer", f"{block}.addop._input0_quantizer"):
        assert torch.equal(state[f"{key}._amax"], state[f"{block}.addop._input1_quantizer._amax"])
    with torch.no_grad():
        assert not torch.equal(second(inputs), first(inputs))
        second.load_state_dict(state, strict=True)
        assert torch.equal(second(inputs), first(inputs))
    major, sub = groups_of(second, False)[0]
    quantizer = get_attr_with_path(second, major)._input_quantizer
    assert get_attr_with_path(second, sub)._input_quantizer is quantizer
    assert quantizer is not get_attr_with_path(first, major)._input_quantizer


# ----------------------------------------------------------------------------------------------------- residual recipes


def basic_block_forward(self, x):
    identity = x
    out = self.relu(self.bn1(self.conv1(x)))
    out = self.bn2(self.conv2(out))
    if self.downsample is not None:
        identity = self.downsample(x)
    if hasattr(self, "residual_quantizer"):
        identity = self.residual_quantizer(identity)
    out += identity
    return self.relu(out)


def bottleneck_forward(self, x):
    identity = x
    out = self.relu(self.bn1(self.conv1(x)))
    out = self.relu(self.bn2(self.conv2(out)))
    out = self.bn3(self.conv3(out))
    if self.downsample is not None:
        identity = self.downsample(x)
    if hasattr(self, "residual_quantizer"):
        identity = self.residual_quantizer(identity)
    out += identity
    return self.relu(out)


def quantize_backbone(model):
    """Swap, share where a block begins with a downsample, and quantize the identity branch."""
    replace_to_quantization_module(model)
    resnet = torchvision.models.resnet
    for _, block in model.named_modules():
        if not isinstance(block, (resnet.BasicBlock, resnet.Bottleneck)):
            continue
        basic = isinstance(block, resnet.BasicBlock)
        type(block).forward = basic_block_forward if basic else bottleneck_forward
        if block.downsample is not None:
            block.downsample[0]._input_quantizer = block.conv1._input_quantizer
            block.residual_quantizer = TensorQuantizer(
                quant_nn.QuantConv2d.default_quant_desc_input
            )
        else:
            block.residual_quantizer = block.conv1._input_quantizer
    return model


def make_resnet(name):
    """Last normalisation of a block damped, as trained networks have it: ranges do not run away in 16 blocks."""
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(weights=None, num_classes=10).eval()
    for block in model.modules():
        last = getattr(block, "bn3", getattr(block, "bn2", None))
        if last is not None:
            nn.init.uniform_(last.weight, 0.1, 0.3)
    return model


def find_parallel_convs(path):
    """Convolutions that read one tensor, in the order of the graph: through one pair or through several."""
    model = onnx.load(path)
    readers = collections.defaultdict(list)
    for node in model.graph.node:
        if node.op_type == "Conv":
            dq = find_with_output_node(model, node.input[0])
            source = find_with_output_node(model, dq.input[0]).input[0]
            readers[source].append(find_quantize_conv_name(model, node.input[1]))
    return [names for names in readers.values() if len(names) > 1]


RESIDUAL = {  # blocks with a downsample, blocks, convolutions
    "resnet18": ([f"layer{i}.0" for i in (2, 3, 4)], 8, 20),
    "resnet50": ([f"layer{i}.0" for i in (1, 2, 3, 4)], 16, 53),
}


@pytest.mark.parametrize(
    ("name", "dynamo"), [("resnet18", True), ("resnet18", False), ("resnet50", False)]
)
def test_parallel_convs(name, dynamo, tmp_path):
    initialize()
    model = make_resnet(name)
    replace_to_quantization_module(model)
    export_onnx(model, torch.randn(1, 3, 64, 64), tmp_path / "temp.onnx", dynamo=dynamo)
    found = find_parallel_convs(tmp_path / "temp.onnx")
    expected = [[f"{block}.conv1", f"{block}.downsample.0"] for block in RESIDUAL[name][0]]
    assert sorted(map(sorted, found)) == expected


@pytest.mark.parametrize(
    ("name", "dynamo"), [("resnet18", True), ("resnet18", False), ("resnet50", True)]
)
def test_residual_quantizer(name, dynamo, tmp_path):
    downsampled, blocks, convs = RESIDUAL[name]
    initialize()
    model = quantize_backbone(make_resnet(name))
    loader = [torch.randn(2, 3, 64, 64) for _ in range(2)]
    collect_stats(model, loader, len(loader))
    compute_amax(model, method="mse")
    inputs, path = torch.randn(1, 3, 64, 64), tmp_path / "model.onnx"
    export_onnx(model, inputs, path, dynamo=dynamo)
    onnx.checker.check_model(path, full_check=True)

    file = onnx.load(path)
    adds = [node for node in file.graph.node if node.op_type == "Add"]
    assert len(adds) == blocks
    for node in adds:  # the identity branch only
        kinds = [
            getattr(find_with_output_node(file, source), "op_type", None) for source in node.input
        ]
        assert kinds.count("DequantizeLinear") == 1
    scales = exported_scales(path)
    assert len(scales) == convs
    state = model.state_dict()
    for block in downsampled:
        assert scales[f"{block}.conv1"] == scales[f"{block}.downsample.0"]
        keys = [f"{block}.{layer}._input_quantizer._amax" for layer in ("conv1", "downsample.0")]
        assert torch.equal(state[keys[0]], state[keys[1]])
        own = state[f"{block}.residual_quantizer._amax"]
        assert not torch.equal(own, state[keys[0]])
    for layer, (scale, _) in scales.items():
        assert scale == np.float32(state[f"{layer}._input_quantizer._amax"].numpy() / 127)

    with torch.no_grad():
        expected = model(inputs)
    # values on the edge of two codes: resnet50 in float64 is as far from itself in float32, 4e-4
    assert distance(run_onnx(path, inputs), expected) <= 1e-3
    again = quantize_backbone(make_resnet(name))
    again.load_state_dict(state, strict=True)
    with torch.no_grad():
        assert torch.equal(again(inputs), expected)
        for block in downsampled:  # the distance sees a wrong range
            get_attr_with_path(again, block).residual_quantizer._amax.mul_(0.25)
        assert distance(again(inputs), expected) > 2e-3

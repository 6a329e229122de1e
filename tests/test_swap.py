import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qdq.nn as qnn
from qdq import (
    ArgumentError,
    ArgumentTypeError,
    plan_swap,
    register_module,
    restore_modules,
    swap_modules,
)
from qdq.nn.registry import _DEFAULT_QUANT_MAP
from qdq.quantize import fake_quantize
from qdq.quantizer import QuantDescriptor, TensorQuantizer, named_quantizers
from qdq.swap import quantized_layers

NAMES = [
    "MultiheadAttention",
    *(
        "Conv1d",
        "Conv2d",
        "Conv3d",
        "ConvTranspose1d",
        "ConvTranspose2d",
        "ConvTranspose3d",
        "Linear",
    ),
    *(
        "AvgPool1d",
        "AvgPool2d",
        "AvgPool3d",
        "AdaptiveAvgPool1d",
        "AdaptiveAvgPool2d",
        "AdaptiveAvgPool3d",
    ),
]
LAYERS = [
    (lambda: nn.Conv1d(3, 4, 3, padding="same"), (2, 3, 8)),
    (lambda: nn.Conv2d(3, 4, 3, stride=2, padding=1, dilation=2), (2, 3, 9, 9)),
    (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (2, 3, 9, 9)),
    (lambda: nn.Conv2d(3, 4, 3, padding=2, padding_mode="circular"), (2, 3, 9, 9)),
    (lambda: nn.Conv2d(4, 8, 3, groups=4), (2, 4, 9, 9)),
    (lambda: nn.Conv3d(3, 4, 2), (2, 3, 4, 4, 4)),
    (lambda: nn.ConvTranspose1d(3, 4, 3, stride=2, output_padding=1), (2, 3, 8)),
    (lambda: nn.ConvTranspose2d(3, 4, 3, bias=False), (2, 3, 5, 5)),
    (lambda: nn.ConvTranspose3d(3, 4, 2), (2, 3, 4, 4, 4)),
    (lambda: nn.Linear(6, 4), (2, 5, 6)),
    (lambda: nn.AvgPool1d(2), (2, 3, 8)),
    (lambda: nn.AvgPool2d(2, count_include_pad=False, padding=1), (2, 3, 8, 8)),
    (lambda: nn.AvgPool3d(2), (2, 3, 4, 4, 4)),
    (lambda: nn.AdaptiveAvgPool1d(3), (2, 3, 8)),
    (lambda: nn.AdaptiveAvgPool2d((1, 1)), (2, 3, 8, 8)),
    (lambda: nn.AdaptiveAvgPool3d(2), (2, 3, 4, 4, 4)),
]


class SamePadConv(nn.Conv2d):
    """A subclass with a forward of its own, as EfficientNet-Lite has."""

    def forward(self, x):
        x = F.pad(x, [0, 1, 0, 1])
        return F.conv2d(x, self.weight, self.bias, self.stride)


def test_map_holds_the_specified_layers():
    assert [entry.mod_name for entry in _DEFAULT_QUANT_MAP if entry.orig_mod is nn] == NAMES


@pytest.mark.parametrize(("build", "shape"), LAYERS)
def test_equals_the_torch_layer_on_quantized_operands(build, shape):
    layer = build().eval()
    expected_layer = copy.deepcopy(layer)
    x = torch.randn(shape)
    swap_modules(layer, include=["*"])
    if hasattr(layer, "weight"):
        axis = layer.weight_quantizer.axis
        axes = [d for d in range(layer.weight.dim()) if d != axis]
        amax = expected_layer.weight.detach().abs().amax(axes)
        assert axis == (1 if isinstance(layer, nn.modules.conv._ConvTransposeNd) else 0)
        expected_layer.weight.data = fake_quantize(expected_layer.weight.detach(), amax, axis=axis)
    with torch.no_grad():
        assert torch.equal(layer(x), expected_layer(fake_quantize(x, x.abs().max())))


@pytest.mark.parametrize(("build", "shape"), LAYERS)
def test_restores_exactly(build, shape):
    layer = build()
    attributes, kind = dict(vars(layer)), type(layer)
    parameters, state = dict(layer.named_parameters()), copy.deepcopy(layer.state_dict())
    swap_modules(layer, include=["*"])
    assert type(layer) is not kind
    assert isinstance(layer, kind)
    assert restore_modules(layer) == 1
    assert type(layer) is kind
    assert vars(layer).keys() == attributes.keys()
    assert all(parameters[name] is p for name, p in layer.named_parameters())
    assert layer.state_dict().keys() == state.keys()
    assert not any(isinstance(m, TensorQuantizer) for m in layer.modules())


def test_uncalibrated_state_dict_is_the_float_one(residual, images):
    keys = residual.state_dict().keys()
    swap_modules(residual, images)
    assert residual.state_dict().keys() == keys


def test_subclass_keeps_its_forward():
    layer = SamePadConv(3, 16, 2).eval()
    x = torch.randn(2, 3, 5, 5)
    plan = swap_modules(layer, x, include="*")  # a last convolution stays float by default
    assert "subclass of Conv2d" in plan.modules[0].reason
    assert type(layer).__name__ == "QuantSamePadConv"
    assert isinstance(layer, SamePadConv)
    assert isinstance(layer, qnn.QuantConv2d)
    weight = fake_quantize(
        layer.weight.detach(), layer.weight.detach().abs().amax((1, 2, 3)), axis=0
    )
    expected = F.conv2d(F.pad(fake_quantize(x, x.abs().max()), [0, 1, 0, 1]), weight, layer.bias)
    with torch.no_grad():
        assert torch.equal(layer(x), expected)


def test_subclass_survives_deepcopy_and_pickle():
    layer = SamePadConv(3, 16, 2).eval()
    swap_modules(layer)
    layer.input_quantizer.amax = 1.0
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    x = torch.randn(2, 3, 5, 5)
    for twin in (copy.deepcopy(layer), torch.load(buffer, weights_only=False)):
        assert type(twin) is type(layer)
        assert torch.equal(twin(x), layer(x))


def test_everything_about_a_module_survives(residual):
    calls = []
    handle = residual.conv.register_forward_hook(lambda *_: calls.append(1))
    residual.conv.train()
    residual.stem.weight.requires_grad_(False)
    module, weight = residual.conv, residual.conv.weight
    optimizer = torch.optim.SGD(residual.parameters(), 0.1)
    swap_modules(residual)
    assert residual.conv is module
    assert residual.conv.weight is weight
    assert residual.conv.training
    assert residual.conv.input_quantizer.training
    assert not residual.stem.weight.requires_grad
    assert not residual.stem.training
    assert any(p is weight for group in optimizer.param_groups for p in group["params"])
    residual(torch.randn(1, 3, 8, 8))
    assert calls == [1]
    handle.remove()


def test_dtype_survives():
    layer = nn.Linear(16, 16).to(torch.bfloat16)
    swap_modules(layer)
    assert layer(torch.randn(2, 16, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_a_module_used_twice_is_swapped_once():
    shared = nn.Linear(16, 16)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, nn.ReLU())})
    plan = swap_modules(model)
    assert len(plan.weighted) == 1
    assert model["b"][0] is model["a"] is shared
    assert list(quantized_layers(model)) == ["a"]


def test_exclusion_by_another_name_of_the_same_module():
    shared = nn.Linear(16, 16)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    assert not plan_swap(model, exclude=["b"]).weighted


def test_swapping_twice_changes_nothing(residual):
    swap_modules(residual)
    quantizer = residual.conv.input_quantizer
    plan = swap_modules(residual)
    assert residual.conv.input_quantizer is quantizer
    assert {m.reason for m in plan.weighted} == {"already swapped"}


def test_by_hand_on_a_part(residual):
    swap_modules(residual.conv)
    assert list(quantized_layers(residual)) == ["conv"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ["stem", "conv", "head"]),
        ({"exclude": ["conv"]}, ["stem", "head"]),
        ({"exclude": ["*e*"]}, ["conv"]),
        ({"exclude": ["re:s.em"]}, ["conv", "head"]),
        ({"exclude": ["re:s"]}, ["stem", "conv", "head"]),  # the whole name, not its beginning
        ({"exclude": [nn.Linear]}, ["stem", "conv"]),
        (
            {"exclude": [lambda name, module: getattr(module, "in_channels", 0) == 3]},
            ["conv", "head"],
        ),
        ({"include": ["conv", nn.Linear]}, ["conv", "head"]),
        ({"include": ["*"]}, ["stem", "conv", "pool", "head"]),  # the pool against its default rule
        ({"include": ["*"], "exclude": ["pool", "head"]}, ["stem", "conv"]),
    ],
)
def test_include_and_exclude(residual, options, expected):
    swap_modules(residual, **options)
    assert list(quantized_layers(residual)) == expected


def test_a_name_stands_for_everything_below_it():
    model = nn.Sequential(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), nn.Linear(16, 16))
    assert [m.name for m in plan_swap(model, exclude=["0"]).weighted] == ["1"]


def test_pattern_without_match_is_said(residual, caplog):
    plan_swap(residual, exclude=["layer7"])
    assert "exclude pattern 'layer7' matches no module" in caplog.text


def test_bad_patterns(residual):
    with pytest.raises(ArgumentError, match="not a regular expression"):
        plan_swap(residual, exclude=["re:("])
    for patterns in (3, [3]):
        with pytest.raises(ArgumentTypeError, match="type int"):
            plan_swap(residual, exclude=patterns)


@pytest.mark.parametrize(
    ("layer", "rule"),
    [
        (nn.ConvTranspose2d(16, 16, 2), "R-CT-3"),
        (nn.Conv3d(16, 16, 3), "R-CONV-7"),
        (nn.Conv2d(32, 32, 3, groups=4), "R-CONV-4"),
        (nn.Conv2d(8, 8, 3, groups=4), "R-CONV-4"),
        (nn.Conv2d(3, 12, 3), "R-CONV-3"),
        (nn.Conv2d(32, 32, 1, groups=32), "R-CONV-3"),
        (nn.Conv1d(3, 4, 3), "R-CONV-3"),
        (nn.Linear(15, 32), "R-MM-3"),
        (nn.Linear(32, 15), "R-MM-3"),
        (nn.MultiheadAttention(14, 2), "R-MM-3"),
        (nn.MultiheadAttention(32, 2, kdim=8, vdim=32), "R-MM-3"),
        (nn.MultiheadAttention(32, 2, kdim=32, vdim=8), "R-MM-3"),
        (nn.AdaptiveAvgPool2d(1), "R-GAP"),
    ],
)
def test_default_rules_leave_float_and_say_why(layer, rule):
    planned = plan_swap(layer).modules[0]  # attention has a second one, its out_proj
    assert planned.action == "float"
    assert rule in planned.reason
    assert plan_swap(layer, include=["*"]).modules[0].action == "quantize"


class TestOverridden:
    """Every default gives way to a pattern that names the layer, and to no other."""

    LAYERS = {  # noqa: RUF012
        "transposed": (nn.ConvTranspose2d(16, 16, 2), "R-CT-3"),
        "volume": (nn.Conv3d(16, 16, 3), "R-CONV-7"),
        "grouped": (nn.Conv2d(32, 32, 3, groups=4), "R-CONV-4"),
        "narrow": (nn.Conv2d(16, 10, 3, groups=2), "R-CONV-4"),
        "odd": (nn.Conv2d(15, 17, 3), "R-CONV-3"),
        "small": (nn.Linear(8, 16), "R-MM-3"),
        "attention": (nn.MultiheadAttention(8, 2), "R-MM-3"),
        "pool": (nn.AdaptiveAvgPool2d(1), "R-GAP"),
    }

    @pytest.mark.parametrize("name", LAYERS)
    def test_by_name(self, name):
        model = nn.ModuleDict(
            {key: copy.deepcopy(layer) for key, (layer, _) in self.LAYERS.items()}
        )
        planned = {m.name: m for m in plan_swap(model).modules}
        assert self.LAYERS[name][1] in planned[name].reason
        assert not {m.name for m in plan_swap(model).of("quantize")}
        swap_modules(model, include=[name])
        assert set(quantized_layers(model)) - {"attention.out_proj"} == {name}

    def test_average_pooling_counts_by_who_reads_it(self):
        def action(*behind):
            model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.AvgPool2d(2), *behind).eval()
            pooling = {
                module.name: module
                for module in plan_swap(model, torch.randn(1, 3, 10, 10)).modules
            }["1"]
            return pooling.action, "R-AP" in pooling.reason

        assert action(nn.ReLU(), nn.Conv2d(16, 16, 3)) == ("quantize", False)
        assert action(nn.Flatten(), nn.Linear(256, 16)) == ("quantize", False)
        assert action(nn.Softmax(1)) == ("float", True)
        # That one stays in float (R-CONV-4).
        assert action(nn.ReLU(), nn.Conv2d(16, 6, 3, groups=2)) == (
            "float",
            True,
        )
        assert action(nn.ReLU()) == ("float", True)

    def test_the_last_convolution(self):
        model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3)).eval()
        x = torch.randn(1, 3, 8, 8)
        assert {m.name: m.action for m in plan_swap(model, x).modules} == {
            "0": "quantize",
            "2": "float",
        }
        assert [m.name for m in plan_swap(model, x, include=["2"]).weighted] == ["2"]
        assert [m.name for m in plan_swap(model, x, include=["*"]).weighted] == ["0", "2"]
        assert [
            m.name for m in plan_swap(model, x, include=[nn.Conv2d], exclude=["2"]).weighted
        ] == ["0"]


class Detector(nn.Module):
    """One box and one class convolution for each of two levels, joined as `[N, all positions, 4 + classes]`."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.down = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.levels = nn.ModuleList(nn.Conv2d(width, 32, 3, padding=1) for width in (16, 32))
        self.boxes = nn.ModuleList(nn.Conv2d(32, 16, 1) for _ in range(2))
        self.classes = nn.ModuleList(nn.Conv2d(32, 24, 1) for _ in range(2))

    def forward(self, x):
        x = torch.relu(self.stem(x))
        maps = [
            torch.relu(level(y))
            for level, y in zip(self.levels, (x, torch.relu(self.down(x))), strict=True)
        ]
        boxes = torch.cat([box(y).flatten(2) for box, y in zip(self.boxes, maps, strict=True)], 2)
        classes = torch.cat(
            [head(y).flatten(2) for head, y in zip(self.classes, maps, strict=True)], 2
        )
        return torch.cat([boxes * 8, classes.sigmoid()], 1).transpose(1, 2)


class TestLastConvolution:
    def last(self, model, x):
        return {m.name for m in plan_swap(model.eval(), x).of("float") if "R-OUT" in m.reason}

    def test_of_a_detection_head(self):
        expected = {"boxes.0", "boxes.1", "classes.0", "classes.1"}
        assert self.last(Detector(), torch.randn(1, 3, 16, 16)) == expected
        plan = swap_modules(model := Detector().eval(), torch.randn(1, 3, 16, 16))
        assert {m.name for m in plan.weighted} == {"stem", "down", "levels.0", "levels.1"}
        assert set(quantized_layers(model)) == {"stem", "down", "levels.0", "levels.1"}

    def test_without_example_inputs_nobody_knows(self):
        assert self.last(Detector(), None) == set()
        assert len(plan_swap(Detector()).weighted) == 8

    def test_of_deeplab(self):
        models = pytest.importorskip("torchvision.models", reason="needs the extra 'demo'")
        model = models.segmentation.deeplabv3_mobilenet_v3_large(
            weights=None, weights_backbone=None
        )
        x = torch.randn(1, 3, 64, 64)
        assert self.last(model, x) == {"classifier.4"}
        actions = {m.name: m.action for m in plan_swap(model, x).modules}
        assert actions["backbone.0.0"] == "quantize"  # three channels in, and the first
        assert actions["classifier.1"] == "quantize"

    def test_of_ssdlite(self):
        models = pytest.importorskip("torchvision.models", reason="needs the extra 'demo'")
        model = models.detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None)
        heads = [
            f"head.{kind}_head.module_list.{n}.1"
            for kind in ("classification", "regression")
            for n in range(6)
        ]
        names = dict(model.named_modules())
        assert all(isinstance(names[name], nn.Conv2d) for name in heads)
        assert self.last(model, torch.rand(1, 3, 64, 64)) == set(heads)

    def test_of_a_level_of_one_pixel(self):
        assert self.last(Detector(), torch.randn(1, 3, 2, 2)) == {
            "boxes.0",
            "boxes.1",
            "classes.0",
            "classes.1",
        }

    def test_of_a_classifier_is_not_the_output(self):
        models = pytest.importorskip("torchvision.models", reason="needs the extra 'demo'")
        plan = plan_swap(models.squeezenet1_1(weights=None).eval(), torch.randn(1, 3, 64, 64))
        assert len(plan.weighted) == 26  # all its convolutions; the last one is pooled

    def test_residual_blocks_before_the_output_are_quantized(self):
        class Restored(nn.Module):
            def __init__(self):
                super().__init__()
                self.head, self.a, self.b = (nn.Conv2d(16, 16, 3, padding=1) for _ in range(3))

            def forward(self, x):
                x = self.head(x)
                x = x + self.a(x).relu()
                return x + self.b(x).relu()

        assert self.last(Restored(), torch.randn(1, 16, 8, 8)) == {"b"}

    def test_gate_of_one_pixel_is_not_the_output(self):
        class Gated(nn.Module):
            def __init__(self):
                super().__init__()
                self.gate = nn.Sequential(
                    nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 16, 1), nn.Sigmoid()
                )
                self.conv = nn.Conv2d(16, 16, 3)

            def forward(self, x):
                return self.conv(x) * self.gate(x)

        assert self.last(Gated(), torch.randn(1, 16, 8, 8)) == {"conv"}


class TestFirstConvolution:
    def test_with_three_channels_is_quantized(self):
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1))
        for x in (None, torch.randn(1, 3, 8, 8)):
            # The second is as small, and not first.
            assert [m.name for m in plan_swap(model, x).weighted] == ["0"]

    def test_is_the_one_that_runs_first(self):
        class Backwards(nn.Module):
            def __init__(self):
                super().__init__()
                self.second = nn.Conv2d(8, 8, 3)
                self.first = nn.Conv2d(3, 8, 3)

            def forward(self, x):
                return self.second(self.first(x)).mean((2, 3))

        assert [m.name for m in plan_swap(Backwards(), torch.randn(1, 3, 8, 8)).weighted] == [
            "first"
        ]
        # Without a run, the first declared.
        assert [m.name for m in plan_swap(Backwards()).weighted] == ["second"]


def test_depthwise_is_quantized():
    assert plan_swap(nn.Conv2d(32, 32, 3, groups=32)).weighted


class TestMissed:
    def missed(self, model, x):
        return {m.name: m.reason for m in plan_swap(model, x).of("missed")}

    def test_functional_convolution_with_own_weight(self):
        class Own(nn.Module):
            def __init__(self):
                super().__init__()
                self.kernel = nn.Parameter(torch.randn(4, 3, 3, 3))

            def forward(self, x):
                return F.conv2d(x, self.kernel)

        model = nn.Sequential(Own(), nn.Conv2d(4, 4, 1))
        assert "conv2d" in self.missed(model, torch.randn(1, 3, 8, 8))["0"]
        assert self.missed(model, None).keys() == {"0"}  # without a run its weights are still named

    def test_matmul_without_parameters(self):
        class Gram(nn.Module):
            def forward(self, x):
                return torch.einsum("bij,bkj->bik", x, x)

        plan = plan_swap(nn.Sequential(nn.Linear(16, 16), Gram()), torch.randn(2, 3, 16))
        assert {m.name: m.action for m in plan.modules} == {"0": "quantize", "1": "float"}

    def test_multihead_attention_reads_its_projection_directly(self):
        wrapper = nn.Module()
        wrapper.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        wrapper.forward = lambda x: wrapper.attention(x, x, x)[0]
        x = torch.randn(1, 3, 16)
        plan = plan_swap(wrapper, x, exclude=[nn.MultiheadAttention])
        assert {m.name: m.action for m in plan.modules} == {
            "attention": "float",
            "attention.out_proj": "missed",
        }
        assert "never runs" in plan.of("missed")[0].reason
        plan = plan_swap(wrapper, x)  # the quantized attention calls it
        assert [m.name for m in plan.weighted] == ["attention", "attention.out_proj"]

    def test_layer_whose_weight_the_module_around_reads(self):
        class Reads(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = nn.Linear(16, 16)

            def forward(self, x):
                return F.linear(x, self.inner.weight)

        missed = self.missed(nn.Sequential(Reads()), torch.randn(2, 16))
        assert missed.keys() == {"0", "0.inner"}
        assert "calls linear directly; see rewire_operations" in missed["0"]
        assert "never runs" in missed["0.inner"]

    def test_forward_that_transforms_its_weight(self):
        class StdConv(nn.Conv2d):
            def forward(self, x):
                return F.conv2d(x, self.weight / self.weight.std(), self.bias)

        assert (
            "transforms the weight"
            in self.missed(nn.Sequential(StdConv(3, 4, 3)), torch.randn(1, 3, 8, 8))["0"]
        )

    @pytest.mark.parametrize(
        "wrap", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm]
    )
    def test_computed_weight(self, wrap):
        model = nn.Sequential(wrap(nn.Linear(16, 16)), nn.Linear(16, 16))
        assert "computed" in self.missed(model, None)["0"]
        assert len(swap_modules(model, torch.randn(2, 16)).weighted) == 1

    def test_lazy_layer(self):
        assert "not initialized" in self.missed(nn.Sequential(nn.LazyLinear(4)), None)["0"]

    @pytest.mark.parametrize("x", [None, torch.randn(3, 2, 4)])
    def test_recurrent_layer(self, x):
        (layer,) = plan_swap(nn.LSTM(4, 4), x).modules
        assert layer.action == "float"
        assert "R-RNN" in layer.reason

    def test_every_multiplication_has_its_share(self):
        class Recurrent(nn.Sequential):
            def forward(self, x):
                conv, up, gru, head = self
                return head(gru(up(conv(x)).transpose(1, 2))[0])

        model = Recurrent(
            nn.Conv1d(16, 32, 3, padding=1),
            nn.Upsample(scale_factor=2, mode="linear"),
            nn.GRU(32, 24, batch_first=True),
            nn.Linear(24, 16),
        ).eval()
        plan = plan_swap(model, torch.randn(1, 16, 10), include=["*"])
        macs = {
            "0": 10 * 32 * 16 * 3,
            "1": 20 * 32 * 2,
            "2": 20 * 3 * 24 * (32 + 24),
            "3": 20 * 24 * 16,
        }
        assert {module.name: module.macs for module in plan.modules if module.macs} == macs
        total = sum(macs.values())
        counts, *lines = plan.format_table().splitlines()
        assert f"{(macs['0'] + macs['3']) / total:.1%} of all MACs in quantized layers" in counts
        assert any("Upsample" in line and f"{macs['1'] / total:.1%}" in line for line in lines)
        assert any("GRU" in line and f"{macs['2'] / total:.1%}" in line for line in lines)

    def test_unknown_work_is_said_to_be_unknown(self):
        ops = pytest.importorskip("torchvision", reason="needs the extra 'demo'").ops

        class Suppressing(nn.Linear):
            def forward(self, x):
                return ops.nms(super().forward(x), x[:, 0], 0.5)

        table = plan_swap(Suppressing(16, 4), torch.rand(8, 16)).format_table()
        assert "the MACs of 1 calls are unknown: nms" in table

    def test_view_of_the_weight_is_the_weight(self):
        class Transposed(nn.Linear):
            def forward(self, x):
                return x @ self.weight.T + self.bias

        plan = plan_swap(nn.Sequential(Transposed(32, 16)), torch.randn(2, 32))
        assert not plan.of("missed")
        assert len(plan.weighted) == 1

    def test_layer_that_does_not_run(self):
        model = nn.Sequential(nn.Linear(4, 4))
        model.spare = nn.Linear(4, 4)
        model.forward = lambda x: model[0](x)
        plan = plan_swap(model, torch.randn(1, 4))
        reasons = {module.name: module.reason for module in plan.of("float")}
        assert "does not run" in reasons["spare"]
        assert not plan.of("missed")

    def test_the_warning_repeats_no_other_line_of_the_table(self, caplog):
        plan = swap_modules(nn.Sequential(nn.Conv2d(3, 16, 3), nn.Bilinear(4, 4, 4)), exclude=["0"])
        assert "Bilinear" in caplog.text
        assert "excluded by '0'" in plan.format_table()
        assert "excluded by '0'" not in caplog.text

    def test_elementwise_parameters_are_not_missed(self):
        class Scale(nn.Module):
            def __init__(self):
                super().__init__()
                self.gamma = nn.Parameter(torch.ones(1, 4))

            def forward(self, x):
                return x * self.gamma

        assert not self.missed(nn.Sequential(nn.Linear(4, 4), Scale()), torch.randn(1, 4))

    def test_swap_warns(self, caplog):
        class Mix(nn.Module):
            def __init__(self):
                super().__init__()
                self.mix = nn.Parameter(torch.randn(16, 16))

            def forward(self, x):
                return torch.einsum("bij,jk->bik", x, self.mix)

        swap_modules(nn.Sequential(nn.Linear(16, 16), Mix()), torch.randn(2, 3, 16))
        assert "Mix.forward calls einsum" in caplog.text


@pytest.mark.parametrize("activation", ["relu", "gelu", torch.tanh])
def test_fused_transformer_layer_does_not_pass_over_quantization(activation):
    model = nn.TransformerEncoderLayer(
        16, 2, 32, activation=activation, batch_first=True, dropout=0
    ).eval()
    attributes = dict(vars(model))
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        expected = model(x)
        swap_modules(model, x)
        assert set(quantized_layers(model)) == {
            "self_attn",
            "self_attn.out_proj",
            "linear1",
            "linear2",
        }
        outputs = model(x)
    assert not torch.equal(outputs, expected)
    # With gradients torch never fuses.
    torch.testing.assert_close(model(x).detach(), outputs, atol=1e-3, rtol=0)
    restore_modules(model)
    assert {key: vars(model)[key] for key in attributes} == attributes


class TestRegister:
    @pytest.fixture(autouse=True)
    def _restore_map(self):
        size = len(_DEFAULT_QUANT_MAP)
        yield
        del _DEFAULT_QUANT_MAP[size:]

    def test_decorator_extends_the_map(self):
        class Upsample2(nn.Upsample):
            pass

        globals()["Upsample2"] = Upsample2  # registered classes live in a module

        @register_module(Upsample2)
        class QuantUpsample2(qnn.QuantInputMixin, Upsample2):
            pass

        layer = Upsample2(scale_factor=2)
        swap_modules(layer)
        assert type(layer) is QuantUpsample2
        x = torch.randn(1, 2, 3, 3)
        assert torch.equal(layer(x), F.interpolate(fake_quantize(x, x.abs().max()), scale_factor=2))

    def test_class_that_cannot_be_found_by_name_is_refused(self):
        class Local(nn.Upsample):
            pass

        with pytest.raises(ArgumentTypeError, match="top of a module"):

            @register_module(Local)
            class QuantLocal(qnn.QuantInputMixin, Local):
                pass

    def test_class_that_is_no_subclass_is_refused(self):
        with pytest.raises(ArgumentTypeError, match="cannot replace Upsample"):

            @register_module(nn.Upsample)
            class Other(nn.Module):
                pass


def test_descriptors_can_be_given(residual):
    swap_modules(residual, input_desc=QuantDescriptor(4), weight_desc=QuantDescriptor(4, axis=0))
    assert (
        residual.conv.input_quantizer.format.num_bits
        == residual.conv.weight_quantizer.format.num_bits
        == 4
    )


def test_constructor_of_a_quantized_layer():
    layer = qnn.QuantConv2d(3, 4, 3, padding=1, bias=False, quant_desc_weight=QuantDescriptor())
    assert layer.weight_quantizer.axis is None
    assert layer(torch.randn(1, 3, 4, 4)).shape == (1, 4, 4, 4)


def test_input_by_another_name():
    class Own(nn.Linear):
        def forward(self, x):
            return super().forward(x)

    layer, x = Own(16, 16), torch.randn(2, 16)
    swap_modules(layer)
    assert torch.equal(layer(x=x), layer(x))


def test_weight_is_put_back_after_an_exception():
    layer = nn.Conv2d(3, 16, 3)
    swap_modules(layer)
    with pytest.raises(RuntimeError):
        layer(torch.randn(1, 5, 8, 8))
    assert layer.weight is layer._parameters["weight"]


def test_gradients_reach_weights_and_inputs(residual, images):
    swap_modules(residual, images)
    residual(images.requires_grad_()).sum().backward()
    assert residual.stem.weight.grad.abs().sum() > 0
    assert images.grad.abs().sum() > 0


def test_real_network_fifty_of_fifty(lite0):
    model = copy.deepcopy(lite0.module)
    plan = swap_modules(model, torch.randn(1, 3, 224, 224))
    assert len(plan.weighted) == 50
    assert not plan.of("missed")
    assert sum("subclass of Conv2d" in m.reason for m in plan.weighted) == 49
    assert "50 layers with weights quantized" in plan.format_table()
    assert restore_modules(model) == 50
    for (name, a), (_, b) in zip(model.named_modules(), lite0.module.named_modules(), strict=True):
        assert type(a) is type(b), name


def test_products_of_activations_are_float_on_purpose_and_those_with_weights_are_missed():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.mix = nn.Linear(16, 48), nn.Parameter(torch.randn(16, 16))

        def forward(self, x):
            return torch.nn.functional.scaled_dot_product_attention(*self.qkv(x).chunk(3, -1))

    class Mixed(Attention):
        def forward(self, x):
            return super().forward(x) @ self.mix

    for kind, action in ((Attention, "float"), (Mixed, "missed")):
        plan = plan_swap(nn.Sequential(kind()), torch.randn(2, 5, 16))
        assert {m.name: m.action for m in plan.modules}["0"] == action


def test_quantizers_are_on_the_device_of_the_model(gpu):
    """Also those of a layer without parameters, and the ranges of a descriptor."""
    model = nn.Sequential(nn.Conv2d(16, 16, 3), nn.AvgPool2d(2)).to(gpu)
    swap_modules(model, include=["*"], input_desc=QuantDescriptor(amax=2.0))
    quantizers = [quantizer for _, quantizer in named_quantizers(model)]
    assert len(quantizers) == 3
    assert {quantizer.device for quantizer in quantizers} == {gpu}
    assert {buffer.device for buffer in model.buffers()} == {gpu}

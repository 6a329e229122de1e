"""Placement of quantizers on function calls, against forwards written out by hand and against ONNX Runtime."""

import copy
import pickle
import random
import threading
import types

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qdq
from qdq import (
    ArgumentError,
    calibrate_model,
    fake_quantize,
    restore_modules,
    rewire_operations,
    swap_modules,
)
from qdq.check import OnnxModel
from qdq.nn import QuantConv2d
from qdq.nn.functions import QuantFunctionsMixin
from qdq.quantizer import SharedQuantizer, TensorQuantizer, named_quantizers

WIDTH = 16


def conv(inputs=WIDTH, outputs=WIDTH, size=3, **options):
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, **options)


class Block(nn.Module):
    """A residual block as torchvision writes it."""

    def __init__(self, downsample=False, in_place=True):
        super().__init__()
        self.conv1, self.conv2 = conv(), conv()
        self.downsample = conv(size=1) if downsample else None
        self.in_place = in_place

    def forward(self, x):
        out = self.conv2(F.relu(self.conv1(x)))
        identity = x if self.downsample is None else self.downsample(x)
        if self.in_place:
            out += identity
        else:
            out = torch.add(out, identity)
        return F.relu(out)


class Network(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.stem = conv(3)
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(WIDTH, 20)

    def forward(self, x):
        return self.head(self.blocks(F.relu(self.stem(x))).mean((2, 3)))


@pytest.fixture
def images():
    return torch.randn(2, 3, 8, 8)


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


def build(module, images, **options):
    """Swapped, rewired, calibrated."""
    module.eval()
    swap_modules(module, images, include="*")
    plan = rewire_operations(module, images, **options)
    calibrate_model(module, [images], method="max")
    return plan


def actions(plan):
    return {operation.name: operation.action for operation in plan.operations}


class TestResidual:
    @pytest.mark.parametrize("in_place", [True, False])
    def test_identity_uses_the_range_of_the_first_convolution(self, images, in_place):
        model = Network(Block(in_place=in_place))
        plan = build(model, images)
        assert actions(plan) == {"blocks.0.add": "quantize", "mean": "float"}
        assert plan.shared == {"blocks.0.conv1._input_quantizer": ("blocks.0._add_quantizer",)}
        block = model.blocks[0]
        x = F.relu(model.stem(images))
        expected = block.conv2(F.relu(block.conv1(x))) + fake_quantize(
            x, block.conv1.input_quantizer.amax
        )
        assert torch.equal(block(x), F.relu(expected))

    def test_downsample_has_its_own_and_parallel_convolutions_share(self, images):
        model = Network(Block(downsample=True))
        plan = build(model, images)
        assert plan.shared == {
            "blocks.0.conv1._input_quantizer": ("blocks.0.downsample._input_quantizer",)
        }
        block = model.blocks[0]
        x = F.relu(model.stem(images))
        identity = block.downsample(x)
        assert block._add_quantizer.amax not in (
            block.conv1.input_quantizer.amax,
            block.conv2.input_quantizer.amax,
        )
        expected = block.conv2(F.relu(block.conv1(x))) + fake_quantize(
            identity, block._add_quantizer.amax
        )
        assert torch.equal(block(x), F.relu(expected))

    def test_the_longer_branch_is_no_shortcut_on_either_side(self, images):
        class Swapped(Block):
            def forward(self, x):
                return self.downsample(x) + self.conv2(F.relu(self.conv1(x)))

        plan = build(Network(Swapped(downsample=True)), images)
        (add,) = plan.of("quantize")
        assert add.operands == (0,)

    def test_a_branch_right_behind_a_convolution_is_none(self, images, tmp_path):
        class Bottleneck(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.second = conv(), conv()

            def forward(self, x):
                x = self.first(x)
                return x + self.second(F.relu(x))

        for exclude in ((), ["blocks.0.first"]):  # whether that convolution is int8 does not matter
            model = Network(Bottleneck()).eval()
            swap_modules(model, images, exclude=exclude)
            (add,) = [
                op for op in rewire_operations(model, images).operations if op.function == "add"
            ]
            assert add.action == "float"
            assert "R-ADD-2" in add.reason
            calibrate_model(model, [images], method="max")
            path = qdq.export_onnx(model, images, tmp_path / "m.onnx").path
            assert not [f for f in qdq.check_onnx(path).findings if f.rule == "QDQ112"]

    def test_activation_before_the_add_quantizes_both_with_one_scale(self, images):
        class Yolo(Block):
            def forward(self, x):
                return x + F.silu(self.conv2(F.silu(self.conv1(x))))

        model = Network(Yolo(), Block())
        plan = build(model, images)
        planned = {op.name: op.operands for op in plan.of("quantize")}
        assert planned["blocks.0.add"] == (0, 1)
        x = F.relu(model.stem(images))
        block = model.blocks[0]
        residual = F.silu(block.conv2(F.silu(block.conv1(x))))
        amax = block.conv1.input_quantizer.amax
        assert torch.equal(block(x), fake_quantize(x, amax) + fake_quantize(residual, amax))
        with qdq.disable_quantization(model):
            x = F.relu(model.stem(images))
            residual = F.silu(block.conv2(F.silu(block.conv1(x))))
        assert amax == torch.maximum(x.abs().max(), residual.abs().max())

    def test_float_convolution_leaves_the_add_alone(self, images):
        model = Network(Block()).eval()
        swap_modules(model, images, exclude=["blocks.0.conv2"])
        plan = rewire_operations(model, images)
        assert "blocks.0.conv2 is in float" in next(
            op.reason for op in plan.operations if op.function == "add"
        )

    def test_float_branch_beside_an_int8_one_is_the_shortcut(self, images):
        class Reparametrized(nn.Module):
            def __init__(self):
                super().__init__()
                # R-CONV-3 leaves the second in float.
                self.wide, self.scale = (
                    conv(),
                    conv(size=1, groups=WIDTH),
                )

            def forward(self, x):
                return F.relu(self.wide(x) + self.scale(x))

        model = Network(Reparametrized()).eval()
        swap_modules(model, images)
        (add,) = rewire_operations(model, images).of("quantize")
        assert add.operands == (1,)

    def test_operands_from_outside(self, images):
        class Outside(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv = conv(3, 3)
                self.offset = nn.Parameter(torch.randn(3, 8, 8))

            def forward(self, x):
                return self.conv(x) + self.offset + x

        plan = build(Outside(), images)
        assert [op.reason for op in plan.operations] == [
            "an operand is the input of the network (R-ADD-2)"
        ]

    def test_a_block_that_runs_twice_has_one_range(self, images):
        block = Block()
        model = Network(block, block)
        build(model, images)
        x = F.relu(model.stem(images))
        assert (
            block.conv1.input_quantizer.amax
            >= torch.maximum(x.abs().max(), block(x).abs().max()) * 0.99
        )
        assert sum(isinstance(q, SharedQuantizer) for _, q in named_quantizers(model)) == 1


class TestSharing:
    class Fork(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.pooled = conv(), conv(), conv(2 * WIDTH), conv()

        def forward(self, x):
            narrow, wide = F.relu(self.a(x)), 10 * F.relu(self.b(x))
            return self.c(torch.cat([narrow, wide], 1)) + self.pooled(F.max_pool2d(wide, 3, 1, 1))

    def test_concat_pool_and_parallel_readers(self, images):
        model = Network(self.Fork())
        plan = build(model, images)
        fork = model.blocks[0]
        assert fork.a.input_quantizer.amax == fork.b.input_quantizer.amax
        assert fork.c.input_quantizer.amax == fork.pooled.input_quantizer.amax
        assert fork.a.input_quantizer.amax != fork.c.input_quantizer.amax
        assert {op.function for op in plan.of("share")} == {"cat", "max_pool2d"}

    def test_independent(self, images):
        model = Network(self.Fork())
        plan = build(model, images, scales="independent")
        assert plan.shared == {}
        fork = model.blocks[0]
        assert fork.c.input_quantizer.amax >= fork.pooled.input_quantizer.amax

    def test_switching_one_off_leaves_the_other(self, images):
        model = Network(Block(downsample=True))
        build(model, images)
        block, x = model.blocks[0], torch.randn(1, WIDTH, 4, 4)
        quantized = block.downsample(x)
        with qdq.disable_quantization(block.conv1):
            assert torch.equal(block.downsample(x), quantized)
            assert torch.equal(
                block.conv1(x), F.conv2d(x, block.conv1.weight, block.conv1.bias, padding=1)
            )

    def test_formats_that_differ_do_not_share(self, images):
        model = Network(Block(downsample=True)).eval()
        swap_modules(model, images, include="*")
        model.blocks[0].downsample._input_quantizer = TensorQuantizer(
            qdq.QuantDescriptor(num_bits=4)
        )
        assert rewire_operations(model, images).shared == {}

    def test_nearest_upsampling_copies_and_bilinear_does_not(self, images):
        class Up(nn.Module):
            def __init__(self, mode):
                super().__init__()
                self.conv, self.mode = conv(), mode

            def forward(self, x):
                return self.conv(F.interpolate(x, scale_factor=2, mode=self.mode))

        for mode, expected in (("nearest", "quantize"), ("bilinear", "float")):
            assert actions(build(Network(Up(mode)), images))["blocks.0.interpolate"] == expected


class TestWeights:
    class Attention(nn.Module):
        """As swin: linear layers that are never called, their weights handed to F.linear."""

        def __init__(self):
            super().__init__()
            self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            q, k, v = F.linear(x, self.qkv.weight, self.qkv.bias).chunk(3, -1)
            return F.linear(
                (q @ k.transpose(-2, -1)).softmax(-1) @ v, self.proj.weight, self.proj.bias
            )

    def test_linear_as_a_function(self):
        model, x = (
            nn.Sequential(nn.Linear(WIDTH, WIDTH), self.Attention()),
            torch.randn(2, 5, WIDTH),
        )
        plan = build(model, x)
        assert actions(plan) == {
            "1.linear": "quantize",
            "1.matmul": "float",
            "1.matmul_1": "float",
            "1.linear_1": "quantize",
        }
        attention = model[1]
        weight = attention.qkv.weight
        amax = weight.detach().abs().amax(1)
        assert torch.equal(attention._linear_input1_quantizer.amax.flatten(), amax)
        hidden = model[0](x)
        quantized = (
            fake_quantize(hidden, attention._linear_input0_quantizer.amax),
            fake_quantize(weight, amax, axis=0),
        )
        q, k, v = F.linear(*quantized, attention.qkv.bias).chunk(3, -1)
        mixed = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        proj = fake_quantize(
            attention.proj.weight, attention.proj.weight.detach().abs().amax(1), axis=0
        )
        amax = attention._linear_1_input0_quantizer.amax
        expected = F.linear(fake_quantize(mixed, amax), proj, attention.proj.bias)
        torch.testing.assert_close(model(x), expected)

    def test_small_product_with_a_weight(self):
        class Small(nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = nn.Parameter(torch.randn(8, WIDTH))

            def forward(self, x):
                return F.linear(x, self.weight)

        for include, action, operands in (((), "float", ()), (["1.linear"], "quantize", (0, 1))):
            model, x = nn.Sequential(nn.Linear(WIDTH, WIDTH), Small()), torch.randn(2, 5, WIDTH)
            (operation,) = build(model, x, include=include).operations
            assert (operation.action, operation.operands) == (action, operands)

    def test_weights_that_the_forward_computes(self, tmp_path):
        class Standardized(nn.Conv2d):
            def forward(self, x):
                weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
                return F.conv2d(x, weight, self.bias, self.stride, self.padding)

        class Residual(nn.Module):
            def __init__(self):
                super().__init__()
                self.stem = conv(3)
                self.conv = Standardized(WIDTH, WIDTH, 3, padding=1)

            def forward(self, x):
                x = F.relu(self.stem(x))
                return F.relu(self.conv(x) + x)

        model, images = nn.Sequential(Residual(), conv(), nn.ReLU()).eval(), torch.randn(2, 3, 8, 8)
        plan = build(model, images)
        assert actions(plan) == {"0.conv.conv2d": "quantize", "0.add": "quantize"}
        calibrate_model(model, [images])
        block = model[0]
        weight = block.conv.weight - block.conv.weight.mean((1, 2, 3), keepdim=True)
        assert torch.allclose(
            block.conv._conv2d_input1_quantizer.amax.flatten(), weight.abs().amax((1, 2, 3))
        )
        file = qdq.export_onnx(model, images, tmp_path / "model.onnx").path
        assert not [
            finding for finding in qdq.check_onnx(file).findings if finding.severity != "info"
        ]
        stored = [value for value in onnx.load(file).graph.initializer if len(value.dims) == 4]
        assert {value.data_type for value in stored if value.dims[0] == WIDTH} == {
            onnx.TensorProto.INT8
        }
        with torch.no_grad():
            expected = model(images).numpy()
        np.testing.assert_allclose(OnnxModel(file)(images.numpy())[0], expected, atol=0.05)

    def test_products_with_a_parameter_by_operator(self, tmp_path):
        class Projection(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer, self.weight = (
                    nn.Linear(WIDTH, WIDTH),
                    nn.Parameter(torch.randn(WIDTH, WIDTH)),
                )

            def forward(self, x):
                return self.layer(x) @ self.weight

        model, x = Projection().eval(), torch.randn(4, WIDTH)
        (operation,) = build(model, x).operations
        assert operation.operands == (0, 1)
        calibrate_model(model, [x])
        check = qdq.check_onnx(qdq.export_onnx(model, x, tmp_path / "model.onnx").path)
        assert [layer.int8 for layer in check.coverage.layers] == [True, True]

    def test_only_the_last_of_several_called_convolutions_writes_the_output(self):
        class Functional(nn.Module):
            def __init__(self):
                super().__init__()
                self.stem = conv(3)
                self.first, self.last = (
                    nn.Parameter(torch.randn(WIDTH, WIDTH, 3, 3)) for _ in range(2)
                )

            def forward(self, x):
                x = F.relu(F.conv2d(F.relu(self.stem(x)), self.first, padding=1))
                return F.relu(F.conv2d(x, self.last, padding=1))

        plan = build(Functional().eval(), torch.randn(2, 3, 8, 8))
        assert actions(plan) == {"conv2d": "quantize", "conv2d_1": "float"}
        assert "R-OUT" in plan.operations[1].reason

    def test_patterns_of_the_swap_are_no_mistake(self, images, caplog):
        model = nn.Sequential(Network(Block()))
        swap_modules(model, images, exclude=["0.head"])
        rewire_operations(model, images, exclude=["0.head", "re:.*add", nn.Linear])
        assert "matches no" not in caplog.text
        assert not [name for name, _ in named_quantizers(model) if "add" in name]

    def test_included_by_name(self):
        model, x = (
            nn.Sequential(nn.Linear(WIDTH, WIDTH), self.Attention()),
            torch.randn(2, 5, WIDTH),
        )
        plan = build(model, x, include=["*.matmul"], exclude="1.linear_1")
        assert actions(plan)["1.matmul"] == "quantize"
        assert actions(plan)["1.linear_1"] == "float"
        assert {"_matmul_input0_quantizer", "_matmul_input1_quantizer"} <= dict(
            model[1].named_children()
        ).keys()


class TestIdentity:
    """What stays as it was."""

    def test_names_and_state_before_calibration(self, images):
        model = Network(Block(), Block(downsample=True)).eval()
        names, state = {name for name, _ in model.named_modules()}, model.state_dict().keys()
        swap_modules(model, images)
        rewire_operations(model, images)
        assert names <= {name for name, _ in model.named_modules()}
        assert model.state_dict().keys() == state

    def test_restored(self, images):
        model = Network(Block(), Block(downsample=True)).eval()
        attributes, expected = (
            {name: (type(m), set(vars(m))) for name, m in model.named_modules()},
            model(images),
        )
        build(model, images)
        assert not torch.equal(model(images), expected)
        restore_modules(model)
        assert {name: (type(m), set(vars(m))) for name, m in model.named_modules()} == attributes
        assert torch.equal(model(images), expected)
        assert not nn.modules.module._global_forward_pre_hooks
        assert not nn.modules.module._global_forward_hooks

    def test_copied_pickled_and_loaded(self, images):
        model = Network(Block(), Block(downsample=True))
        build(model, images)
        expected = model(images)
        assert torch.equal(copy.deepcopy(model)(images), expected)
        assert torch.equal(pickle.loads(pickle.dumps(model))(images), expected)  # noqa: S301
        fresh = Network(Block(), Block(downsample=True)).eval()
        swap_modules(fresh, images, include="*")
        rewire_operations(fresh, images)
        fresh.load_state_dict(model.state_dict(), strict=True)
        assert torch.equal(fresh(images), expected)

    def test_a_graph_is_pickled_and_saved(self, images, tmp_path):
        model = torch.fx.symbolic_trace(Network(Block(), Block(downsample=True)))
        build(model, images)
        expected = model(images)
        torch.save(model, tmp_path / "model.pt")
        for loaded in (
            pickle.loads(pickle.dumps(model)),  # noqa: S301
            torch.load(tmp_path / "model.pt", weights_only=False),
        ):
            assert isinstance(loaded, QuantFunctionsMixin) and isinstance(
                loaded, torch.fx.GraphModule
            )
            assert torch.equal(loaded(images), expected)
            assert set(loaded.state_dict()) == set(model.state_dict())
            again = pickle.loads(pickle.dumps(copy.deepcopy(loaded)))  # noqa: S301
            assert torch.equal(again(images), expected)
            restore_modules(loaded)
            assert not isinstance(loaded, QuantFunctionsMixin) and not torch.equal(
                loaded(images), expected
            )
        assert torch.equal(model(images), expected)

    def test_a_copy_shares_with_itself_alone(self, images):
        model = Network(Block(downsample=True))
        build(model, images)
        twin = copy.deepcopy(model)
        twin.blocks[0].conv1.input_quantizer.amax.mul_(2)
        assert (
            twin.blocks[0].downsample.input_quantizer.amax
            == 2 * model.blocks[0].downsample.input_quantizer.amax
        )

    def test_isinstance_and_type_name(self, images):
        model = Network(Block())
        build(model, images)
        assert isinstance(model.blocks[0], Block)
        assert isinstance(model.blocks[0], QuantFunctionsMixin)
        assert isinstance(model.blocks[0].conv1, QuantConv2d)

    def test_training_step(self, images):
        model = Network(Block(), Block(downsample=True))
        build(model, images)
        model.train()
        amax = model.blocks[1]._add_quantizer.amax.clone()
        with torch.enable_grad():
            model(images).square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        assert torch.equal(model.blocks[1]._add_quantizer.amax, amax)

    def test_an_error_inside_leaves_nothing_behind(self, images):
        model = Network(Block())
        build(model, images)
        expected = model(images)
        handle = model.blocks[0].conv2.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(images)
        handle.remove()
        assert not nn.modules.module._global_forward_pre_hooks
        assert torch.equal(model(images), expected)

    def test_threads(self, images):
        model = Network(Block(), Block())
        build(model, images)
        model.blocks[0].conv1.input_quantizer.amax  # noqa: B018
        copies, outputs_of = [copy.deepcopy(model) for _ in range(4)], {}
        with torch.no_grad():
            expected = model(images)

        def run(index):
            with torch.no_grad():
                outputs_of[index] = [copies[index](images) for _ in range(5)]

        threads = [threading.Thread(target=run, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(
            torch.equal(output, expected) for outputs in outputs_of.values() for output in outputs
        )


class TestReach:
    def test_adds_of_inner_modules_are_not_counted(self, images):
        class Outer(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner, self.conv = Block(), conv()

            def forward(self, x):
                # The first add of this forward, the second that runs.
                return self.conv(self.inner(x)) + x

        model = Network(Outer())
        plan = build(model, images)
        assert {op.name for op in plan.of("quantize")} == {"blocks.0.inner.add", "blocks.0.add"}
        outer = model.blocks[0]
        x = F.relu(model.stem(images))
        quantized = fake_quantize(x, outer.inner.conv1.input_quantizer.amax)
        inner = F.relu(outer.inner.conv2(F.relu(outer.inner.conv1(x))) + quantized)
        assert torch.equal(outer(x), outer.conv(inner) + quantized)

    def test_modules_made_on_the_way_belong_to_the_forward(self, images):
        class Sloppy(Block):
            def forward(self, x):
                return nn.ReLU()(self.conv2(nn.ReLU()(self.conv1(x))) + x)

        model = Network(Sloppy())
        build(model, images)
        x = F.relu(model.stem(images))
        block = model.blocks[0]
        expected = F.relu(
            block.conv2(F.relu(block.conv1(x))) + fake_quantize(x, block._add_quantizer.amax)
        )
        assert torch.equal(block(x), expected)

    @pytest.mark.parametrize("kind", ["closure", "method", "class's own"])
    def test_a_forward_bound_to_the_instance(self, images, kind):
        model = Network(Block(in_place=False)).eval()
        block = model.blocks[0]
        block.forward = {
            "closure": lambda x: Block.forward(block, x),
            "method": types.MethodType(Block.forward, block),
            "class's own": lambda x: type(block).forward(block, x),
        }[kind]
        bound = block.forward
        build(model, images)
        x = F.relu(model.stem(images))
        quantized = fake_quantize(x, block._add_quantizer.amax)
        expected = F.relu(block.conv2(F.relu(block.conv1(x))) + quantized)
        assert torch.equal(block(x), expected)
        if kind == "method":
            twin = copy.deepcopy(block)
            twin.conv2.weight.mul_(2)
            assert torch.equal(twin(x), F.relu(twin.conv2(F.relu(block.conv1(x))) + quantized))
        restore_modules(model)
        assert block.forward is bound

    def test_bad_requests(self, images, caplog):
        model = Network(Block()).eval()
        with pytest.raises(ArgumentError, match="no quantized layer"):
            rewire_operations(model, images)
        swap_modules(model, images)
        with pytest.raises(ArgumentError, match="scales is 'one'"):
            rewire_operations(model, images, scales="one")
        rewire_operations(model, images, exclude=["nothing.*"])
        assert "exclude pattern 'nothing.*' matches no function call" in caplog.text

    def test_again_is_refused_until_restored(self, images):
        model = Network(Block()).eval()
        swap_modules(model, images)
        rewire_operations(model, images)
        with pytest.raises(ArgumentError, match="already rewired"):
            rewire_operations(model, images)


def compile_whole(model):
    return torch.compile(model, backend="eager")


def compile_part(model):
    model.blocks[0] = torch.compile(model.blocks[0], backend="eager")
    return model


def compile_in_place(model):
    model.blocks[0].compile(backend="eager")
    return model


@pytest.fixture
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)
@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("compile_model", [compile_whole, compile_part, compile_in_place])
@pytest.mark.parametrize("mode", ["evaluation", "with gradients", "training"])
def test_a_compiled_model_computes_the_same(compile_model, mode, images):
    model = Network(Block(), Block(downsample=True, in_place=False))
    build(model, images)
    model.train(mode == "training")
    twin = copy.deepcopy(model)
    compiled = compile_model(twin)
    with torch.set_grad_enabled(mode != "evaluation"):
        expected, outputs = model(images), compiled(images)
        assert torch.equal(outputs, expected)
        if mode != "evaluation":
            expected.sum().backward()
            outputs.sum().backward()
    gradients = [parameter.grad for parameter in twin.parameters()]
    for gradient, parameter in zip(gradients, model.parameters(), strict=True):
        assert (gradient is None and parameter.grad is None) or torch.equal(
            gradient, parameter.grad
        )


def random_network(seed):
    """A small network of residual blocks, concats, branches, pools and modules that run twice."""
    choose = random.Random(seed)  # noqa: S311

    class Random(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = conv(3)
            self.layers = nn.ModuleList(conv(size=choose.choice([1, 3])) for _ in range(6))
            self.wide = nn.ModuleList(conv(2 * WIDTH) for _ in range(3))
            self.steps = [
                (
                    choose.choice(["residual", "concat", "branch", "pool", "again", "silu"]),
                    choose.randrange(6),
                )
                for _ in range(5)
            ]

        def forward(self, x):
            x = F.relu(self.stem(x))
            for kind, index in self.steps:
                layer, successor = self.layers[index], self.layers[(index + 1) % 6]
                if kind == "residual":
                    x = F.relu(successor(F.relu(layer(x))) + x)
                elif kind == "concat":
                    x = F.relu(self.wide[index % 3](torch.cat([F.relu(layer(x)), x], 1)))
                elif kind == "branch":
                    x = F.relu(layer(x) + successor(x))
                elif kind == "pool":
                    x = F.relu(layer(F.max_pool2d(x, 3, 1, 1)))
                elif kind == "again":
                    x = F.relu(layer(F.relu(layer(x))))
                else:
                    x = x + F.silu(layer(x))
            return x.mean((2, 3))

    torch.manual_seed(seed)
    return Random()


@pytest.mark.parametrize("seed", range(8))
def test_random_networks_compute_the_same_in_onnx_runtime(seed, tmp_path):
    model, images = random_network(seed).eval(), torch.randn(2, 3, 8, 8)
    build(model, images)
    report = qdq.export_onnx(model, images, tmp_path / "m.onnx")
    outputs = qdq.predict(report.path, [images])
    expected = qdq.predict(model, [images])
    assert np.abs(outputs - expected).max() <= 0.02 * np.abs(expected).max()  # a tie or two
    assert not [f for f in qdq.check_onnx(report.path).findings if f.severity == "error"]


def test_quantizers_of_calls_are_on_the_device_of_the_model(residual, images, gpu):
    model = residual.to(gpu)
    swap_modules(model, images)
    rewire_operations(model, images, scales="independent")
    quantizers = dict(named_quantizers(model))
    assert "_add_quantizer" in quantizers
    assert {quantizer.device for quantizer in quantizers.values()} == {gpu}


def test_attention_of_an_int8_layer_is_no_int8_work():
    model = nn.TransformerEncoderLayer(64, 2, 128, batch_first=True).eval()
    x = torch.randn(1, 32, 64)
    shares = {}
    for formats in (("int8",), ("fp8",)):
        swap_modules(model, x, formats=formats)
        plan = rewire_operations(model, x, formats=formats)
        shares[formats] = plan.int8_macs / plan.macs
        restore_modules(model)
    attention = 2 * 32 * 32 * 64
    layers = 32 * (4 * 64 * 64 + 2 * 64 * 128)
    assert shares[("int8",)] == pytest.approx(layers / (layers + attention))
    assert shares[("fp8",)] == 1

"""What scripts in the wild do with the package, in the shape they do it: swap, calibrate, share, fine-tune, compare."""

import copy
import io
import re
import types

import pytest
import torch
import torch.nn.functional as F
import torchvision
from field_scripts import collect_stats, compute_amax
from torch import nn

from qdq.compat import calib, quant_modules
from qdq.compat import nn as quant_nn
from qdq.compat.nn.modules import _utils
from qdq.compat.nn.modules.tensor_quantizer import TensorQuantizer
from qdq.compat.tensor_quant import QuantDescriptor, fake_tensor_quant


@pytest.fixture(autouse=True)
def _restore():
    entries = list(quant_modules._DEFAULT_QUANT_MAP)
    classes = [entry.replace_mod for entry in entries]
    saved = [
        (cls, {key: value for key, value in vars(cls).items() if key.startswith("default_")})
        for cls in classes
    ]
    yield
    quant_modules.deactivate()
    quant_modules._DEFAULT_QUANT_MAP[:] = entries
    for cls, before in saved:
        for key in [key for key in vars(cls) if key.startswith("default_")]:
            delattr(cls, key)
        for key, value in before.items():
            setattr(cls, key, value)
    assert torch.nn.Conv2d is nn.modules.conv.Conv2d


# ------------------------------------------------------------------------------------------- the scripts' own functions


def transfer_torch_to_quantization(module, cls):
    made = cls.__new__(cls)
    for key, value in vars(module).items():
        setattr(made, key, value)

    def __init__(self):  # the scripts call it so, to please a look at the stack
        if isinstance(self, _utils.QuantInputMixin):
            desc = _utils.pop_quant_desc_in_kwargs(self.__class__, input_only=True)
            self.init_quantizer(desc)
            quantizers = [self._input_quantizer]
        else:
            desc, weight = _utils.pop_quant_desc_in_kwargs(self.__class__)
            self.init_quantizer(desc, weight)
            quantizers = [self._input_quantizer, self._weight_quantizer]
        for quantizer in quantizers:
            if isinstance(quantizer._calibrator, calib.HistogramCalibrator):
                quantizer._calibrator._torch_hist = True

    __init__(made)
    return made


def pair_first_transfer(module, cls):
    """Other copies: the pair for every class, then a look at which it is."""
    made = cls.__new__(cls)
    for key, value in vars(module).items():
        setattr(made, key, value)

    def __init__(self):
        desc, weight = _utils.pop_quant_desc_in_kwargs(self.__class__)
        if isinstance(self, _utils.QuantInputMixin):
            self.init_quantizer(desc)
            self._input_quantizer._calibrator._torch_hist = True
        else:
            self.init_quantizer(desc, weight)
            self._input_quantizer._calibrator._torch_hist = True
            self._weight_quantizer._calibrator._torch_hist = True

    __init__(made)
    return made


def ignored(policy, path):
    if policy is None:
        return False
    if callable(policy):
        return policy(path)
    return any(
        path == item or re.match(item, path)
        for item in ([policy] if isinstance(policy, str) else policy)
    )


def replace_to_quantization_module(
    model, ignore_policy=None, transfer=transfer_torch_to_quantization
):
    table = {
        id(getattr(e.orig_mod, e.mod_name)): e.replace_mod for e in quant_modules._DEFAULT_QUANT_MAP
    }

    def walk(module, prefix=""):
        for name in module._modules:
            path = f"{prefix}.{name}" if prefix else name
            child = module._modules[name]
            walk(child, path)
            if id(type(child)) in table and not ignored(ignore_policy, path):
                module._modules[name] = transfer(child, table[id(type(child))])

    walk(model)
    return model


class disable_quantization:  # noqa: N801
    value = True

    def __init__(self, model):
        self.model = model

    def apply(self, disabled=None):
        disabled = self.value if disabled is None else disabled
        for _, module in self.model.named_modules():
            if isinstance(module, TensorQuantizer):
                module._disabled = disabled

    def __enter__(self):
        self.apply(self.value)

    def __exit__(self, *args):
        self.apply(not self.value)


class enable_quantization(disable_quantization):  # noqa: N801
    value = False


def quantizer_state(model):
    return {
        name: not m._disabled for name, m in model.named_modules() if isinstance(m, TensorQuantizer)
    }


class QuantAdd(torch.nn.Module, _utils.QuantMixin):
    def __init__(self, quantization=True):
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


class QuantConcat(torch.nn.Module, _utils.QuantInputMixin):
    default_quant_desc_input = QuantDescriptor(num_bits=8, calib_method="histogram")

    def __init__(self, dim=1):
        super().__init__()
        self.d = dim
        self.init_quantizer(self.default_quant_desc_input)

    def forward(self, xs):
        return torch.cat([self._input_quantizer(x) for x in xs], self.d)


class QuantMultiAdd(torch.nn.Module, _utils.QuantMixin):
    def __init__(self):
        super().__init__()
        self.init_quantizer(QuantDescriptor(num_bits=8), QuantDescriptor(num_bits=8, axis=0))

    def forward(self, x, y, z):
        return self._input_quantizer(x) + self._input_quantizer(y) + self._input_quantizer(z)


class Bottleneck(nn.Module):
    def __init__(self, channels=4):
        super().__init__()
        self.cv1 = torch.nn.Conv2d(channels, channels, 3, padding=1)
        self.cv2 = torch.nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return x + self.cv2(torch.relu(self.cv1(x)))


class Net(nn.Module):
    """Eleven layers of its list, so that "blocks.1" begins the path "blocks.10"."""

    def __init__(self):
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 4, 3, padding=1)
        self.blocks = nn.Sequential(Bottleneck(), *[nn.Identity() for _ in range(9)], Bottleneck())
        self.pool = torch.nn.AdaptiveAvgPool2d(1)
        self.head = torch.nn.Linear(4, 5)

    def forward(self, x):
        return self.head(self.pool(self.blocks(torch.relu(self.stem(x)))).flatten(1))


def quantizers_of(model):
    return {name: m for name, m in model.named_modules() if name.endswith("_quantizer")}


@pytest.fixture
def loader():
    return [torch.randn(2, 3, 8, 8) for _ in range(4)]


def set_defaults(method):
    for entry in quant_modules._DEFAULT_QUANT_MAP:
        entry.replace_mod.set_default_quant_desc_input(
            QuantDescriptor(num_bits=8, calib_method=method)
        )


def quantized_net(method="max"):
    set_defaults(method)
    torch.manual_seed(1)
    return replace_to_quantization_module(Net()).eval()


# ------------------------------------------------------------------------------------------------------------- swapping


@pytest.mark.parametrize("transfer", [transfer_torch_to_quantization, pair_first_transfer])
def test_replace_resnet18(transfer):
    set_defaults("histogram")
    model = torchvision.models.resnet18(weights=None).eval()
    x, before = torch.randn(1, 3, 32, 32), dict(model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected, keys = model(x), list(model.state_dict())
    replace_to_quantization_module(model, transfer=transfer)
    kinds = [type(m).__name__ for m in model.modules()]
    assert (
        kinds.count("QuantConv2d") == 20
        and kinds.count("QuantLinear") == kinds.count("QuantAdaptiveAvgPool2d") == 1
    )
    assert len(quantizers_of(model)) == 43 == kinds.count("TensorQuantizer")
    assert list(model.state_dict()) == keys
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    for quantizer in quantizers_of(model).values():
        assert (
            not isinstance(quantizer._calibrator, calib.HistogramCalibrator)
            or quantizer._calibrator._torch_hist
        )
    with disable_quantization(model):
        assert torch.equal(model(x), expected)
    loss = model(x).sum()
    assert not torch.equal(model(x), expected)
    loss.backward()
    old = model.conv1.weight.clone()
    optimizer.step()
    assert not torch.equal(model.conv1.weight, old)


def test_automatic_equals_replaced():
    x = torch.randn(1, 3, 32, 32)
    quant_modules.initialize()
    torch.manual_seed(3)
    automatic = torchvision.models.resnet18(weights=None).eval()
    quant_modules.deactivate()
    torch.manual_seed(3)
    replaced = replace_to_quantization_module(torchvision.models.resnet18(weights=None).eval())
    assert sorted(quantizers_of(automatic)) == sorted(quantizers_of(replaced))
    assert torch.equal(automatic(x), replaced(x))
    plain = torchvision.models.resnet18(weights=None)
    plain.load_state_dict(automatic.state_dict(), strict=True)
    automatic.load_state_dict(plain.state_dict(), strict=True)


@pytest.mark.parametrize(
    ("policy", "left"),
    [
        (None, []),
        ("head", ["head"]),
        ("blocks.1", ["blocks.10.cv1", "blocks.10.cv2"]),  # anchored at the start only
        (["stem", r"blocks\.0\.cv2"], ["blocks.0.cv2", "stem"]),
        (lambda path: path.endswith("cv1"), ["blocks.0.cv1", "blocks.10.cv1"]),
        ("cv1", []),
    ],
)
def test_ignore_policy(policy, left):
    model = replace_to_quantization_module(Net(), policy)
    quantized = (_utils.QuantMixin, _utils.QuantInputMixin)
    kinds = (nn.Conv2d, nn.Linear, nn.AdaptiveAvgPool2d)
    names = [
        name
        for name, m in model.named_modules()
        if isinstance(m, kinds) and not isinstance(m, quantized)
    ]
    assert sorted(names) == left


def test_subclasses_and_active_table():
    class Own(nn.Conv2d):
        pass

    model = replace_to_quantization_module(nn.Sequential(Own(1, 1, 1), nn.Conv2d(1, 1, 1)))
    assert type(model[0]) is Own and type(model[1]) is quant_nn.QuantConv2d
    float_conv = nn.Conv2d(1, 1, 1)
    quant_modules.initialize()
    model = replace_to_quantization_module(nn.Sequential(float_conv, torch.nn.Conv2d(1, 1, 1)))
    assert type(model[0]) is nn.modules.conv.Conv2d  # the table holds the quantized classes now
    assert type(model[1]) is quant_nn.QuantConv2d and len(quantizers_of(model)) == 2


def test_extended_by_scripts():
    class QuantSiLU(torch.nn.SiLU, _utils.QuantInputMixin):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.init_quantizer(self.default_quant_desc_input)

        def forward(self, x):
            return F.silu(self._input_quantizer(x), inplace=self.inplace)

    class Concat(nn.Module):
        def __init__(self, dim=1):
            super().__init__()
            self.d = dim

        def forward(self, xs):
            return torch.cat(xs, self.d)

    common = types.SimpleNamespace(Concat=Concat)
    entry = quant_modules._quant_entry
    quant_modules._DEFAULT_QUANT_MAP.extend(
        [entry(torch.nn, "SiLU", QuantSiLU), entry(common, "Concat", QuantConcat)]
    )
    model = replace_to_quantization_module(
        nn.ModuleList([nn.SiLU(), Concat(0), nn.Conv2d(1, 1, 1)])
    )
    assert [type(m) for m in model] == [QuantSiLU, QuantConcat, quant_nn.QuantConv2d]
    assert model[1].d == 0 and isinstance(
        model[1]._input_quantizer._calibrator, calib.HistogramCalibrator
    )
    x = torch.randn(4, 4)
    xq = fake_tensor_quant(x, x.abs().max(), 8, False, False)
    assert torch.equal(model[0](x), F.silu(xq)) and torch.equal(
        model[1]([x, x]), torch.cat([xq, xq])
    )


def test_own_modules():
    x, y, z = torch.randn(3, 8, 4).unbind()

    def quantized(value, amax):
        return fake_tensor_quant(value, torch.as_tensor(amax), 8, False, False)

    add, multi, concat = QuantAdd(), QuantMultiAdd(), QuantConcat(0)
    assert torch.equal(QuantAdd(False)(x, y), x + y) and not quantizers_of(QuantAdd(False))
    assert sorted(quantizers_of(add)) == ["_input0_quantizer", "_input1_quantizer"]
    assert torch.equal(add(x, y), quantized(x, x.abs().max()) + quantized(y, y.abs().max()))
    for module, inputs, count in ((multi, (x, y, z), 1), (concat, ([x, y],), 1), (add, (x, y), 2)):
        quantizers = [q for name, q in quantizers_of(module).items() if "input" in name]
        assert len(quantizers) == count
        for quantizer in quantizers:
            quantizer.disable_quant()
            quantizer.enable_calib()
        module(*inputs)
        for quantizer in quantizers:
            quantizer.enable_quant()
            quantizer.disable_calib()
        if module is multi:
            multi._input_quantizer.load_calib_amax()
        else:
            for quantizer in quantizers:
                quantizer.load_calib_amax("percentile", percentile=100)
    top = torch.stack([x, y, z]).abs().max()
    assert multi._input_quantizer.amax == top
    assert torch.equal(multi(x, y, z), quantized(x, top) + quantized(y, top) + quantized(z, top))
    widest = max(x.abs().max(), y.abs().max())
    step = max(x.abs().max(), y.abs().max()) / 2048
    assert widest <= concat._input_quantizer.amax <= widest + step
    restored = QuantConcat(0)
    restored.load_state_dict(concat.state_dict(), strict=True)
    assert torch.equal(restored([x, y]), concat([x, y]))


def test_replaced_forward():
    def forward(self, x):
        return self.addop(x, self.cv2(torch.relu(self.cv1(x))))

    model, x = quantized_net(), torch.randn(2, 3, 8, 8)
    before, original = model(x), Bottleneck.forward
    try:
        for module in model.modules():
            if type(module).__name__ == "Bottleneck":
                module.addop = QuantAdd()
                module.__class__.forward = forward
        assert not torch.equal(model(x), before)
        with (
            disable_quantization(model.blocks[0].addop),
            disable_quantization(model.blocks[10].addop),
        ):
            assert torch.equal(model(x), before)
        assert len([name for name in quantizers_of(model) if "addop" in name]) == 4
    finally:
        Bottleneck.forward = original


# ----------------------------------------------------------------------------------------------------------- switching


def test_disable_and_enable():
    model, x = quantized_net(), torch.randn(2, 3, 8, 8)
    quantized, path = model(x), "stem._input_quantizer"
    disable_quantization(model).apply()
    assert not any(quantizer_state(model).values())
    floating = model(x)
    with enable_quantization(model):
        assert all(quantizer_state(model).values()) and torch.equal(model(x), quantized)
    assert not any(quantizer_state(model).values()) and torch.equal(model(x), floating)
    model.stem._input_quantizer._disabled = False
    assert quantizer_state(model)[path] and sum(quantizer_state(model).values()) == 1
    assert not torch.equal(model(x), floating)
    with pytest.raises(KeyError), disable_quantization(model):
        raise KeyError
    assert all(quantizer_state(model).values())  # the opposite on exit, whatever was before
    for module in model.modules():
        if isinstance(module, TensorQuantizer) and module._disabled == False:  # noqa: E712  # as scripts have it
            module.disable()
    assert torch.equal(model(x), floating)


def test_residual_quantizer():
    quantizer = TensorQuantizer(quant_nn.QuantConv2d.default_quant_desc_input)
    conv, x = quant_nn.QuantConv2d(3, 3, 1), torch.randn(1, 3, 4, 4)
    out = conv(x)
    out += quantizer(x)
    assert torch.equal(out, conv(x) + fake_tensor_quant(x, x.abs().max(), 8, False, False))


# --------------------------------------------------------------------------------------------------------- calibration


def test_collect_and_compute_max(loader, capsys):
    model = quantized_net("max")
    inputs = []
    hook = model.stem.register_forward_hook(lambda m, args, out: inputs.append(args[0]))
    collect_stats(model, loader, num_batches=2)
    hook.remove()
    assert len(inputs) == 3  # the usual condition lets one more through
    compute_amax(model)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(quantizers_of(model)) == 13
    assert printed[0].startswith(
        "stem._input_quantizer".ljust(40) + ": TensorQuantizer(8bit fake per-tensor amax="
    )
    assert model.stem._input_quantizer.amax == torch.stack(loader[:3]).abs().max()
    weight = model.stem.weight.detach()
    assert torch.equal(
        model.stem._weight_quantizer.amax, weight.abs().amax((1, 2, 3), keepdim=True)
    )
    state = model.state_dict()
    assert state["stem._weight_quantizer._amax"].numpy().dtype == "float32"
    assert len([key for key in state if key.endswith("_quantizer._amax")]) == 13
    fresh = quantized_net("max")
    fresh.load_state_dict(state, strict=True)
    assert torch.equal(fresh(loader[0]), model(loader[0]))


def test_collect_without_calibrator(loader):
    model = quantized_net("max")
    model.head._input_quantizer._calibrator = None
    collect_stats(model, loader, 1)
    compute_amax(model)
    assert model.head._input_quantizer.amax is None and not model.head._input_quantizer._disabled
    assert torch.isfinite(model(loader[0])).all()


def test_histogram_methods(loader):
    model = quantized_net("histogram")
    collect_stats(model, loader, 10)
    quantizer, results = model.blocks[10].cv1._input_quantizer, {}
    counts = quantizer._calibrator._calib_hist.clone()
    edges = quantizer._calibrator._calib_bin_edges
    x = loader[0]
    methods = [{"method": "percentile", "percentile": p} for p in (90, 99, 99.9, 100)]
    for options in [*methods, {"method": "mse"}, {"method": "entropy"}, methods[0]]:
        compute_amax(model, **options)
        amax = quantizer.amax.clone()
        results.setdefault(tuple(options.values()), amax)
        assert amax == quantizer._calibrator.compute_amax(**options)
        assert torch.isfinite(model(x)).all()
    assert torch.equal(quantizer._calibrator._calib_hist, counts) and len(edges) == len(counts) + 1
    ordered = [float(results["percentile", p]) for p in (90, 99, 99.9, 100)]
    assert (
        ordered == sorted(ordered)
        and len(set(ordered)) > 2
        and ordered[-1] == float(edges[-1].float())
    )
    assert quantizer.amax == results["percentile", 90]  # solved again on the same data
    assert 0 < results["mse",] <= edges[-1] and 0 < results["entropy",] <= edges[-1]
    with pytest.raises(TypeError):
        quantizer.load_calib_amax()
    again = copy.deepcopy(model)  # with its calibrators
    again.head._input_quantizer._calibrator.reset()
    compute_amax(model, method="mse")
    assert model.head._input_quantizer._calibrator._calib_hist is not None


def test_amax_search():
    model, x = quantized_net(), torch.randn(2, 3, 8, 8)
    collect_stats(model, [x], 0)
    compute_amax(model)
    with disable_quantization(model):
        target = model(x)
    quantizer = model.stem._input_quantizer
    top, buffer = quantizer.amax.item(), quantizer._amax
    errors = {}
    for factor in (0.01, 0.5, 1.0):
        quantizer._amax.fill_(top * factor)
        errors[factor] = (model(x) - target).square().mean().item()
    assert quantizer._amax is buffer and errors[0.01] > errors[1.0]
    quantizer.amax.fill_(1.0)
    assert (
        quantizer._amax.item() == 1.0
        and dict(model.named_buffers())["stem._input_quantizer._amax"] is buffer
    )


# -------------------------------------------------------------------------------------------------------------- sharing


def test_shared_quantizers(loader):
    model = quantized_net()
    for block in (model.blocks[0], model.blocks[10]):
        block.add_op = QuantAdd()
        block.cv2._input_quantizer = block.cv1._input_quantizer
        block.add_op._input0_quantizer = block.add_op._input1_quantizer = block.cv1._input_quantizer
    block = model.blocks[0]
    seen = []
    note = [
        conv.register_forward_hook(lambda m, args, out: seen.append(args[0].abs().max()))
        for conv in (block.cv1, block.cv2)
    ]
    collect_stats(model, loader, 10)
    for hook in note:
        hook.remove()
    compute_amax(model)
    amax = block.cv1._input_quantizer.amax
    # The range covers all sharers.
    assert block.cv2._input_quantizer.amax is amax and amax == max(seen)
    state = model.state_dict()
    keys = [f"blocks.0.{name}._amax" for name in ("cv1._input_quantizer", "cv2._input_quantizer")]
    assert all(key in state and torch.equal(state[key], amax) for key in keys)
    assert "blocks.0.add_op._input1_quantizer._amax" in state
    for again in (
        copy.deepcopy(model),
        torch.load(saved({"model": model}), weights_only=False)["model"],
    ):
        shared = again.blocks[0]
        assert (
            shared.cv1._input_quantizer
            is shared.cv2._input_quantizer
            is shared.add_op._input0_quantizer
        )
        assert shared.cv1._input_quantizer is not block.cv1._input_quantizer
        assert [name for name, _ in again.named_modules()] == [
            name for name, _ in model.named_modules()
        ]
        shared.cv1._input_quantizer._amax.fill_(0.5)
        assert shared.cv2._input_quantizer.amax == 0.5 and block.cv1._input_quantizer.amax == amax
        again.load_state_dict(torch.load(saved(state)), strict=True)
        assert torch.equal(again(loader[0]), model(loader[0]))


def saved(value):
    stream = io.BytesIO()
    torch.save(value, stream)
    stream.seek(0)
    return stream


# ------------------------------------------------------------------------------------------ fine-tuning and sensitivity


def finetune(model, loader, policy=None, schedule=None, epochs=2, callback=None):
    teacher = copy.deepcopy(model).eval()
    disable_quantization(teacher).apply()
    model.train().requires_grad_(True)
    pairs, rates = [], []
    for (name, mine), (other_name, other) in zip(
        model.named_modules(), teacher.named_modules(), strict=True
    ):
        assert name == other_name
        if isinstance(mine, TensorQuantizer) or not name or (policy and policy(name, mine)):
            continue
        pairs.append((mine, other))
    optimizer = torch.optim.Adam(model.parameters(), 1e-5)
    losses = []
    for epoch in range(epochs):
        if epoch in (schedule or {}):
            for group in optimizer.param_groups:
                group["lr"] = schedule[epoch]
        rates.append(optimizer.param_groups[0]["lr"])
        outputs, targets, hooks = [], [], []
        for mine, other in pairs:
            hooks.append(
                mine.register_forward_hook(lambda m, args, out, store=outputs: store.append(out))
            )
            hooks.append(
                other.register_forward_hook(lambda m, args, out, store=targets: store.append(out))
            )
        for images in loader:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=False):
                model(images)
                with torch.no_grad():
                    teacher(images)
                loss = sum(F.mse_loss(*pair) for pair in zip(outputs, targets, strict=True))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            outputs.clear()
            targets.clear()
        for hook in hooks:
            hook.remove()
        if callback and callback(model, epoch, rates[-1]):
            break
    return losses, rates


def test_finetune(loader):
    model = quantized_net()
    collect_stats(model, loader, 4)
    compute_amax(model)
    ranges = {
        key: value.clone() for key, value in model.state_dict().items() if key.endswith("_amax")
    }
    weights = {name: value.detach().clone() for name, value in model.named_parameters()}
    losses, rates = finetune(
        model,
        loader[:1] * 3,
        policy=lambda name, module: not isinstance(module, (_utils.QuantMixin, nn.Sequential)),
        schedule={0: 1e-4, 1: 5e-5},
        epochs=5,
        callback=lambda model, epoch, rate: epoch == 1,
    )
    assert rates == [1e-4, 5e-5] and len(losses) == 6 and losses[-1] < losses[0]
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in ranges.items())
    assert all(
        not torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters()
    )
    assert not any(m._forward_hooks for m in model.modules()) and all(
        quantizer_state(model).values()
    )


def test_sensitivity(loader):
    model, x = quantized_net(), loader[0]
    collect_stats(model, loader, 4)
    compute_amax(model)
    reference = copy.deepcopy(model)
    disable_quantization(reference).apply()
    target, whole = reference(x), model(x)

    def error():
        return (model(x) - target).square().mean().item()

    summary = []
    for name, block in model.named_children():
        if any(isinstance(m, TensorQuantizer) for m in block.modules()):
            disable_quantization(block).apply()
            summary.append((error(), name))
            enable_quantization(block).apply()
    assert sorted(name for _, name in summary) == ["blocks", "head", "pool", "stem"]
    assert torch.equal(model(x), whole) and len({value for value, _ in summary}) == 4
    disable_quantization(model).apply()
    assert error() == 0
    for layer in (m for m in model.modules() if isinstance(m, _utils.QuantMixin)):
        with enable_quantization(layer):
            assert error() > 0
    assert error() == 0

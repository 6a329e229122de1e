"""The automatic swap: what is bound while it is active, and that all of it is undone."""

import logging
import types

import pytest
import torch
import torch.nn.functional as F

import qdq
import qdq.compat as pytorch_quantization
from qdq.compat import nn as quant_nn
from qdq.compat import quant_modules
from qdq.compat.nn.modules import _utils
from qdq.errors import QdqError

MAPPED = [
    f"{kind}{rank}d"
    for kind in ("Conv", "ConvTranspose", "AvgPool", "AdaptiveAvgPool")
    for rank in "123"
]
MAPPED += ["Linear", "LSTM", "LSTMCell"]
FLOAT = {
    name: getattr(torch.nn, name)
    for name in dir(torch.nn)
    if isinstance(getattr(torch.nn, name), type)
}


@pytest.fixture(autouse=True)
def _restore():
    before = list(quant_modules._DEFAULT_QUANT_MAP)
    yield
    quant_modules.deactivate()
    quant_modules._DEFAULT_QUANT_MAP[:] = before
    assert is_float()


def is_float():
    return all(getattr(torch.nn, name) is cls for name, cls in FLOAT.items())


def bound():
    """The names in torch.nn that are quantized now."""
    return {name for name, cls in FLOAT.items() if getattr(torch.nn, name) is not cls}


class QuantSiLU(torch.nn.SiLU, _utils.QuantInputMixin):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.init_quantizer(self.default_quant_desc_input)

    def forward(self, x):
        return super().forward(self._input_quantizer(x))


def test_map():
    entries = quant_modules._DEFAULT_QUANT_MAP
    assert isinstance(entries, list) and sorted(entry.mod_name for entry in entries) == sorted(
        MAPPED
    )
    for entry in entries:
        assert entry.orig_mod is torch.nn and entry.replace_mod is getattr(
            quant_nn, f"Quant{entry.mod_name}"
        )
        assert entry == quant_modules._quant_entry(*entry) and type(entry).__name__ == "quant_entry"
    assert quant_modules._quant_entry._fields == ("orig_mod", "mod_name", "replace_mod")
    assert pytorch_quantization.initialize is quant_modules.initialize
    assert isinstance(
        quant_modules._quant_module_helper_object, quant_modules.QuantModuleReplacementHelper
    )


def test_on_and_off():
    quant_modules.deactivate()
    assert is_float()
    quant_modules.initialize()
    assert bound() == set(MAPPED)
    inside = torch.nn.Conv2d(3, 4, 3, device="cpu", dtype=torch.float64)
    early = FLOAT["Conv2d"](3, 4, 3)
    assert type(inside) is quant_nn.QuantConv2d and type(early) is FLOAT["Conv2d"]
    assert isinstance(inside, FLOAT["Conv2d"])
    net = torch.nn.Sequential(inside, torch.nn.MaxPool2d(2), torch.nn.BatchNorm2d(4))
    quant_modules.deactivate()
    assert (
        is_float() and type(net[0]) is quant_nn.QuantConv2d and type(net[1]) is torch.nn.MaxPool2d
    )
    assert type(torch.nn.Conv2d(3, 4, 3)) is FLOAT["Conv2d"]


@pytest.mark.parametrize("times", [1, 2, 3])
def test_repeated(times):
    for _ in range(times):
        quant_modules.initialize()
        assert bound() == set(MAPPED)
    quant_modules.deactivate()
    assert is_float()
    quant_modules.deactivate()
    assert is_float()


def test_each_call_starts_from_float(caplog):
    quant_modules.initialize()
    quant_modules.initialize(float_module_list=["Linear", "LSTM"])
    assert bound() == set(MAPPED) - {"Linear", "LSTM"} and torch.nn.Linear is FLOAT["Linear"]
    quant_modules.initialize(["Conv2d"], [(torch.nn, "SiLU", QuantSiLU)])
    assert bound() == (set(MAPPED) | {"SiLU"}) - {"Conv2d"}
    assert not caplog.records
    quant_modules.initialize()
    assert bound() == set(MAPPED)


def test_unknown_float_name_is_warned(caplog):
    with caplog.at_level(logging.WARNING):
        quant_modules.initialize(float_module_list=["Linear", "MaxPool2d", "Conv2D"])
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "MaxPool2d" in record.getMessage().split(":")[0] and "Conv2D" in record.getMessage()
    assert bound() == set(MAPPED) - {"Linear"}


def test_custom_modules(caplog):
    models = types.SimpleNamespace(Concat=torch.nn.Identity)
    # Wins over the list.
    quant_modules.initialize(["MaxPool2d"], [(torch.nn, "MaxPool2d", quant_nn.QuantMaxPool2d)])
    assert torch.nn.MaxPool2d is quant_nn.QuantMaxPool2d and not caplog.records
    custom = [
        (torch.nn, "Linear", QuantSiLU),
        (models, "Concat", QuantSiLU),
        (torch.nn, "SiLU", QuantSiLU),
    ]
    quant_modules.initialize(float_module_list=["Linear"], custom_quant_modules=custom)
    assert (
        torch.nn.Linear is QuantSiLU
        and models.Concat is QuantSiLU
        and type(torch.nn.SiLU()) is QuantSiLU
    )
    x = torch.randn(50)
    layer = torch.nn.SiLU()
    assert torch.equal(layer(x), F.silu(layer._input_quantizer(x))) and not torch.equal(
        layer(x), F.silu(x)
    )
    quant_modules.deactivate()
    assert is_float() and models.Concat is torch.nn.Identity
    quant_modules.initialize()
    assert models.Concat is torch.nn.Identity and bound() == set(MAPPED)


@pytest.mark.parametrize(
    "wrong", [("SiLU", QuantSiLU), (torch.nn, "SiLUU", QuantSiLU), "SiLU", None, 3]
)
def test_wrong_custom_entry(wrong):
    quant_modules.initialize()
    with pytest.raises(TypeError, match="not an entry") as caught:
        quant_modules.initialize(custom_quant_modules=[wrong])
    assert isinstance(caught.value, QdqError)
    quant_modules.deactivate()
    assert is_float()


def test_extended_map():
    common = types.SimpleNamespace(Concat=torch.nn.Identity)
    quant_modules._DEFAULT_QUANT_MAP.extend(
        [
            quant_modules._quant_entry(torch.nn, "SiLU", QuantSiLU),
            quant_modules._quant_entry(common, "Concat", QuantSiLU),
        ]
    )
    quant_modules.initialize()
    assert bound() == {*MAPPED, "SiLU"} and common.Concat is QuantSiLU
    quant_modules.initialize(float_module_list=["Concat"])
    assert common.Concat is torch.nn.Identity and torch.nn.SiLU is QuantSiLU
    del quant_modules._DEFAULT_QUANT_MAP[:]  # entries may go while they are bound
    quant_modules.deactivate()
    assert is_float() and common.Concat is torch.nn.Identity


def test_replaced_entry_wins():
    class Own(quant_nn.QuantConv2d):
        pass

    quant_modules._DEFAULT_QUANT_MAP.append(quant_modules._quant_entry(torch.nn, "Conv2d", Own))
    quant_modules.initialize()
    assert type(torch.nn.Conv2d(1, 1, 1)) is Own
    quant_modules.deactivate()
    assert is_float()


def test_exception_between():
    def build():
        quant_modules.initialize()
        raise KeyError("model")

    for _ in range(2):
        with pytest.raises(KeyError):
            build()
    quant_modules.deactivate()
    assert is_float()


def test_derived_while_active(caplog):
    quant_modules.initialize()
    with caplog.at_level(logging.WARNING):

        class Plain(torch.nn.Conv2d):
            def __init__(self, cin, cout):
                super().__init__(cin, cout, 3, padding=1, padding_mode="reflect")

        class Through(torch.nn.Conv2d):
            def forward(self, x):
                return torch.relu(super().forward(x))

        class Inner(torch.nn.Linear):
            def _helper(self):
                return self.weight

    assert not caplog.records
    x, plain = torch.randn(1, 2, 5, 5), Plain(2, 3)
    assert isinstance(plain, quant_nn.QuantConv2d)
    through = Through(2, 3, 3)
    quant_modules.deactivate()
    expected = F.conv2d(*through._quant(x), through.bias).relu()
    assert torch.equal(through(x), expected)
    padded = F.pad(plain._input_quantizer(x), [1] * 4, mode="reflect")
    assert torch.equal(
        plain(x), F.conv2d(padded, plain._weight_quantizer(plain.weight), plain.bias)
    )
    assert isinstance(Inner(2, 3), quant_nn.QuantLinear)


def test_hidden_weight_is_warned(caplog):
    quant_modules.initialize()
    with caplog.at_level(logging.WARNING):

        class Direct(torch.nn.Conv2d):
            def forward(self, x):
                return F.conv2d(x, self.weight, self.bias)

    assert len(caplog.records) == 1
    assert "Direct" in caplog.text and "self.weight" in caplog.text and "_quant" in caplog.text
    caplog.clear()

    class Careful(torch.nn.Conv2d):
        def forward(self, x):
            x, weight = self._quant(x)
            return F.conv2d(x, weight, self.bias) * self.weight.numel()

    class ByProperty(torch.nn.Linear):
        def forward(self, x):
            return F.linear(self.input_quantizer(x), self.weight_quantizer(self.weight), self.bias)

    assert not caplog.records
    assert Careful(1, 1, 1)(torch.ones(1, 1, 2, 2)).shape == (1, 1, 2, 2)
    assert ByProperty(2, 2)(torch.ones(1, 2)).shape == (1, 2)


def test_helper_alone():
    helper = quant_modules.QuantModuleReplacementHelper()
    assert helper.default_quant_map is quant_modules._DEFAULT_QUANT_MAP
    assert len(helper.orginal_func_map) == 0 and len(helper.quant_map) == 0
    helper.restore_float_modules()
    helper.prepare_state(["Linear"], [(torch.nn, "SiLU", QuantSiLU)])
    assert is_float()
    assert {entry.mod_name for entry in helper.quant_map} == ({*MAPPED} | {"SiLU"}) - {"Linear"}
    helper.apply_quant_modules()
    assert bound() == ({*MAPPED} | {"SiLU"}) - {"Linear"}
    originals = {entry.mod_name: entry.replace_mod for entry in helper.orginal_func_map}
    assert originals == {name: FLOAT[name] for name in bound()}
    helper.apply_quant_modules()
    helper.restore_float_modules()
    assert is_float()
    helper.prepare_state()
    assert [entry.mod_name for entry in helper.quant_map] == [
        e.mod_name for e in quant_modules._DEFAULT_QUANT_MAP
    ]


def test_helpers_nest():
    helper = quant_modules.QuantModuleReplacementHelper()
    quant_modules.initialize(float_module_list=["Linear"])
    helper.prepare_state(custom_map=[(torch.nn, "Linear", quant_nn.QuantLinear)])
    helper.apply_quant_modules()
    assert torch.nn.Linear is quant_nn.QuantLinear
    helper.restore_float_modules()
    assert bound() == set(MAPPED) - {"Linear"}
    quant_modules.deactivate()
    assert is_float()


def test_core_swap_while_torch_is_patched():
    from torchvision.models import resnet18

    model = resnet18()
    expected = qdq.plan_swap(model)
    quant_modules.initialize()
    assert qdq.swap_modules(model) == expected
    assert qdq.restore_modules(model) == 21
    assert type(model.conv1) is FLOAT["Conv2d"]


def test_restore_of_a_class_that_only_exists_quantized(caplog):
    class Scaled(quant_nn.QuantLinear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = torch.nn.Sequential(quant_nn.QuantLinear(3, 3), Scaled(3, 3)).eval()
    x = torch.randn(2, 3)
    expected = 2 * F.linear(
        F.linear(x, model[0].weight, model[0].bias), model[1].weight, model[1].bias
    )
    assert qdq.restore_modules(model) == 1
    assert type(model[0]) is FLOAT["Linear"]
    assert type(model[1]) is Scaled
    assert "1 (Scaled)" in caplog.text
    assert torch.equal(model(x), expected)

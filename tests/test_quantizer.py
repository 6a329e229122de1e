import copy
import io

import numpy as np
import pytest
import torch
from pretended_device import list_waits, watch
from quantize_reference import FORMATS, edge_values, reference, same_bits
from torch import nn

from qdq import (
    ArgumentError,
    ArgumentTypeError,
    CalibrationError,
    Schedule,
    StateError,
    calibrate_model,
    finetune,
    load_tuned,
    rewire_operations,
    save_tuned,
    swap_modules,
)
from qdq.formats import AMAX_FLOOR, Format
from qdq.nn import QuantConv2d
from qdq.quantize import fake_quantize
from qdq.quantizer import (
    QuantDescriptor,
    SharedQuantizer,
    TensorQuantizer,
    disable_quantization,
    enable_quantization,
    named_quantizers,
)


@pytest.mark.parametrize(
    "field", [{"num_bits": 8.0}, {"num_bits": True}, {"axis": "0"}, {"name": 3}]
)
def test_descriptor_refuses_kinds(field):
    with pytest.raises(ArgumentTypeError, match=next(iter(field))):
        QuantDescriptor(**field)


def test_descriptor_refuses_widths():
    with pytest.raises(ArgumentError, match="2 to 16"):
        QuantDescriptor(num_bits=17)


def test_descriptor_names_the_nearest_method():
    with pytest.raises(ArgumentError, match="did you mean 'histogram'"):
        QuantDescriptor(calib_method="histgoram")


def test_descriptor_is_a_value():
    a, b = (
        QuantDescriptor(4, axis=0, amax=[1.0, 2.0]),
        QuantDescriptor(4, axis=0, amax=np.array([1.0, 2.0])),
    )
    assert a == b
    assert hash(a) == hash(b)


class TestTensorQuantizer:
    def test_states(self):
        quantizer = TensorQuantizer(QuantDescriptor(amax=1.0))
        x = torch.randn(10)
        assert not torch.equal(quantizer(x), x)
        quantizer.disable()
        assert quantizer(x) is x
        quantizer.enable()
        quantizer.disable_quant()
        quantizer.enable_calib()
        assert quantizer(x) is x
        quantizer.load_calib_amax()
        assert quantizer.amax == x.abs().max()

    def test_dynamic_before_calibration(self):
        x = torch.randn(3, 7)
        same_bits(TensorQuantizer()(x), reference(x, x.abs().max(), Format()))
        result = TensorQuantizer(QuantDescriptor(axis=0))(x)
        same_bits(result, reference(x, x.abs().amax(1), Format(), 0))

    @pytest.mark.parametrize("amax", [1.5, [0.5, 1.5, 2.5]])
    def test_amax_round_trips_through_the_state_dict(self, amax):
        desc = QuantDescriptor(axis=0 if isinstance(amax, list) else None)
        source, target = TensorQuantizer(desc), TensorQuantizer(desc)
        assert source.state_dict() == {}
        source.amax = amax
        target.load_state_dict(source.state_dict())
        assert torch.equal(target.amax, source.amax)
        assert target.amax.data_ptr() != source.amax.data_ptr()

    def test_loading_nan_is_refused(self):
        with pytest.raises(ArgumentError, match="NaN"):
            TensorQuantizer().load_state_dict({"_amax": torch.tensor(float("nan"))})

    def test_one_element_shapes_are_the_same(self):
        quantizer = TensorQuantizer(QuantDescriptor(amax=1.0))
        quantizer.load_state_dict({"_amax": torch.tensor([[3.0]])})
        assert quantizer.amax.shape == ()
        assert quantizer.amax == 3

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
    def test_bad_amax_is_refused(self, bad):
        with pytest.raises(ArgumentError, match="amax"):
            TensorQuantizer().amax = bad

    def test_shape_cannot_change(self):
        quantizer = TensorQuantizer(QuantDescriptor(axis=0, amax=[1.0, 2.0]))
        with pytest.raises(StateError, match="Changing shape"):
            quantizer.amax = [1.0, 2.0, 3.0]

    def test_edits_in_place_take_effect(self):
        quantizer = TensorQuantizer(QuantDescriptor(amax=1.0))
        quantizer._amax.fill_(10.0)
        assert quantizer(torch.tensor([5.0])).item() == pytest.approx(5.0, abs=0.05)

    def test_scale_without_amax_teaches(self):
        with pytest.raises(StateError, match="calibrate"):
            _ = TensorQuantizer().scale

    def test_load_without_data_teaches(self):
        with pytest.raises(StateError, match="saw no data"):
            TensorQuantizer().load_calib_amax()

    def test_nan_while_calibrating_names_the_quantizer(self):
        quantizer = TensorQuantizer(
            QuantDescriptor(name="conv1._input_quantizer"), if_calib=True, if_quant=False
        )
        with pytest.raises(CalibrationError, match=r"conv1\._input_quantizer: 1 of 2 values"):
            quantizer(torch.tensor([1.0, float("inf")]))

    def test_repr_says_what_it_does(self):
        assert repr(TensorQuantizer()) == "TensorQuantizer(8bit per-tensor amax=dynamic quant)"

    def test_survives_deepcopy(self):
        quantizer = TensorQuantizer(QuantDescriptor(amax=1.0))
        twin = copy.deepcopy(quantizer)
        twin.amax = 2.0
        assert quantizer.amax == 1

    def test_range_stays_float32_in_a_model_of_halves(self):
        quantizer = TensorQuantizer(QuantDescriptor(amax=70000.0)).half()
        assert quantizer.amax.dtype == torch.float32
        assert quantizer.amax == 70000
        assert torch.isfinite(quantizer(torch.tensor([60000.0], dtype=torch.float16))).all()

    def test_meta_device(self):
        quantizer = TensorQuantizer(QuantDescriptor(amax=1.0)).to("meta")
        assert "meta" in repr(quantizer)

    def test_same_bits_on_the_gpu(self, gpu):
        for fmt in FORMATS:
            x = torch.from_numpy(edge_values(1.3, fmt).astype(np.float32))
            same_bits(
                fake_quantize(x.to(gpu), torch.tensor(1.3, device=gpu), fmt).cpu(),
                reference(x, 1.3, fmt),
            )
        quantizer = TensorQuantizer(QuantDescriptor(amax=1.0))
        quantizer(torch.ones(3, device=gpu))
        assert quantizer.amax.device == gpu


class TestSwitch:
    def model(self):
        return nn.Sequential(
            QuantConv2d(3, 8, 3), nn.Sequential(QuantConv2d(8, 8, 3), QuantConv2d(8, 8, 3))
        )

    def flags(self, model):
        return [m._disabled for m in model.modules() if isinstance(m, TensorQuantizer)]

    def test_as_a_call_it_lasts(self):
        model = self.model()
        disable_quantization(model[1])
        assert self.flags(model) == [False] * 2 + [True] * 4
        enable_quantization(model)
        assert not any(self.flags(model))

    def test_as_a_block_it_puts_back_what_was_there(self):
        model = self.model()
        model[1][0].input_quantizer.disable()
        former = self.flags(model)
        with disable_quantization(model):
            assert all(self.flags(model))
            with enable_quantization(model[0]):
                assert self.flags(model)[:2] == [False, False]
            assert all(self.flags(model))
        assert self.flags(model) == former

    def test_puts_back_after_an_exception(self):
        model = self.model()
        with pytest.raises(RuntimeError, match="inside"), disable_quantization(model):
            raise RuntimeError("inside")
        assert not any(self.flags(model))


class TestLearnedRange:
    def test_there_and_back(self):
        quantizer = TensorQuantizer(QuantDescriptor(amax=[1.0, 0.0, 3.0], axis=0))
        parameter = quantizer.learn_range()
        assert list(quantizer.parameters()) == [parameter]
        assert "_amax" not in quantizer.state_dict()
        quantizer.keep_range()
        assert quantizer.state_dict().keys() == {"_amax"}
        assert torch.allclose(quantizer.amax, torch.tensor([1.0, 2.0**-64, 3.0]))
        quantizer.keep_range()

    def test_no_step_makes_it_negative(self):
        quantizer = TensorQuantizer(QuantDescriptor(amax=1.0))
        optimizer = torch.optim.SGD([quantizer.learn_range("pact")], lr=1e5)
        for _ in range(5):
            optimizer.zero_grad()
            quantizer(torch.tensor([5.0, 6.0])).sum().backward()
            optimizer.step()
        assert quantizer.amax.item() == AMAX_FLOOR

    def test_who_shares_a_range_learns_the_same(self):
        leader = TensorQuantizer(QuantDescriptor(amax=1.0))
        parameter = leader.learn_range()
        SharedQuantizer(leader)(torch.tensor([5.0])).sum().backward()
        assert parameter.grad.item() > 0

    def test_misuse_teaches(self):
        quantizer = TensorQuantizer()
        with pytest.raises(StateError, match="no amax to start from"):
            quantizer.learn_range()
        quantizer.amax = 1.0
        with pytest.raises(ArgumentError, match=r"rule is 'lsqq'.*did you mean 'lsq'"):
            quantizer.learn_range("lsqq")
        quantizer.learn_range()
        with pytest.raises(StateError, match="being learned"):
            quantizer.amax = 2.0


@pytest.mark.parametrize("shape", [(6, 4, 3, 3), (4, 4, 3, 3)])
@pytest.mark.parametrize("axis", [0, 1])
def test_the_shape_of_ranges_says_their_axis(shape, axis):
    """Ranges of a checkpoint may lie on another axis than the quantizer has; a square weight fits both."""
    weight = torch.randn(shape)
    amax = weight.abs().amax([dim for dim in range(4) if dim != axis], keepdim=True)
    expected = reference(weight, amax.flatten(), Format(), axis)
    quantizer = TensorQuantizer(QuantDescriptor(axis=1 - axis))
    quantizer.amax = amax
    assert (quantizer.axis, quantizer.range_axis) == (1 - axis, axis)
    same_bits(quantizer(weight), expected)
    calibrated = TensorQuantizer(QuantDescriptor(axis=1 - axis))
    calibrated.amax = weight.abs().amax(
        [dim for dim in range(4) if dim == axis or dim > 1], keepdim=True
    )
    with pytest.raises(StateError, match="Changing shape"):
        calibrated.amax = amax
    for loaded in (TensorQuantizer(QuantDescriptor(axis=1 - axis)), calibrated):
        loaded.load_state_dict(quantizer.state_dict())
        same_bits(loaded(weight), expected)
        same_bits(loaded(weight.clone().requires_grad_()).detach(), expected)
    recalibrated = weight.abs().amax(
        [dim for dim in range(4) if dim == axis or dim > 1], keepdim=True
    )
    loaded.amax = recalibrated  # calibrated again, on the axis of the quantizer
    same_bits(loaded(weight), reference(weight, recalibrated.flatten(), Format(), 1 - axis))


class TestOnTheGpu:
    """A range is on the device of its quantizer, whatever it comes from."""

    @pytest.fixture
    def quantizer(self, gpu):
        return TensorQuantizer().to(gpu)

    def test_it_is_set(self, quantizer, gpu):
        for value in (2.0, [3.0], np.float32(4), torch.tensor(5.0), torch.tensor(6.0, device=gpu)):
            quantizer.amax = value
            assert quantizer.amax.device == gpu
            assert quantizer.amax.item() == np.asarray(torch.as_tensor(value).cpu()).item()

    def test_setting_does_not_wait(self, quantizer, gpu):
        with watch(gpu) as events:
            quantizer.amax = 2.0
            quantizer.amax = np.float32(3)
        assert list_waits(events) == []

    def test_it_moves_before_and_after_it_has_a_range(self, gpu):
        quantizer = TensorQuantizer()
        assert quantizer.device.type == "cpu"
        assert quantizer.to(gpu).device == gpu
        quantizer.half()
        quantizer.amax = 1.0
        assert quantizer.amax.dtype == torch.float32
        assert quantizer.cpu().amax.device.type == "cpu"
        quantizer.to(gpu)
        quantizer.learn_range()
        assert quantizer.device == gpu
        quantizer.keep_range()
        assert quantizer.amax.device == gpu

    def test_it_is_copied_pickled_and_loaded_elsewhere(self, quantizer, gpu):
        assert copy.deepcopy(quantizer).device == gpu
        file = io.BytesIO()
        torch.save(nn.Sequential(quantizer), file)
        for location in (gpu, torch.device("cpu")):
            file.seek(0)
            loaded = torch.load(file, map_location=location, weights_only=False)[0]
            loaded.amax = 1.0
            assert loaded.amax.device == location

    def test_a_state_is_loaded(self, gpu):
        state = TensorQuantizer(QuantDescriptor(amax=2.0)).state_dict()
        for saved in (state, {"_amax": state["_amax"].to(gpu)}):
            for location in (gpu, torch.device("cpu")):
                quantizer = TensorQuantizer().to(location)
                quantizer.load_state_dict(saved)
                assert quantizer.amax.device == location
        quantizer = TensorQuantizer()
        quantizer.load_state_dict({"_amax": state["_amax"].to(gpu)}, assign=True)
        assert quantizer.device == gpu

    def test_without_data_first(self, gpu):
        with torch.device("meta"):
            layer = QuantConv2d(3, 4, 3)
        layer.to_empty(device=gpu)
        layer.weight_quantizer.amax = torch.ones(4, 1, 1, 1)
        assert layer.weight_quantizer.amax.device == gpu

    def test_built_there(self, gpu):
        layer = QuantConv2d(3, 4, 3, device=gpu)
        assert {quantizer.device for quantizer in layer.quantizers().values()} == {gpu}

    def test_another_range_for_a_while(self, quantizer, gpu):
        values = torch.randn(5, device=gpu)
        for former in (None, 1.0):
            if former:
                quantizer.amax = former
            with watch(gpu) as events, quantizer.using_range(0.5):
                assert quantizer.amax.device == gpu
                quantizer(values)
            assert list_waits(events) == []

    def test_a_shared_range(self, quantizer, gpu):
        shared = SharedQuantizer(quantizer)
        assert shared.device == gpu
        shared.amax = 1.0
        assert quantizer.amax.device == gpu
        values = torch.randn(5, device=gpu)
        assert torch.equal(shared(values), quantizer(values))

    def test_collecting_finds_the_device(self, gpu):
        quantizer = TensorQuantizer(if_quant=False, if_calib=True)
        quantizer(torch.ones(3, device=gpu))
        quantizer.load_calib_amax()
        assert quantizer.amax.device == gpu

    @pytest.mark.parametrize("rule", [None, "lsq"])
    def test_a_forward_does_not_wait(self, quantizer, rule, gpu):
        quantizer.amax = 1.0
        if rule:
            quantizer.learn_range(rule)
        values = torch.randn(5, device=gpu, requires_grad=True)
        with watch(gpu) as events:
            quantizer(values).sum().backward()
        assert list_waits(events) == []

    def test_a_constant_of_the_cpu_in_a_forward_raises(self, gpu, monkeypatch):
        quantizer = TensorQuantizer(QuantDescriptor(axis=0)).to(gpu)
        monkeypatch.setattr(quantizer, "_range_for", lambda inputs: torch.ones(3))
        with pytest.raises(RuntimeError, match="same device"):
            quantizer(torch.ones(3, device=gpu))


class Attending(nn.Module):
    """Attention with a shortcut."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 16)

    def forward(self, tokens):
        return self.head(self.attention(tokens, tokens, tokens)[0] + tokens)


class Recurrent(nn.Module):
    """Recurrent layers in float before a quantized one."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(16, 16, batch_first=True)
        self.gru = nn.GRU(16, 16, batch_first=True)
        self.head = nn.Linear(16, 16)

    def forward(self, tokens):
        return self.head(self.gru(self.lstm(tokens)[0])[0] + tokens)


class TestCalibratedOnTheGpu:
    """What follows calibration at once, with no forward between that could move a range."""

    @pytest.fixture(params=["residual", "attention", "recurrent"])
    def calibrated(self, request, gpu):
        """A model and a batch on the device."""
        if request.param == "residual":
            model, batch = request.getfixturevalue("residual"), torch.randn(4, 3, 6, 6)
        else:
            sequences = {"attention": Attending, "recurrent": Recurrent}
            model, batch = sequences[request.param]().eval(), torch.randn(2, 3, 16)
        model, batch = model.to(gpu), batch.to(gpu)
        swap_modules(model, batch)
        rewire_operations(model, batch)
        ranges = calibrate_model(model, [batch])
        assert ranges
        return model, batch

    def test_ranges(self, calibrated, gpu):
        model, _ = calibrated
        quantizers = [quantizer for _, quantizer in named_quantizers(model)]
        assert {quantizer.amax.device for quantizer in quantizers} == {gpu}
        assert {quantizer.device for quantizer in quantizers} == {gpu}

    def test_torch_export(self, calibrated):
        model, batch = calibrated
        program = torch.export.export(model, (batch,))
        assert torch.equal(program.module()(batch), model(batch))

    @pytest.mark.parametrize("method", ["frozen", "lsq", "pact", "ema"])
    def test_finetune(self, calibrated, method, gpu):
        model, batch = calibrated
        finetune(model, [batch] * 2, schedule=Schedule(steps=2), ranges=method)
        assert {quantizer.amax.device for _, quantizer in named_quantizers(model)} == {gpu}

    def test_forward_does_not_wait(self, calibrated, gpu):
        model, batch = calibrated
        with watch(gpu) as events:
            model(batch).sum().backward()
        assert list_waits(events) == []

    def test_tuned_weights_are_loaded(self, calibrated, gpu, tmp_path):
        model, batch = calibrated
        save_tuned(model, tmp_path / "tuned.safetensors")
        twin = copy.deepcopy(model)
        for _, quantizer in named_quantizers(twin):
            quantizer._buffers.pop("_amax", None)
        load_tuned(twin, tmp_path / "tuned.safetensors")
        assert {quantizer.amax.device for _, quantizer in named_quantizers(twin)} == {gpu}
        assert torch.equal(torch.export.export(twin, (batch,)).module()(batch), model(batch))

    def test_torch_compile(self, gpu):
        model, batch = (
            nn.Sequential(nn.Linear(16, 16), nn.ReLU()).to(gpu),
            torch.randn(2, 16, device=gpu),
        )
        swap_modules(model, batch)
        calibrate_model(model, [batch])
        assert torch.equal(torch.compile(model, backend="aot_eager")(batch), model(batch))

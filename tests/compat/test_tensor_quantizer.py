"""`qdq.compat.nn.TensorQuantizer`: attributes, setters, order of the forward, state dict, texts."""

import copy
import io
import logging
import math

import numpy as np
import pytest
import torch
from pretended_device import list_waits, watch
from torch import nn

from qdq.compat import calib
from qdq.compat.nn import TensorQuantizer
from qdq.compat.tensor_quant import QuantDescriptor, fake_tensor_quant, scaled_e4m3, tensor_quant
from qdq.errors import QdqError


def make(**fields):
    return TensorQuantizer(QuantDescriptor(**fields))


def raises_ours(kind, words, call):
    with pytest.raises(kind, match=words) as found:
        call()
    assert isinstance(found.value, QdqError)


def collect(quantizer, *batches):
    quantizer.disable_quant()
    quantizer.enable_calib()
    for batch in batches:
        assert quantizer(batch) is batch or quantizer._if_clip
    quantizer.disable_calib()
    quantizer.enable_quant()


def levels(caplog):
    return [r.levelno for r in caplog.records]


class Pair(nn.Module):
    def __init__(self, **fields):
        super().__init__()
        self._input_quantizer, self._weight_quantizer = make(**fields), make(axis=0)

    def forward(self, x):
        return self._input_quantizer(x)


class TestConstruction:
    def test_defaults(self):
        q = TensorQuantizer()
        attributes = (
            "_num_bits",
            "_fake_quant",
            "_axis",
            "_scale_amax",
            "_learn_amax",
            "_unsigned",
            "_narrow_range",
        )
        assert [getattr(q, a) for a in attributes] == [8, True, None, None, False, False, False]
        flags = ("_disabled", "_if_quant", "_if_clip", "_if_calib")
        assert [getattr(q, flag) for flag in flags] == [False, True, False, False]
        assert not hasattr(q, "_amax")
        assert not hasattr(q, "_pre_quant_scale")
        assert not hasattr(q, "clip")
        assert q.amax is None
        assert q.pre_quant_scale is None
        assert not list(q.state_dict())
        assert isinstance(q._calibrator, calib.MaxCalibrator)
        assert (TensorQuantizer.use_fb_fake_quant, TensorQuantizer._enable_onnx_export) == (
            False,
            False,
        )
        q = TensorQuantizer(QuantDescriptor(), True, False, True, True)
        assert [getattr(q, flag) for flag in flags] == [True, False, True, True]

    @pytest.mark.parametrize(
        ("method", "kind"), [("max", "MaxCalibrator"), ("histogram", "HistogramCalibrator")]
    )
    def test_calibrators(self, method, kind):
        c = make(calib_method=method, num_bits=4, unsigned=True)._calibrator
        assert type(c) is getattr(calib, kind)
        assert (c._num_bits, c._axis, c._unsigned) == (4, None, True)

    def test_misspelt_method_leaves_no_calibrator(self, caplog):
        q = make(calib_method="histgoram")
        assert levels(caplog) == [logging.WARNING]
        assert "histogram" in caplog.text
        assert q._calibrator is None
        assert "calibrator" not in repr(q)
        assert (
            q(torch.tensor([1.0, -2.0])).tolist()
            == fake_tensor_quant(torch.tensor([1.0, -2.0]), 2.0).tolist()
        )

    def test_wrong_descriptor(self):
        raises_ours(TypeError, "QuantDescriptor", lambda: TensorQuantizer(8))

    @pytest.mark.parametrize(
        ("fields", "flags", "text"),
        [
            ({}, {}, "8bit fake per-tensor amax=dynamic calibrator=MaxCalibrator scale=1.0 quant"),
            ({}, {"disabled": True}, "disabled"),
            (
                {
                    "axis": 0,
                    "unsigned": True,
                    "narrow_range": True,
                    "amax": 2.64,
                    "scale_amax": 0.9,
                },
                {"if_calib": True},
                "unsigned 8bit narrow fake axis=0 amax=2.6400 *0.9 calibrator=MaxCalibrator scale=1.0 quant calib",
            ),
            (
                {"amax": [0.0, 0.5, 0.7817], "axis": 0, "calib_method": "histgoram"},
                {"if_quant": False},
                "8bit fake axis=0 amax=[0.0000, 0.7817](3) scale=1.0",
            ),
            (
                {"learn_amax": True, "calib_method": "histogram"},
                {},
                "8bit fake per-tensor amax=dynamic learned calibrator=HistogramCalibrator scale=1.0 quant clip",
            ),
        ],
    )
    def test_repr(self, fields, flags, text):
        q = TensorQuantizer(QuantDescriptor(**fields), **flags)
        assert q.extra_repr() == text
        assert repr(q).startswith("TensorQuantizer(")
        if "clip" not in text.split():
            assert repr(q) == f"TensorQuantizer({text})"
        q.pre_quant_scale = 2.0
        assert ("pre_quant_scale" in repr(q)) == (text != "disabled")


class TestProperties:
    @pytest.mark.parametrize("buffer", ["amax", "pre_quant_scale"])
    @pytest.mark.parametrize(
        "value", [2, 2.5, [1.0, 2.0], np.array([[1.0], [2.0]]), torch.tensor([3.0]).double()]
    )
    def test_setters(self, buffer, value, caplog):
        q = TensorQuantizer()
        setattr(q, buffer, value)
        assert levels(caplog) == [logging.WARNING] * isinstance(value, torch.Tensor)
        stored = q._buffers["_" + buffer]
        assert stored.dtype == torch.float32
        np.testing.assert_array_equal(stored.numpy(), np.asarray(value))
        setattr(q, buffer, np.asarray(value) * 2)
        assert q._buffers["_" + buffer] is stored
        np.testing.assert_array_equal(stored.numpy(), np.asarray(value) * 2)
        words = f"Changing shape when setting {buffer} is not allowed"
        raises_ours(RuntimeError, words, lambda: setattr(q, buffer, [1.0, 2.0, 3.0]))
        caplog.clear()
        setattr(q, buffer, None)
        assert levels(caplog) == [logging.ERROR]
        assert getattr(q, buffer) is stored
        raises_ours(TypeError, buffer, lambda: setattr(q, buffer, "x"))

    def test_formats_reach_the_calibrator(self):
        q = make(calib_method="histogram")
        q.num_bits, q.unsigned, q.narrow_range = 4, True, True
        assert (q._num_bits, q._unsigned, q._narrow_range) == (4, True, True)
        assert (q._calibrator._num_bits, q._calibrator._unsigned) == (4, True)
        q._calibrator = None
        q.num_bits, q.unsigned = 8, False
        assert (q.num_bits, q.unsigned) == (8, False)
        for name in ("axis", "fake_quant", "maxbound", "scale", "step_size"):
            with pytest.raises(AttributeError):
                setattr(q, name, 0)
        raises_ours(ValueError, "num_bits", lambda: setattr(q, "num_bits", -1))

    @pytest.mark.parametrize(
        ("fields", "bound"),
        [({}, 127), ({"unsigned": True}, 255), ({"num_bits": 4}, 7), ({"num_bits": (4, 3)}, 448)],
    )
    def test_step_size(self, fields, bound, caplog):
        q = make(**fields)
        assert q.maxbound == bound
        assert q.step_size is None
        assert levels(caplog) == [logging.ERROR]
        q.amax = 3.0
        assert float(q.step_size) == float(np.float32(3) / np.float32(bound))

    def test_scale(self, caplog):
        assert TensorQuantizer().scale == 1.0
        assert levels(caplog) == [logging.ERROR]
        q = make(fake_quant=False, amax=2.0)
        q(torch.ones(3))
        assert float(q.scale) == 63.5


class TestBadRanges:
    def test_negative_range(self):
        raises_ours(
            ValueError, "Negative values in amax", lambda: setattr(make(), "amax", [1.0, -2.0])
        )

    def test_amax_as_an_attribute_becomes_the_buffer(self):
        quantizer = make()
        quantizer._amax = torch.tensor(2.0)
        quantizer._pre_quant_scale = torch.tensor(0.5)
        assert set(quantizer.state_dict()) == {"_amax", "_pre_quant_scale"}
        quantizer.amax = 3.0
        assert quantizer.amax == 3.0

    def test_a_descriptor_is_read_only_to_the_last_number(self):
        descriptor = QuantDescriptor(amax=[1.0, 2.0], axis=0)
        with pytest.raises(ValueError, match="read-only"):
            descriptor.amax[0] = 5.0
        quantizer = TensorQuantizer(descriptor)
        quantizer.amax.fill_(7.0)
        assert descriptor.amax.tolist() == [1.0, 2.0]

    def test_words_instead_of_a_range(self):
        raises_ours(
            TypeError, "amax must be float, list or ndarray", lambda: QuantDescriptor(amax=["wide"])
        )

    @pytest.mark.parametrize("axis", [None, 1, (0, 1)])
    def test_nothing_in_nothing_out(self, axis):
        empty = torch.empty(0, 3)
        for fields in ({}, {"amax": 1.0}, {"unsigned": True}):
            assert make(axis=axis, **fields)(empty).shape == (0, 3)

    def test_infinity_in_a_range_of_zero(self):
        x = torch.tensor([math.inf, -math.inf, 1.0])
        assert make(amax=0.0)(x).tolist() == [0.0, 0.0, 0.0]

    @pytest.mark.parametrize("axis", [None, 0])
    def test_a_range_of_nan_gives_way(self, axis):
        quantizer = make(axis=axis)
        quantizer.load_calib_amax(strict=False)
        collect(quantizer, torch.randn(3, 5))
        quantizer.load_calib_amax()
        assert quantizer.amax.isfinite().all()
        again = make(axis=axis)
        again.load_calib_amax(strict=False)
        again.load_state_dict(quantizer.state_dict())
        assert torch.equal(again.amax, quantizer.amax)

    @pytest.mark.parametrize("wrong", ["a", None, [1.0]])
    def test_no_tensor(self, wrong):
        raises_ours(TypeError, "not a tensor", lambda: make()(wrong))
        for method in ("max", "histogram"):
            raises_ours(
                TypeError,
                "not a tensor",
                lambda method=method: make(calib_method=method)._calibrator.collect(wrong),
            )

    def test_half_in_a_checkpoint_is_stored_as_float32(self):
        quantizer = make()
        quantizer.load_state_dict({"_amax": torch.tensor(2.0, dtype=torch.float16)}, assign=True)
        assert quantizer.amax.dtype == torch.float32
        raises_ours(
            TypeError, "is a float, not a tensor", lambda: make().load_state_dict({"_amax": 1.0})
        )


class TestSwitches:
    def test_flags(self):
        q = TensorQuantizer()
        for name, flag, on in (
            ("", "_disabled", False),
            ("_quant", "_if_quant", True),
            ("_calib", "_if_calib", True),
        ):
            getattr(q, "disable" + name)()
            assert getattr(q, flag) is not on
            getattr(q, "enable" + name)()
            assert getattr(q, flag) is on

    def test_errors(self):
        q = TensorQuantizer()
        raises_ours(ValueError, "learn_amax is False", q.enable_clip)
        raises_ours(ValueError, "learn_amax is False", q.disable_clip)
        raises_ours(RuntimeError, "learn_amax", q.init_learn_amax)
        q._if_clip = True
        raises_ours(RuntimeError, "learn", lambda: q(torch.ones(2)))
        q._if_clip, q._calibrator = False, None
        raises_ours(ValueError, "Calibrator was not created", q.enable_calib)
        raises_ours(RuntimeError, "Calibrator not created", q.load_calib_amax)
        q._if_calib = True
        raises_ours(RuntimeError, "Calibrator", lambda: q(torch.ones(2)))


class TestForward:
    @pytest.mark.parametrize("axis", [None, 0, -1, (0, 2), (-3, -1), [1]])
    def test_dynamic(self, device, axis):
        x = torch.randn(2, 3, 4, device=device)
        kept = [] if axis is None else [a % 3 for a in ([axis] if isinstance(axis, int) else axis)]
        amax = x.abs().amax([d for d in range(3) if d not in kept], keepdim=True)
        q = make(axis=axis)
        assert torch.equal(q(x), fake_tensor_quant(x, amax, narrow_range=False))
        assert not hasattr(q, "_amax")
        q._scale_amax = 0.5
        assert torch.equal(q(x), fake_tensor_quant(x, amax * 0.5, narrow_range=False))
        assert q._get_amax(x).dtype == q._get_amax(x.half()).dtype == torch.float32
        q._scale_amax = None
        assert torch.equal(
            q._get_amax(x.double() / 3).double(), (amax.double() / 3).reshape_as(q._get_amax(x))
        )

    @pytest.mark.parametrize("axis", [3, -4, (0, 5)])
    def test_axis_out_of_range(self, device, axis):
        x = torch.randn(2, 3, 4, device=device)
        raises_ours(ValueError, r"\(2, 3, 4\)", lambda: make(axis=axis)(x))

    @pytest.mark.parametrize("narrow_range", [False, True])
    @pytest.mark.parametrize("unsigned", [False, True])
    @pytest.mark.parametrize("num_bits", [4, 8])
    def test_fake_and_real(self, device, narrow_range, unsigned, num_bits):
        x = torch.randn(3, 50, device=device) * 2
        x = x.abs() if unsigned else x
        q = make(
            num_bits=num_bits,
            unsigned=unsigned,
            narrow_range=narrow_range,
            axis=0,
            amax=[[0.5], [1.0], [2.0]],
        )
        codes, scale = tensor_quant(x, q.amax.to(device), num_bits, unsigned, narrow_range)
        assert torch.equal(q(x), codes / scale)
        assert q.amax.device == x.device
        q._fake_quant = False
        assert torch.equal(q(x), codes)
        assert torch.equal(q.scale, scale)
        assert float(codes.min()) == (0 if unsigned else -(2 ** (num_bits - 1)) + narrow_range)

    def test_attributes_are_never_cached(self, device):
        x = torch.tensor([0.3, -3.0], device=device)
        q = make(amax=1.0)
        q(x)
        q._num_bits, q._narrow_range = 4, True
        assert torch.equal(q(x), fake_tensor_quant(x, 1.0, 4))
        q._amax.fill_(2.0)
        assert torch.equal(q(x), fake_tensor_quant(x, 2.0, 4))
        q.amax.fill_(3.0)
        q._amax = q._amax.to(device)
        assert "_amax" in q._buffers
        assert torch.equal(q(x), fake_tensor_quant(x, 3.0, 4))
        q._scale_amax = 0.5
        assert torch.equal(q(x), fake_tensor_quant(x, 1.5, 4))
        assert q.amax.item() == 3
        q._num_bits = (4, 3)
        assert torch.equal(q(x), scaled_e4m3(x, 1.5))

    def test_pre_quant_scale(self, device):
        x = torch.tensor([0.5, -3.0], device=device)
        q = make(amax=4.0)
        q.pre_quant_scale = [2.0, 0.5]
        scaled = x * torch.tensor([2.0, 0.5], device=device)
        assert torch.equal(q(x), fake_tensor_quant(scaled, 4.0, narrow_range=False))
        q._disabled = True
        assert torch.equal(q(x), scaled)
        q._disabled, q._if_quant, q._if_calib = False, False, True
        assert torch.equal(q(x), scaled)
        assert float(q._calibrator.compute_amax()) == 1.5
        assert q(x.half()).dtype == torch.float16

    def test_nothing_to_do_returns_the_same_object(self, device):
        x = torch.randn(3, device=device)
        for flag, value in (("_disabled", True), ("_if_quant", False)):
            q = make(amax=1.0)
            setattr(q, flag, value)
            assert q(x) is x

    def test_nan_amax(self, device):
        model = nn.Sequential(Pair(), Pair())
        for pair in model:
            pair._input_quantizer.load_calib_amax(strict=False)
        x = torch.randn(3, device=device)
        raises_ours(RuntimeError, r"0\._input_quantizer, 1\._input_quantizer", lambda: model(x))
        model[0]._input_quantizer._disabled = model[1]._input_quantizer._disabled = True
        assert model(x) is x

    def test_learned(self, device):
        q = make(learn_amax=True, amax=1.5, num_bits=4).to(device)
        assert q._if_clip
        assert [p.item() for p in q.clip.parameters()] == [-1.5, 1.5]
        q.amax = 2.0
        q.init_learn_amax()
        assert [p.item() for p in q.clip.parameters()] == [-2.0, 2.0]
        x = torch.tensor([-5.0, 0.3, 9.0, 9.0], device=device, requires_grad=True)
        out = q(x)
        assert torch.equal(out, fake_tensor_quant(x.clamp(-2, 2), 2.0, 4, narrow_range=False))
        out.sum().backward()
        assert x.grad.tolist() == [0, 1, 0, 0]
        assert [float(p.grad) for p in q.clip.parameters()] == [1, 2]
        q.disable_clip()
        assert (q._if_clip, [p.requires_grad for p in q.clip.parameters()]) == (
            False,
            [False, False],
        )
        q.enable_clip()
        assert (q._if_clip, [p.requires_grad for p in q.clip.parameters()]) == (True, [True, True])
        assert set(q.state_dict()) == {"_amax", "clip.clip_value_min", "clip.clip_value_max"}
        assert make(learn_amax=True).clip.clip_value_max.item() == 1.0

    def test_calibration(self, device):
        q = make(axis=0)
        batches = [torch.randn(3, 5, device=device) for _ in range(3)]
        collect(q, *batches)
        q.load_calib_amax()
        expected = torch.stack(batches).abs().amax((0, 2)).reshape(3, 1)
        assert torch.equal(q.amax, expected)
        collect(q, batches[0] * 100)
        assert torch.equal(q.amax, expected)  # the calibrator shares no memory with the buffer
        q.amax.fill_(1)
        assert float(q._calibrator.compute_amax().max()) > 50


class TestLoadCalibAmax:
    def test_arguments(self):
        q = TensorQuantizer()
        collect(q, torch.ones(3))
        raises_ours(TypeError, "max calibrator", lambda: q.load_calib_amax("mse"))
        raises_ours(TypeError, "max calibrator", lambda: q.load_calib_amax(method="mse"))
        q = make(calib_method="histogram")
        collect(q, torch.linspace(0, 1, 1000))
        raises_ours(TypeError, "histogram", q.load_calib_amax)
        raises_ours(TypeError, "Unknown calibration method", lambda: q.load_calib_amax("best"))
        q.load_calib_amax("percentile", percentile=50.0)
        assert float(q.amax) == pytest.approx(0.5, abs=2e-3)
        q.load_calib_amax(method="percentile", percentile=100)
        assert float(q.amax) == pytest.approx(1.0, abs=1e-6)

    @pytest.mark.parametrize("amax", [None, 2.0, [[1.0], [2.0]]])
    def test_no_data(self, amax, caplog):
        q = make(axis=0, amax=amax)
        raises_ours(RuntimeError, "Calibrator returned None", q.load_calib_amax)
        assert amax is None or not bool(q.amax.isnan().any())
        q.load_calib_amax(strict=False)
        assert levels(caplog) == [logging.WARNING]
        assert bool(q.amax.isnan().all())

    def test_while_collecting(self, caplog):
        q = make(name="conv1")
        q._if_calib = True
        q(torch.tensor([math.pi]))
        q.load_calib_amax()
        assert levels(caplog) == [logging.WARNING]
        assert "conv1" in caplog.text
        assert "collecting" in caplog.text

    def test_one_warning_names_all_that_collect(self, caplog):
        model = nn.Sequential(Pair(), Pair())
        quantizers = [pair._input_quantizer for pair in model]
        for quantizer in quantizers:
            quantizer._if_calib = True
        model(torch.ones(3))
        for quantizer in quantizers:
            quantizer.load_calib_amax()
        assert levels(caplog) == [logging.WARNING]
        assert "2 quantizers" in caplog.text
        assert "0._input_quantizer, 1._input_quantizer" in caplog.text
        quantizers[0].enable_calib()
        quantizers[0].load_calib_amax()
        assert len(caplog.records) == 2  # it starts over with every enable_calib()

    def test_one_warning_names_all_without_data(self, caplog):
        model = nn.Sequential(Pair(), Pair(calib_method="histogram"))
        for pair in model:
            pair._input_quantizer.load_calib_amax(
                strict=False, **({} if pair is model[0] else {"method": "entropy"})
            )
        assert levels(caplog) == [logging.WARNING]
        assert "0._input_quantizer, 0._weight_quantizer, 1._input_quantizer" in caplog.text

    def test_learned_over_channels(self):
        q = make(learn_amax=True)
        raises_ours(RuntimeError, "amax", q.init_learn_amax)
        q.amax = [[1.0], [3.0]]
        q.init_learn_amax()
        assert [p.item() for p in q.clip.parameters()] == [-3.0, 3.0]

    def test_in_inference_mode(self):
        q = TensorQuantizer()
        with torch.inference_mode():
            collect(q, torch.ones(3))
            q.load_calib_amax()
        collect(q, torch.ones(3) * 2)
        q.load_calib_amax()
        assert float(q.amax) == 2


class TestStateDict:
    def test_both_ways(self, caplog):
        fresh, full = Pair(), Pair()
        assert not fresh.state_dict()
        full._input_quantizer.amax = 2.0
        full._weight_quantizer.amax = [[1.0], [2.0]]
        full._weight_quantizer.pre_quant_scale = [[3.0], [4.0]]
        state = full.state_dict()
        assert {key: tuple(value.shape) for key, value in state.items()} == {
            "_input_quantizer._amax": (),
            "_weight_quantizer._amax": (2, 1),
            "_weight_quantizer._pre_quant_scale": (2, 1),
        }
        assert state["_weight_quantizer._amax"].numpy().dtype == np.float32
        fresh.load_state_dict(state, strict=True)
        assert fresh.state_dict().keys() == state.keys()
        assert all(torch.equal(value, state[key]) for key, value in fresh.state_dict().items())
        full._input_quantizer.amax = 5.0
        assert float(fresh._input_quantizer.amax) == 2
        fresh.load_state_dict(full.state_dict())
        assert float(fresh._input_quantizer.amax) == 5
        assert not caplog.records
        with pytest.raises(RuntimeError, match="Missing key"):
            fresh.load_state_dict({})
        assert "_input_quantizer" in caplog.text
        assert logging.ERROR in levels(caplog)
        fresh.load_state_dict({}, strict=False)
        assert float(fresh._input_quantizer.amax) == 5

    @pytest.mark.parametrize(
        ("present", "loaded", "words"),
        [
            ([[1.0], [2.0]], 3.0, r"\[\].*\[2, 1\]|\(\).*\(2, 1\)"),
            (3.0, [[1.0], [2.0]], r"\[2, 1\].*\[\]|\(2, 1\).*\(\)"),
            (3.0, [1.0, 2.0], r"\[2\].*\[\]|\(2,\).*\(\)"),
        ],
    )
    def test_other_shapes_are_refused(self, present, loaded, words):
        q = make(amax=present)
        with pytest.raises(RuntimeError, match=words):
            q.load_state_dict({"_amax": torch.tensor(loaded)})
        assert torch.equal(q.amax, torch.tensor(present))

    @pytest.mark.parametrize("present", [1.0, [1.0], [[1.0]]])
    @pytest.mark.parametrize("loaded", [3.0, [3.0], [[3.0]]])
    def test_one_element_is_one_element(self, present, loaded):
        q = make(amax=present)
        q.load_state_dict({"_amax": torch.tensor(loaded)})
        assert q.amax.shape == torch.tensor(present).shape
        assert q.amax.item() == 3

    def test_shared_quantizer(self):
        model = nn.Sequential(Pair(), Pair())
        model[1]._input_quantizer = model[0]._input_quantizer
        model[0]._input_quantizer.amax = 2.0
        assert set(model.state_dict()) == {"0._input_quantizer._amax", "1._input_quantizer._amax"}
        twin = copy.deepcopy(model)
        assert twin[1]._input_quantizer is twin[0]._input_quantizer
        fresh = nn.Sequential(Pair(), Pair())
        fresh[1]._input_quantizer = fresh[0]._input_quantizer
        fresh.load_state_dict(model.state_dict())
        assert fresh[1]._input_quantizer._amax.item() == 2

    @pytest.mark.parametrize("method", ["max", "histogram"])
    @pytest.mark.parametrize("pickled", [False, True])
    def test_copies(self, method, pickled):
        model = Pair(calib_method=method, learn_amax=True)
        collect(model._input_quantizer, torch.linspace(-0.9, 0.9, 100))
        model._input_quantizer.amax = 2.0
        if pickled:
            file = io.BytesIO()
            torch.save(model, file)
            file.seek(0)
            twin = torch.load(file, weights_only=False)
        else:
            twin = copy.deepcopy(model)
        args = ("mse",) if method == "histogram" else ()
        x = torch.randn(9)
        assert torch.equal(twin(x), model(x))
        for one in (model, twin):
            one._input_quantizer.load_calib_amax(*args)
        assert float(twin._input_quantizer.amax) == float(model._input_quantizer.amax) != 2
        twin._input_quantizer._amax.fill_(7)
        assert model._input_quantizer._amax.item() != 7

    def test_half_models_keep_float32_ranges(self):
        q = make(amax=0.1).half()
        assert q.amax.dtype == torch.float32


MODES = {
    "fake": {},
    "per channel": {"axis": 0},
    "two axes": {"axis": (0, 1)},
    "unsigned": {"unsigned": True},
    "codes": {"fake_quant": False},
    "fp8": {"num_bits": (4, 3)},
    "four bits": {"num_bits": 4, "narrow_range": True},
    "scaled": {"scale_amax": 0.9},
    "learned": {"learn_amax": True},
}


class TestOnTheGpu:
    """A forward after calibration gives the numbers of the CPU and waits for nothing."""

    def calibrated(self, fields, batch):
        quantizer = make(**fields).to(batch.device)
        collect(quantizer, batch)
        quantizer.load_calib_amax()
        if fields.get("learn_amax"):
            quantizer.init_learn_amax()
        return quantizer

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_calibrated(self, mode, dtype, gpu):
        batch = torch.rand(4, 5).to(dtype)
        expected = self.calibrated(MODES[mode], batch)
        inputs = batch.to(gpu)
        quantizer = self.calibrated(MODES[mode], inputs)
        inputs.requires_grad_()
        with watch(gpu) as events:
            result = quantizer(inputs)
            result.sum().backward()
        assert list_waits(events) == []
        assert torch.equal(result.detach().cpu(), expected(batch).detach())
        if isinstance(expected._scale, torch.Tensor):
            assert torch.equal(quantizer._scale.cpu(), expected._scale)

    @pytest.mark.parametrize("mode", MODES)
    def test_dynamic_disabled_and_collecting(self, mode, gpu):
        batch = torch.rand(4, 5)
        expected, quantizer = make(**MODES[mode]), make(**MODES[mode]).to(gpu)
        inputs = batch.to(gpu)
        with watch(gpu) as events:
            result = quantizer(inputs)
            collect(quantizer, inputs)
            quantizer.disable()
            assert quantizer(inputs) is inputs
        assert list_waits(events) == []
        assert torch.equal(result.detach().cpu(), expected(batch).detach())

    def test_moved_loaded_and_scaled_before(self, gpu):
        quantizer = make(axis=0)
        quantizer.amax = [[1.0], [2.0]]
        quantizer.pre_quant_scale = 0.5
        loaded = make(axis=0).to(gpu)
        loaded.load_state_dict(quantizer.state_dict())
        inputs = torch.rand(2, 3, device=gpu)
        expected = quantizer(inputs.cpu())
        for moved in (quantizer.to(gpu), loaded):
            assert {buffer.device for buffer in moved.buffers()} == {gpu}
            with watch(gpu) as events:
                result = moved(inputs)
            assert list_waits(events) == []
            assert torch.equal(result.cpu(), expected)

    def test_the_switch_for_torchs_operators(self, gpu, monkeypatch):
        monkeypatch.setattr(TensorQuantizer, "use_fb_fake_quant", True)
        quantizer = make().to(gpu)
        quantizer.amax = 1.0
        inputs = torch.rand(3, device=gpu)
        with watch(gpu) as events:
            quantizer(inputs)
        assert list_waits(events) == []

    def test_nan_is_refused(self, gpu):
        """Noted where the range is set, and again where it changes in place."""
        quantizer = make().to(gpu)
        quantizer.amax = 1.0
        inputs = torch.ones(3, device=gpu)
        quantizer(inputs)
        quantizer.amax.fill_(math.nan)
        raises_ours(RuntimeError, "NaN", lambda: quantizer(inputs))
        quantizer.amax = 2.0
        assert quantizer(inputs).device == gpu

    def test_step_size(self, gpu):
        amax = np.random.default_rng(0).lognormal(0, 3, 999).astype(np.float32)
        quantizer, moved = make(axis=0), make(axis=0).to(gpu)
        quantizer.amax, moved.amax = amax, amax
        assert torch.equal(moved.step_size.cpu(), quantizer.step_size)

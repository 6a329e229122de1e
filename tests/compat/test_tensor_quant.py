"""`qdq.compat.tensor_quant` and `cuda_ext` against NumPy, torch's own FP8 casts and numbers worked out by hand."""

import logging

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from qdq.compat import cuda_ext, tensor_quant
from qdq.compat.tensor_quant import (
    QuantDescriptor,
    fake_affine_tensor_quant,
    fake_tensor_quant,
    legacy_fake_tensor_quant,
    scaled_e4m3,
)
from qdq.errors import QdqError

EPS = 2.0**-24


def reference(x, amax, num_bits=8, unsigned=False, narrow=True):
    """(q, s, q / s) of section 2 in NumPy float32; amax broadcasts."""
    x, amax = np.asarray(x, np.float32), np.asarray(amax, np.float32)
    largest = 2 ** (num_bits - 1 + unsigned) - 1
    smallest = 0 if unsigned else -largest if narrow else -largest - 1
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        s = np.where(amax <= EPS, np.float32(1), np.float32(largest) / amax).astype(np.float32)
        q = np.clip(np.rint((x * s).astype(np.float32)), smallest, largest)
    q = np.where(amax <= EPS, np.float32(0), q).astype(np.float32)
    return q, s, q / s


def same(found, expected):
    """Equal to the last bit, the sign of zero aside."""
    np.testing.assert_array_equal(
        found.detach().float().cpu().numpy() + 0.0, np.asarray(expected, np.float32) + 0.0
    )


class TestQuantDescriptor:
    def test_defaults(self):
        d = QuantDescriptor()
        found = {name: getattr(d, name) for name in tensor_quant._DEFAULTS}
        assert (d.num_bits, d.name) == (8, None)
        assert found == {
            "fake_quant": True,
            "axis": None,
            "amax": None,
            "learn_amax": False,
            "scale_amax": None,
            "calib_method": "max",
            "unsigned": False,
            "narrow_range": False,
        }
        assert tensor_quant.ScaledQuantDescriptor is QuantDescriptor

    @pytest.mark.parametrize("field", ["num_bits", "name", *tensor_quant._DEFAULTS])
    def test_fields_are_read_only(self, field):
        with pytest.raises(AttributeError):
            setattr(QuantDescriptor(), field, None)

    @pytest.mark.parametrize(
        ("fields", "kind", "words"),
        [
            ({"bits": 8}, TypeError, "Unused keys"),
            ({"num_bits": -1}, ValueError, "-1"),
            ({"num_bits": 8.0}, TypeError, "float"),
            ({"num_bits": (5, 2)}, TypeError, r"\(5, 2\)"),
            ({"num_bits": [4, 3]}, TypeError, "list"),
            ({"num_bits": "8"}, TypeError, "str"),
            ({"name": 3}, TypeError, "name must be a string"),
            ({"amax": 2}, TypeError, "amax must be float, list or ndarray.*int"),
            ({"amax": "2"}, TypeError, "amax must be float, list or ndarray.*str"),
            ({"amax": torch.tensor(2.0)}, TypeError, "amax must be float, list or ndarray.*Tensor"),
            ({"axis": "0"}, TypeError, "axis"),
            ({"axis": 0.0}, TypeError, "axis"),
            ({"axis": (0, 1.0)}, TypeError, "axis"),
            ({"learn_amax": True, "axis": 0}, TypeError, "axis is ignored and must be None"),
            ({"learn_amax": True, "axis": -1}, TypeError, "axis is ignored and must be None"),
            ({"calib_method": None}, TypeError, "calib_method"),
            ({"scale_amax": "0.9"}, TypeError, "scale_amax"),
        ],
    )
    def test_errors(self, fields, kind, words):
        with pytest.raises(kind, match=words) as found:
            QuantDescriptor(**fields)
        assert isinstance(found.value, QdqError)

    def test_no_bits_are_accepted_with_an_error_log(self, caplog):
        assert QuantDescriptor(num_bits=0).num_bits == 0
        assert [r.levelno for r in caplog.records] == [logging.ERROR]
        assert QuantDescriptor(num_bits=1).num_bits == 1

    @pytest.mark.parametrize("amax", [2.5, [1.0, 2.0], np.array([[1.0], [2.0]])])
    def test_amax_is_a_float32_array_of_its_own(self, amax):
        d = QuantDescriptor(amax=amax)
        assert isinstance(d.amax, np.ndarray)
        assert d.amax.dtype == np.float32
        np.testing.assert_array_equal(d.amax, amax)
        if isinstance(amax, np.ndarray):
            amax[:] = 9
            assert d.amax.max() == 2

    def test_a_misspelt_method_is_kept(self):
        assert QuantDescriptor(calib_method="histgoram").calib_method == "histgoram"

    @pytest.mark.parametrize(
        ("fields", "text"),
        [
            ({}, "QuantDescriptor(8bit fake per-tensor)"),
            ({"axis": 0}, "QuantDescriptor(8bit fake axis=0)"),
            (
                {"axis": (0, -1), "unsigned": True},
                "QuantDescriptor(unsigned 8bit fake axis=(0, -1))",
            ),
            ({"amax": 1.5}, "QuantDescriptor(8bit fake per-tensor amax=1.5 full_range)"),
            (
                {"amax": 1.5, "narrow_range": True},
                "QuantDescriptor(8bit fake per-tensor amax=1.5 narrow_range)",
            ),
            (
                {"learn_amax": True, "scale_amax": 0.9},
                "QuantDescriptor(8bit fake per-tensor learn_amax scale_amax=0.9)",
            ),
        ],
    )
    def test_str(self, fields, text):
        assert str(QuantDescriptor(**fields)) == text
        named = str(QuantDescriptor(name="conv1", **fields))
        assert named.startswith("conv1")
        assert named.endswith(text)

    ROUND_TRIPS = (
        {},
        {"num_bits": 4},
        {"num_bits": (4, 3)},
        {"name": "x"},
        {"axis": 0},
        {"axis": (0, -1)},
        {"axis": [1]},
        {"amax": 0.1},
        {"amax": [1.0, 2.0]},
        {"amax": np.array([[1.0], [0.1]], np.float32), "axis": 0},
        {"calib_method": "histogram"},
        {"narrow_range": True},
        {"unsigned": True},
        {"fake_quant": False},
        {"learn_amax": True, "amax": 3.0},
        {"scale_amax": 0.9},
        {"axis": ()},
    )

    @pytest.mark.parametrize("fields", ROUND_TRIPS, ids=str)
    def test_round_trips(self, fields):
        d = QuantDescriptor(**fields)
        assert set(d.dict()) == {"num_bits", "name", *fields}
        for again in (QuantDescriptor(**d.dict()), QuantDescriptor.from_yaml(d.to_yaml())):
            assert again == d
            assert hash(again) == hash(d)

    def test_yaml_has_axes_as_lists(self):
        assert "axis:\n- 0\n" in QuantDescriptor(axis=0).to_yaml()

    @pytest.mark.parametrize("text", ["3", "[a", ""])
    def test_other_yaml(self, text):
        with pytest.raises(ValueError, match="YAML") as found:
            QuantDescriptor.from_yaml(text)
        assert isinstance(found.value, QdqError)

    def test_equality_compares_every_field(self):
        different = [QuantDescriptor(**fields) for fields in self.ROUND_TRIPS]
        for i, a in enumerate(different):
            assert [a == b for b in different] == [i == j for j in range(len(different))]
        assert len(set(different)) == len(different)
        assert QuantDescriptor(amax=[1.0, 2.0]) != QuantDescriptor(amax=[1.0, 3.0])
        assert QuantDescriptor() != 3
        assert QuantDescriptor() is not None
        assert QuantDescriptor() != "QuantDescriptor(8bit fake per-tensor)"

    @pytest.mark.parametrize(
        ("name", "axis"),
        [
            ("8BIT_PER_TENSOR", None),
            ("UNSIGNED_8BIT_PER_TENSOR", None),
            ("8BIT_LINEAR_WEIGHT_PER_ROW", 0),
            *((f"8BIT_CONV{n}D_WEIGHT_PER_CHANNEL", 0) for n in (1, 2, 3)),
            *((f"8BIT_CONVTRANSPOSE{n}D_WEIGHT_PER_CHANNEL", 1) for n in (1, 2, 3)),
        ],
    )
    def test_constants(self, name, axis):
        expected = QuantDescriptor(num_bits=8, axis=axis, unsigned=name.startswith("UNSIGNED"))
        assert getattr(tensor_quant, "QUANT_DESC_" + name) == expected


class TestIntegers:
    def test_the_worked_example(self, device):
        x = torch.tensor([0.9817, 0.4611, 0.0832], device=device)
        codes, scale = tensor_quant.tensor_quant(x, torch.tensor(0.9921, device=device))
        assert codes.tolist() == [126, 59, 11]
        assert_close(float(scale), 128.01, rtol=0, atol=0.005)
        values = fake_tensor_quant(x, torch.tensor(0.9921, device=device)).cpu()
        assert_close(values, torch.tensor([0.9843, 0.4609, 0.0859]), rtol=0, atol=5e-5)

    @pytest.mark.parametrize("num_bits", [2, 4, 8, 16])
    @pytest.mark.parametrize("unsigned", [False, True])
    @pytest.mark.parametrize("narrow", [False, True])
    @pytest.mark.parametrize("amax", [0.3, 127.0, 6.0, EPS, EPS * 1.01, 0.0, 1e30])
    def test_per_tensor(self, device, num_bits, unsigned, narrow, amax):
        rng = np.random.default_rng(0)
        # Ties among them.
        steps = np.arange(-300, 300) * amax / (2 ** (num_bits - 1 + unsigned) - 1) / 2
        x = np.concatenate(
            [rng.normal(0, amax or 1, 500), steps, [amax, -amax, 0, 1e30, -1e30]]
        ).astype(np.float32)
        x = np.abs(x) if unsigned else x
        inputs, bound = torch.tensor(x, device=device), torch.tensor(amax, device=device)
        args = (num_bits, unsigned, narrow)
        q, s, value = reference(x, amax, *args)
        codes, scale = tensor_quant.tensor_quant(inputs, bound, *args)
        same(codes, q)
        same(scale, s)
        assert scale.shape == ()
        for function in (fake_tensor_quant, legacy_fake_tensor_quant, cuda_ext.fake_tensor_quant):
            same(function(inputs, bound, *args), value)
            same(
                function(inputs, amax, num_bits=num_bits, unsigned=unsigned, narrow_range=narrow),
                value,
            )
        in_place = inputs.clone()
        assert cuda_ext.fake_tensor_quant_(in_place, bound, *args) is in_place
        same(in_place, value)

    @pytest.mark.parametrize("axis", [0, 1, 2, -1, -3])
    @pytest.mark.parametrize("narrow", [False, True])
    def test_per_channel_and_any_strides(self, device, axis, narrow):
        inputs = torch.randn(5, 4, 3).transpose(0, 2)[:, ::2]  # 3, 2, 5
        amax = inputs.abs().amax([d for d in range(3) if d != axis % 3], keepdim=True) * 0.8
        amax.view(-1)[0] = 0
        _, s, value = reference(inputs.numpy(), amax.numpy(), narrow=narrow)
        inputs, amax = inputs.to(device), amax.to(device)
        assert not inputs.is_contiguous()
        same(fake_tensor_quant(inputs, amax, narrow_range=narrow), value)
        scale = tensor_quant.tensor_quant(inputs, amax, narrow_range=narrow)[1]
        assert scale.shape == amax.shape
        same(scale, s)
        assert float(scale.view(-1)[0]) == 1
        same(
            cuda_ext.fake_tensor_quant_with_axis(inputs, amax.reshape(-1), axis, 8, False, narrow),
            value,
        )
        keywords = {
            "inputs": inputs,
            "amax": amax.reshape(-1),
            "axis": axis,
            "num_bits": 8,
            "narrow_range": narrow,
        }
        same(cuda_ext.fake_tensor_quant_with_axis(**keywords), value)
        cuda_ext.fake_tensor_quant_(inputs, amax, narrow_range=narrow)
        same(inputs, value)

    def test_narrow_by_default(self, device):
        x = torch.tensor([-1.0, -9.0], device=device)
        assert tensor_quant.tensor_quant(x, 1.0)[0].tolist() == [-127, -127]
        wide = tensor_quant.tensor_quant(x * 1.1, 1.0, narrow_range=False)[0]
        assert wide.tolist() == [-128, -128]

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("amax", [1e-4, 1.5e-3, 0.37, 6.0, 6e4])
    @pytest.mark.parametrize("num_bits", [8, 16])
    def test_half_is_float32_inside_and_rounded_once(self, device, dtype, amax, num_bits):
        x = (torch.randn(2000) * amax).clamp(-6e4, 6e4).to(dtype)
        _, _, value = reference(x.float().numpy(), amax, num_bits)
        expected = torch.tensor(value).to(dtype)
        found = fake_tensor_quant(x.to(device), torch.tensor(amax, device=device), num_bits)
        assert found.dtype == dtype
        assert torch.equal(found.cpu() + 0, expected + 0)
        assert found.isfinite().all()
        assert found.any()

    def test_a_scale_too_large_for_fp16(self, device):
        x, amax = torch.ones(3, dtype=torch.float16, device=device), 127 / 65504.0
        codes, scale = tensor_quant.tensor_quant(x, amax * 1.001)
        assert codes.dtype == scale.dtype == torch.float16
        assert scale.isfinite().all()
        with pytest.raises(ValueError, match="scale is too large for FP16") as found:
            tensor_quant.tensor_quant(x, torch.tensor([1.0, 1.0, amax * 0.99], device=device))
        assert isinstance(found.value, QdqError)
        assert tensor_quant.tensor_quant(x, 0.0)[0].tolist() == [0, 0, 0]
        assert tensor_quant.tensor_quant(x.bfloat16(), amax * 0.99)[1].isfinite()
        for function in (fake_tensor_quant, legacy_fake_tensor_quant, cuda_ext.fake_tensor_quant):
            same(function(x, amax * 0.99), torch.full((3,), amax * 0.99).half().float().numpy())

    def test_half_never_overflows(self, device):
        x = torch.tensor([65504.0, -65504.0], dtype=torch.float16, device=device)
        same(fake_tensor_quant(x, 65504.0, narrow_range=False), [65504, -65504])

    def test_few_bits(self, device):
        x = torch.tensor([-2.0, 0.4, 0.6, 3.0], device=device)
        for unsigned, values in ((False, x), (True, x.abs())):
            codes, scale = tensor_quant.tensor_quant(values, 1.0, 0, unsigned, False)
            same(codes, [0, 0, 0, 0])
            assert scale.isfinite()
            same(fake_tensor_quant(values, 1.0, 0, unsigned, False), [0, 0, 0, 0])
        same(fake_tensor_quant(x.abs(), 1.0, 1, True), [1, 0, 1, 1])
        for function in (tensor_quant.tensor_quant, fake_tensor_quant, legacy_fake_tensor_quant):
            with pytest.raises(ValueError, match="2 signed and 1 unsigned") as found:
                function(x, 1.0, 1)
            assert isinstance(found.value, QdqError)

    @pytest.mark.parametrize(
        ("args", "kind", "words"),
        [
            (([1.0], [-0.5]), ValueError, "Negative values in amax"),
            (([1.0, 2.0], [1.0, -1e-30]), ValueError, "Negative values in amax"),
            (
                ([1.0, -1e-9], 1.0, 8, True),
                TypeError,
                "Negative values encountered in unsigned quantization",
            ),
            (([1.0], 1.0, (4, 3)), TypeError, "num_bits"),
            (([1.0], 1.0, -1), ValueError, "num_bits"),
            (([1.0], None), TypeError, "range"),
            (([1.0], "1"), TypeError, "range"),
        ],
    )
    def test_errors(self, device, args, kind, words):
        x, amax, *others = args
        amax = torch.tensor(amax, device=device) if isinstance(amax, list) else amax
        functions = [tensor_quant.tensor_quant, fake_tensor_quant, legacy_fake_tensor_quant]
        for function in [*functions, cuda_ext.fake_tensor_quant, cuda_ext.fake_tensor_quant_]:
            with pytest.raises(kind, match=words) as found:
                function(torch.tensor(x, device=device), amax, *others)
            assert isinstance(found.value, QdqError)

    def test_integer_inputs_are_refused(self, device):
        for function in (tensor_quant.tensor_quant, fake_tensor_quant, scaled_e4m3):
            for inputs in (torch.ones(2, dtype=torch.int32, device=device), 3.0):
                with pytest.raises(TypeError, match="floating point") as found:
                    function(inputs, 1.0)
                assert isinstance(found.value, QdqError)

    @pytest.mark.parametrize(
        ("axis", "amax"),
        [
            (2, [1.0, 1.0]),
            (0, [1.0, 1.0, 1.0]),
            (-3, [1.0, 1.0]),
            (0, [[1.0], [1.0], [1.0]]),
            (0, 1.0),
        ],
    )
    def test_axis_that_does_not_fit(self, device, axis, amax):
        with pytest.raises(ValueError, match="does not fit") as found:
            cuda_ext.fake_tensor_quant_with_axis(
                torch.ones(2, 3, device=device), torch.tensor(amax), axis
            )
        assert isinstance(found.value, QdqError)

    def test_inputs_are_left_alone(self, device):
        x, amax = torch.randn(9, device=device), torch.tensor(0.5, device=device)
        before = x.clone()
        for function in (
            tensor_quant.tensor_quant,
            fake_tensor_quant,
            cuda_ext.fake_tensor_quant,
            scaled_e4m3,
        ):
            function(x, amax)
        fake_affine_tensor_quant(x, -0.5, 0.5)
        cuda_ext.fake_e4m3fy(x)
        assert torch.equal(x, before)
        assert float(amax) == 0.5

    def test_empty_and_double(self, device):
        assert fake_tensor_quant(torch.empty(0, 3, device=device), 1.0).shape == (0, 3)
        x = torch.randn(50, dtype=torch.float64)
        found = fake_tensor_quant(
            x.to(device), torch.tensor(0.7, dtype=torch.float64, device=device)
        )
        s = 127 / 0.7
        assert found.dtype == torch.float64
        assert_close(
            found.cpu(),
            torch.tensor(np.clip(np.rint(x.numpy() * s), -127, 127) / s),
            rtol=1e-15,
            atol=0,
        )


class TestGradients:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    def test_bounds_are_inside(self, device, dtype):
        x = torch.tensor([-1.5, -1.0, -0.2, 0.0, 1.0, 1.0078125], dtype=dtype, device=device)
        grad = torch.arange(1.0, 7.0, dtype=dtype, device=device)
        amax = torch.tensor(1.0, device=device, requires_grad=True)
        for function in (
            fake_tensor_quant,
            legacy_fake_tensor_quant,
            scaled_e4m3,
            tensor_quant.tensor_quant,
        ):
            inputs = x.clone().requires_grad_()
            result = function(inputs, amax)
            (result[0] if isinstance(result, tuple) else result).backward(grad)
            assert inputs.grad.tolist() == [0, 2, 3, 4, 5, 0]
            assert inputs.grad.dtype == dtype
        assert amax.grad is None

    def test_affine_and_plain_e4m3(self, device):
        inputs = torch.tensor([-0.51, -0.5, 2.0, 2.1], device=device, requires_grad=True)
        low, high = (torch.tensor(v, device=device, requires_grad=True) for v in (-0.5, 2.0))
        fake_affine_tensor_quant(inputs, low, high).sum().backward()
        assert inputs.grad.tolist() == [0, 1, 1, 0]
        assert low.grad is None
        assert high.grad is None
        inputs = torch.tensor([-449.0, -448.0, 448.0, 500.0], device=device, requires_grad=True)
        scaled_e4m3(inputs).sum().backward()
        assert inputs.grad.tolist() == [0, 1, 1, 0]

    def test_per_channel(self, device):
        inputs = torch.tensor([[1.0, 2.0], [1.0, 2.0]], device=device).T.requires_grad_()
        inputs.retain_grad()
        fake_tensor_quant(inputs, torch.tensor([[1.0], [1.5]], device=device)).sum().backward()
        assert inputs.grad.tolist() == [[1, 1], [0, 0]]

    def test_cuda_ext_has_none(self, device):
        weight = torch.nn.Parameter(torch.randn(4, device=device))
        assert not cuda_ext.fake_tensor_quant(weight, 1.0).requires_grad
        assert cuda_ext.fake_tensor_quant_(weight, 0.1) is weight
        assert float(weight.detach().abs().max()) <= 0.1000001


def affine_reference(x, low, high, num_bits):
    """In float32, as written in section 2."""
    x, low, high = (np.asarray(v, np.float32) for v in (x, low, high))
    half = np.float32(2 ** (num_bits - 1))
    d = (high - low) / np.float32(2**num_bits - 1)
    z = np.rint(low / d) + half
    return (np.clip(np.rint(x / d) - z, -half, half - 1) + z) * d


class TestAffine:
    @pytest.mark.parametrize("num_bits", [1, 4, 8, 16])
    @pytest.mark.parametrize(("low", "high"), [(-0.3, 1.7), (0.0, 6.0), (-2.0, -1.0), (1.0, 3.0)])
    def test_numbers_and_tensors(self, device, num_bits, low, high):
        x = torch.randn(500) * 3
        expected = affine_reference(x.numpy(), low, high, num_bits)
        for bounds in ((low, high), [torch.tensor(v, device=device) for v in (low, high)]):
            same(fake_affine_tensor_quant(x.to(device), *bounds, num_bits), expected)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half(self, device, dtype):
        x = torch.randn(500).to(dtype)
        found = fake_affine_tensor_quant(x.to(device), -0.3, 1.7)
        assert found.dtype == dtype
        expected = torch.tensor(affine_reference(x.float().numpy(), -0.3, 1.7, 8)).to(dtype)
        assert torch.equal(found.cpu() + 0, expected + 0)

    def test_by_hand(self, device):
        x = torch.tensor([-1.0, 0.0, 0.4, 0.6, 200.0, 300.0], device=device)
        same(fake_affine_tensor_quant(x, 0.0, 255.0), [0, 0, 0, 1, 200, 255])

    @pytest.mark.parametrize("bound", [0.0, 0.7, -3.0])
    def test_zero_width_returns_the_bound(self, device, bound):
        same(fake_affine_tensor_quant(torch.randn(4, device=device), bound, bound), [bound] * 4)

    @pytest.mark.parametrize("args", [(1.0, 0.5), (0.0, 1.0, 0)])
    def test_errors(self, device, args):
        with pytest.raises(ValueError, match=r"min_range|num_bits") as found:
            fake_affine_tensor_quant(torch.randn(4, device=device), *args)
        assert isinstance(found.value, QdqError)


def e4m3(x):
    """torch's cast, which does not saturate, behind a clamp."""
    return x.float().clamp(-448, 448).to(torch.float8_e4m3fn).float()


def e4m3_scale(amax):
    return torch.as_tensor(np.float32(448) / np.asarray(amax, np.float32))


class TestE4M3:
    def values(self):
        grid = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        ties = (grid[1:] + grid[:-1]) / 2
        near = [torch.nextafter(ties, torch.tensor(side)) for side in (-1.0, 1e9)]
        x = torch.cat(
            [
                grid,
                ties,
                *near,
                torch.randn(2000).abs() * 100,
                torch.tensor([449.0, 464.0, 480.0, 1e30]),
            ]
        )
        return torch.cat([x, -x])

    def test_without_scale(self, device):
        x = self.values()
        for function in (scaled_e4m3, cuda_ext.fake_e4m3fy):
            same(function(x.to(device)), e4m3(x).numpy())
        assert scaled_e4m3(torch.tensor(float("inf"), device=device)) == 448
        assert scaled_e4m3(torch.tensor(float("nan"), device=device)).isnan()

    def test_strides(self, device):
        x = torch.randn(6, 8).T[::2] * 50
        same(cuda_ext.fake_e4m3fy(x.to(device)), e4m3(x).numpy())

    @pytest.mark.parametrize("amax", [0.37, 448.0, 1000.0, [[0.5], [3.0]]])
    def test_scaled(self, device, amax):
        x = torch.randn(2, 1000) * 0.5
        amax = torch.tensor(amax)
        scale = e4m3_scale(amax)
        same(scaled_e4m3(x.to(device), amax.to(device)), (e4m3(x * scale) / scale).numpy())

    def test_tiny_elements_and_ranges_are_zero(self, device):
        x = torch.tensor([EPS * 0.999, -EPS * 0.999, EPS, 1e-3], device=device)
        same(scaled_e4m3(x, 1e-6)[:2], [0, 0])
        assert scaled_e4m3(x, 1e-6)[2] != 0
        same(scaled_e4m3(x, 0.0), [0] * 4)
        same(scaled_e4m3(x, EPS), [0] * 4)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half(self, device, dtype):
        x = (torch.randn(1000) * 2).to(dtype)
        found = scaled_e4m3(x.to(device), 3.3)
        scale = e4m3_scale([3.3])
        assert found.dtype == dtype
        assert torch.equal(found.cpu() + 0, (e4m3(x.float() * scale) / scale).to(dtype) + 0)
        assert cuda_ext.fake_e4m3fy(x.to(device)).dtype == dtype

    def test_other_formats(self, device):
        for keywords in ({"E": 5, "M": 2}, {"E": 3}, {"M": 4}):
            with pytest.raises(NotImplementedError) as found:
                scaled_e4m3(torch.ones(1, device=device), 1.0, **keywords)
            assert isinstance(found.value, QdqError)
        with pytest.raises(ValueError, match="Negative values in amax"):
            scaled_e4m3(torch.ones(1, device=device), -1.0)


def test_autograd_classes():
    x = torch.randn(20)
    codes, scale = tensor_quant.TensorQuantFunction.apply(x, torch.tensor(1.0), 8, False, True)
    same(codes / scale, reference(x.numpy(), 1.0)[2])
    for name in ("FakeTensorQuantFunction", "LegacyFakeTensorQuantFunction"):
        same(getattr(tensor_quant, name).apply(x, torch.tensor(1.0)), reference(x.numpy(), 1.0)[2])
    same(
        tensor_quant.FakeAffineTensorQuantFunction.apply(x, -1.0, 1.0),
        affine_reference(x.numpy(), -1, 1, 8),
    )
    same(tensor_quant.ScaledE4M3Function.apply(x), e4m3(x).numpy())


def test_a_range_that_does_not_fit_is_both_kinds_of_error():
    for kind in (ValueError, RuntimeError, QdqError):
        with pytest.raises(kind, match="does not broadcast"):
            tensor_quant.fake_tensor_quant(torch.ones(3), torch.ones(7))


@pytest.mark.parametrize("num_bits", [np.int64(8), np.array([4, 3]), [4, 3]])
def test_widths_of_numpy_are_refused(num_bits):
    with pytest.raises(TypeError, match="num_bits must be an int"):
        tensor_quant.QuantDescriptor(num_bits)


def test_words_for_an_axis_or_a_width():
    with pytest.raises(TypeError, match="axis"):
        cuda_ext.fake_tensor_quant_with_axis(torch.ones(3), torch.ones(3), "a")
    with pytest.raises(TypeError, match="num_bits"):
        tensor_quant.fake_affine_tensor_quant(torch.ones(3), 0.0, 2.0, (4, 3))
    with pytest.raises(TypeError, match="floating point tensor"):
        cuda_ext.fake_tensor_quant_([1.0], 1.0)

"""`QuantDescriptor`, and the arithmetic of pytorch-quantization as functions.

The legacy scale is a multiplier, the inverse of ONNX's: with B the largest code, L the smallest and EPS = 2^-24

    s = B / amax (1 where amax <= EPS)
    q = clamp(round_half_even(x * s), L, B) (0 where amax <= EPS)

`tensor_quant` returns (q, s), `fake_tensor_quant` q / s. Half and bfloat16 are computed in float32 and cast once.
Source: `pytorch-quantization-api.md`, section 2.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import yaml

from qdq.compat.capture import is_capturing
from qdq.errors import ArgumentError, ArgumentTypeError, DataError, ShapeError, UnsupportedError
from qdq.schema import parse_yaml

logger = logging.getLogger(__name__)

EPS = 2.0**-24
E4M3 = (4, 3)  # the only `num_bits` that is not an integer: FP8 with 4 exponent and 3 mantissa bits
E4M3_MAX = 448.0

NumBits = int | tuple[int, int]
Axis = int | tuple[int, ...] | None
Range = float | torch.Tensor

_DEFAULTS: dict[str, Any] = {
    "fake_quant": True,
    "axis": None,
    "amax": None,
    "learn_amax": False,
    "scale_amax": None,
    "calib_method": "max",
    "unsigned": False,
    "narrow_range": False,
}


class QuantDescriptor:
    """How a tensor is quantized; read-only.

    Args:
        num_bits: Width of the codes, 0 and up, or (4, 3) for FP8 E4M3.
        name: A name for messages.
        fake_quant: Quantize and dequantize; False returns the codes themselves.
        axis: The axes with a range for each index (negative ones count from the end), None for one range.
        amax: The range if it is known: a float, a list or an ndarray; kept as float32.
        learn_amax: Train the range by gradient.
        scale_amax: Factor on the range.
        calib_method: "max" or "histogram".
        unsigned: Codes start at 0.
        narrow_range: Leave out the most negative code.

    Raises:
        TypeError: A field of the wrong type, or an unknown one ("Unused keys").
        ValueError: A negative `num_bits`.
    """

    def __init__(self, num_bits: NumBits = 8, name: str | None = None, **kwargs: Any) -> None:
        if unused := sorted(set(kwargs) - set(_DEFAULTS)):
            raise ArgumentTypeError(
                f"Unused keys: {unused}.", f"a descriptor has the fields {', '.join(_DEFAULTS)}."
            )
        fields = {**_DEFAULTS, **kwargs}
        self._num_bits = _checked_num_bits(num_bits)
        if not isinstance(name, str | None):
            raise ArgumentTypeError(
                f"name must be a string or None, found {type(name).__name__}.", "give a string."
            )
        self._name = name
        self._fake_quant = bool(fields["fake_quant"])
        self._axis = _checked_axis(fields["axis"])
        self._amax = _checked_amax(fields["amax"])
        self._learn_amax = bool(fields["learn_amax"])
        self._scale_amax = _checked_scale_amax(fields["scale_amax"])
        self._calib_method = _checked_calib_method(fields["calib_method"])
        self._unsigned = bool(fields["unsigned"])
        self._narrow_range = bool(fields["narrow_range"])
        if self._learn_amax and self._axis is not None:
            raise ArgumentTypeError(
                f"axis is ignored and must be None when learn_amax is True, found {self._axis}.",
                "leave out axis: one range is learned for the whole tensor.",
            )

    @property
    def num_bits(self) -> NumBits:
        """Width of the codes, or (4, 3)."""
        return self._num_bits

    @property
    def name(self) -> str | None:
        """The name for messages."""
        return self._name

    @property
    def fake_quant(self) -> bool:
        """Whether values come back dequantized."""
        return self._fake_quant

    @property
    def axis(self) -> Axis:
        """The axes with a range for each index."""
        return self._axis

    @property
    def amax(self) -> npt.NDArray[np.float32] | None:
        """The range, float32."""
        return self._amax

    @property
    def learn_amax(self) -> bool:
        """Whether the range is trained."""
        return self._learn_amax

    @property
    def scale_amax(self) -> float | None:
        """Factor on the range."""
        return self._scale_amax

    @property
    def calib_method(self) -> str:
        """The statistics that calibration collects."""
        return self._calib_method

    @property
    def unsigned(self) -> bool:
        """Whether codes start at 0."""
        return self._unsigned

    @property
    def narrow_range(self) -> bool:
        """Whether the most negative code is left out."""
        return self._narrow_range

    def dict(self) -> dict[str, Any]:
        """`num_bits`, `name` and every field that differs from its default: the arguments for an equal descriptor."""
        fields: dict[str, Any] = {"num_bits": self._num_bits, "name": self._name}
        for field, default in _DEFAULTS.items():
            value = getattr(self, field)
            if value is default:
                continue
            # An array has no single truth value, and the default of amax is None.
            if field == "amax" or value != default:
                fields[field] = value
        return fields

    def to_yaml(self) -> str:
        """`dict()` as YAML; axes and FP8's `num_bits` as lists."""
        fields = self.dict()
        if "axis" in fields:
            fields["axis"] = list(_as_tuple(self._axis))
        if self._amax is not None:
            fields["amax"] = self._amax.tolist()
        if isinstance(self._num_bits, tuple):
            fields["num_bits"] = list(self._num_bits)
        return str(yaml.safe_dump(fields))

    @classmethod
    def from_yaml(cls, yaml_str: str) -> QuantDescriptor:
        """Read what `to_yaml` wrote.

        Raises:
            ValueError: Not the YAML of a mapping.
        """
        try:
            fields = parse_yaml(yaml_str, "the text", "give what to_yaml() returned.")
        except DataError as error:
            raise ArgumentError(error.message, error.fix) from error
        if not isinstance(fields, dict):
            raise ArgumentError(
                f"the YAML holds a {type(fields).__name__}, expected a mapping.",
                "give what to_yaml() returned.",
            )
        if isinstance(fields.get("num_bits"), list):
            fields["num_bits"] = tuple(fields["num_bits"])
        if isinstance(fields.get("axis"), list) and len(fields["axis"]) == 1:
            fields["axis"] = fields["axis"][0]
        return cls(**fields)

    def _key(self) -> tuple[Any, ...]:
        axis = None
        if self._axis is not None:
            axis = _as_tuple(self._axis)
        amax = None
        if self._amax is not None:
            amax = (self._amax.shape, self._amax.tobytes())
        plain_fields = [field for field in _DEFAULTS if field not in ("axis", "amax")]
        values = [getattr(self, field) for field in plain_fields]
        return (self._num_bits, self._name, axis, amax, *values)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, QuantDescriptor):
            return self._key() == other._key()
        return NotImplemented

    def __hash__(self) -> int:
        return hash(self._key())

    def __str__(self) -> str:
        parts = []
        if self._unsigned:
            parts.append("unsigned")
        parts.append(f"{self._num_bits}bit")
        parts.append("fake" if self._fake_quant else "real")
        parts.append("per-tensor" if self._axis is None else f"axis={self._axis}")
        if self._amax is not None:
            parts.append(f"amax={self._amax}")
            parts.append("narrow_range" if self._narrow_range else "full_range")
        if self._learn_amax:
            parts.append("learn_amax")
        if self._scale_amax is not None:
            parts.append(f"scale_amax={self._scale_amax}")
        prefix = f"{self._name}: " if self._name else ""
        return f"{prefix}QuantDescriptor({' '.join(parts)})"

    __repr__ = __str__


ScaledQuantDescriptor = QuantDescriptor


def _checked_num_bits(num_bits: Any) -> NumBits:
    if isinstance(num_bits, tuple) and num_bits == E4M3:
        return E4M3
    if isinstance(num_bits, bool) or not isinstance(num_bits, int):
        raise ArgumentTypeError(
            f"num_bits must be an int, or (4, 3) for FP8 E4M3; found {num_bits!r} of type {type(num_bits).__name__}.",
            "use 8 for TensorRT.",
        )
    if num_bits < 0:
        raise ArgumentError(f"num_bits must be 0 or more, found {num_bits}.", "use 8 for TensorRT.")
    if num_bits == 0:
        logger.error("num_bits is 0: everything quantizes to zero.")
    return num_bits


def _checked_axis(axis: Any) -> Axis:
    if axis is None or (isinstance(axis, int) and not isinstance(axis, bool)):
        return axis
    if (
        isinstance(axis, Sequence)
        and not isinstance(axis, str)
        and all(type(index) is int for index in axis)
    ):
        return tuple(axis)
    raise ArgumentTypeError(
        f"axis must be None, an int or a sequence of ints; found {axis!r}.", "for example axis=0."
    )


def _checked_amax(amax: Any) -> npt.NDArray[np.float32] | None:
    if amax is None:
        return None
    if not isinstance(amax, float | list | np.ndarray | np.floating):
        raise ArgumentTypeError(
            f"amax must be float, list or ndarray, found {amax!r} of type {type(amax).__name__}.",
            "write 2.0 for 2, and tensor.numpy() for a tensor.",
        )
    try:
        result = np.array(amax, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise ArgumentTypeError(
            f"amax must be float, list or ndarray of numbers, found {amax!r}.", "give 2.5."
        ) from error
    result.setflags(write=False)
    return result


def _checked_scale_amax(scale_amax: Any) -> float | None:
    if scale_amax is not None and (
        isinstance(scale_amax, bool) or not isinstance(scale_amax, int | float)
    ):
        raise ArgumentTypeError(
            f"scale_amax must be a number or None, found {scale_amax!r}.", "give a float."
        )
    return scale_amax


def _checked_calib_method(method: Any) -> str:
    """Accept any string: misspelt ones are common in scripts, and the quantizer warns about them (F11)."""
    if not isinstance(method, str):
        raise ArgumentTypeError(
            f"calib_method must be a string, found {method!r}.", "use 'max' or 'histogram'."
        )
    return method


def _as_tuple(axis: Axis) -> tuple[int, ...]:
    if axis is None:
        return ()
    if isinstance(axis, int):
        return (axis,)
    return axis


QUANT_DESC_8BIT_PER_TENSOR = QuantDescriptor(num_bits=8)
QUANT_DESC_UNSIGNED_8BIT_PER_TENSOR = QuantDescriptor(num_bits=8, unsigned=True)
QUANT_DESC_8BIT_CONV1D_WEIGHT_PER_CHANNEL = QuantDescriptor(num_bits=8, axis=0)
QUANT_DESC_8BIT_CONV2D_WEIGHT_PER_CHANNEL = QuantDescriptor(num_bits=8, axis=0)
QUANT_DESC_8BIT_CONV3D_WEIGHT_PER_CHANNEL = QuantDescriptor(num_bits=8, axis=0)
QUANT_DESC_8BIT_LINEAR_WEIGHT_PER_ROW = QuantDescriptor(num_bits=8, axis=0)
QUANT_DESC_8BIT_CONVTRANSPOSE1D_WEIGHT_PER_CHANNEL = QuantDescriptor(num_bits=8, axis=1)
QUANT_DESC_8BIT_CONVTRANSPOSE2D_WEIGHT_PER_CHANNEL = QuantDescriptor(num_bits=8, axis=1)
QUANT_DESC_8BIT_CONVTRANSPOSE3D_WEIGHT_PER_CHANNEL = QuantDescriptor(num_bits=8, axis=1)


def largest_code(num_bits: int, unsigned: bool) -> int:
    """B = 2^(num_bits - 1 + unsigned) - 1; 0 for 0 bits.

    Raises:
        ValueError: Signed and 1 bit, which has no code but zero; less than 0 bits.
        TypeError: Not a number of bits.
    """
    if isinstance(num_bits, bool) or not isinstance(num_bits, int | float):
        raise ArgumentTypeError(
            f"num_bits must be an int here, found {num_bits!r}.",
            "use 8 for TensorRT, and scaled_e4m3 for (4, 3).",
        )
    if num_bits < 0:
        raise ArgumentError(f"num_bits must be 0 or more, found {num_bits}.", "use 8 for TensorRT.")
    if num_bits == 0:
        return 0
    if num_bits == 1 and not unsigned:
        raise ArgumentError(
            "num_bits is 1 and signed: the largest code would be 0.",
            "the smallest useful width is 2 signed and 1 unsigned.",
        )
    return int(2 ** (num_bits - 1 + bool(unsigned)) - 1)


def tensor_quant(
    inputs: torch.Tensor,
    amax: Range,
    num_bits: int = 8,
    unsigned: bool = False,
    narrow_range: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes of a tensor and the scale, a multiplier.

    Args:
        inputs: A floating point tensor of any shape.
        amax: The range; broadcasts against `inputs`.
        num_bits: Width of the codes.
        unsigned: Codes start at 0.
        narrow_range: Leave out the most negative code.

    Returns:
        Codes, and scale of the shape of `amax`, both of the type of `inputs`. The gradient passes straight through
        where |x| <= amax and is zero elsewhere.

    Raises:
        ValueError: Negative values in amax; a scale too large for float16; signed with 1 bit.
        TypeError: Negative values and unsigned codes; not a floating point tensor.
    """
    codes, scale = TensorQuantFunction.apply(inputs, amax, num_bits, unsigned, narrow_range)
    return codes, scale


def fake_tensor_quant(
    inputs: torch.Tensor,
    amax: Range,
    num_bits: int = 8,
    unsigned: bool = False,
    narrow_range: bool = True,
) -> torch.Tensor:
    """Quantize and dequantize; arguments, gradient and errors as `tensor_quant`, finite in float16 too."""
    result: torch.Tensor = FakeTensorQuantFunction.apply(
        inputs, amax, num_bits, unsigned, narrow_range
    )
    return result


def legacy_fake_tensor_quant(
    inputs: torch.Tensor,
    amax: Range,
    num_bits: int = 8,
    unsigned: bool = False,
    narrow_range: bool = True,
) -> torch.Tensor:
    """The numbers of `fake_tensor_quant` under its former name."""
    result: torch.Tensor = LegacyFakeTensorQuantFunction.apply(
        inputs, amax, num_bits, unsigned, narrow_range
    )
    return result


def fake_affine_tensor_quant(
    inputs: torch.Tensor, min_range: Range, max_range: Range, num_bits: int = 8
) -> torch.Tensor:
    """Quantize and dequantize on a range that need not be symmetric.

    With d = (max - min) / (2^b - 1) and z = round(min / d) + 2^(b-1), the code is
    q = clamp(round(x / d) - z, -2^(b-1), 2^(b-1) - 1) and the value (q + z) d.

    Args:
        inputs: A floating point tensor of any shape.
        min_range: Lower bound, a number or a tensor that broadcasts.
        max_range: Upper bound, likewise; if both are equal, every value becomes the bound.
        num_bits: Width of the codes.

    Raises:
        ValueError: A lower bound above the upper one, or no bits.
        TypeError: Not a floating point tensor.
    """
    result: torch.Tensor = FakeAffineTensorQuantFunction.apply(
        inputs, min_range, max_range, num_bits
    )
    return result


def scaled_e4m3(
    inputs: torch.Tensor,
    amax: Range | None = None,
    E: int = 4,  # noqa: N803 - the names of pytorch-quantization
    M: int = 3,  # noqa: N803
) -> torch.Tensor:
    """Round to the FP8 E4M3 grid after scaling amax to 448, and back.

    Args:
        inputs: A floating point tensor of any shape.
        amax: The range; None: no scaling.
        E: Exponent bits, 4.
        M: Mantissa bits, 3.

    Raises:
        NotImplementedError: Another format.
    """
    result: torch.Tensor = ScaledE4M3Function.apply(inputs, amax, E, M)
    return result


class _Quantized(NamedTuple):
    """Result of `_quantize`, in the type of the computation."""

    codes: torch.Tensor
    scale: torch.Tensor


def _quantize(
    inputs: torch.Tensor,
    amax: torch.Tensor,
    num_bits: int,
    unsigned: bool,
    narrow: bool,
    *,
    is_checked: bool = True,
) -> _Quantized:
    """Codes and scale in float32 (float64 for float64 inputs), after a check of the values."""
    values = _computable(inputs)
    amax = amax.detach().to(values)
    _require_broadcasting(values, amax)
    if is_checked and not is_capturing():
        _require_legal(values, amax, unsigned)
    qmax = largest_code(num_bits, unsigned)
    if unsigned:
        qmin = 0
    elif narrow or num_bits == 0:
        qmin = -qmax
    else:
        qmin = -qmax - 1
    empty = amax <= EPS
    multiplier = _divide(qmax, amax)
    codes = (values * multiplier).round_().clamp_(qmin, qmax)
    if not empty.is_cpu or is_capturing() or bool(empty.any()):  # on a GPU reading it would wait
        codes.masked_fill_(empty, 0)
    return _Quantized(
        codes, torch.where(empty | (multiplier == 0), torch.ones_like(amax), multiplier)
    )


def _tensor_quant(
    inputs: torch.Tensor,
    amax: Range,
    num_bits: int = 8,
    unsigned: bool = False,
    narrow_range: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes in the type of the inputs and scale, without gradient; the scale of half and bfloat16 is float32."""
    codes, scale = _quantize(inputs, _as_tensor(amax, inputs), num_bits, unsigned, narrow_range)
    return _cast_back(codes, inputs.dtype), scale


def _divide(largest: float, amax: torch.Tensor) -> torch.Tensor:
    """A quotient rounded once; torch computes number / tensor as a reciprocal and a product, which round twice."""
    return torch.full_like(amax, largest) / amax


def divide_by_number(values: torch.Tensor, divisor: float) -> torch.Tensor:
    """The quotient, rounded once; a GPU would multiply by the reciprocal of a number, which rounds twice.

    Args:
        values: The dividend.
        divisor: A number.
    """
    if values.is_cpu:
        return values / divisor
    return values / torch.full_like(values, divisor)


def _computable(inputs: torch.Tensor) -> torch.Tensor:
    """Inputs detached, half and bfloat16 as float32."""
    if not isinstance(inputs, torch.Tensor) or not inputs.is_floating_point():
        kind = inputs.dtype if isinstance(inputs, torch.Tensor) else type(inputs).__name__
        raise ArgumentTypeError(
            f"inputs must be a floating point tensor, found {kind}.", "convert it with .float()."
        )
    inputs = inputs.detach()
    if inputs.dtype in (torch.float16, torch.bfloat16):
        return inputs.float()
    return inputs


def _require_broadcasting(values: torch.Tensor, amax: torch.Tensor) -> None:
    try:
        torch.broadcast_shapes(values.shape, amax.shape)  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise ShapeError(
            f"amax of shape {tuple(amax.shape)} does not broadcast against inputs of shape {tuple(values.shape)}.",
            "give one number, or one for each index of an axis, of size 1 on all others.",
        ) from error


def _require_legal(values: torch.Tensor, amax: torch.Tensor, unsigned: bool) -> None:
    if bool((amax < 0).any()):
        raise ArgumentError(
            f"Negative values in amax: the smallest is {float(amax.min())}.",
            "a range is the largest absolute value; take the maximum of abs().",
        )
    if unsigned and bool((values < 0).any()):
        raise ArgumentTypeError(
            f"Negative values encountered in unsigned quantization: the smallest is {float(values.min())}.",
            "use a signed descriptor here, or an input that is never below 0 (after a ReLU).",
        )


def _cast_back(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round once to the type of the inputs, without making infinities (F24)."""
    if values.dtype == dtype:
        return values
    limit = torch.finfo(dtype).max
    return values.clamp_(-limit, limit).to(dtype)


def _pass_inside(inputs: torch.Tensor, low: Any, high: Any, grad: torch.Tensor) -> torch.Tensor:
    """The straight-through gradient: bounds included."""
    return torch.where((inputs >= low) & (inputs <= high), grad, torch.zeros_like(grad))


class _StraightThrough(torch.autograd.Function):
    """The gradient of codes on a symmetric range."""

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Straight through where |x| <= amax."""
        inputs, amax = ctx.saved_tensors
        return _pass_inside(inputs, -amax, amax, grads[0]), None, None, None, None, None


class TensorQuantFunction(_StraightThrough):
    """`tensor_quant` with its gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: torch.Tensor,
        amax: Range,
        num_bits: int = 8,
        unsigned: bool = False,
        narrow_range: bool = True,
        is_checked: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `tensor_quant`; without the check, a GPU is not waited for."""
        amax = _as_tensor(amax, inputs)
        codes, scale = _quantize(
            inputs, amax, num_bits, unsigned, narrow_range, is_checked=is_checked
        )
        if is_checked and inputs.dtype == torch.float16 and not is_capturing():
            _require_fp16_scale(scale, amax)
        ctx.save_for_backward(inputs, amax)
        scale = scale.to(inputs.dtype)
        ctx.mark_non_differentiable(scale)
        return _cast_back(codes, inputs.dtype), scale


def _require_fp16_scale(scale: torch.Tensor, amax: torch.Tensor) -> None:
    if float(scale.max()) > torch.finfo(torch.float16).max:
        raise ArgumentError(
            f"scale is too large for FP16: {float(scale.max())} with amax down to {float(amax.min())}.",
            "quantize in float32, or use fake_tensor_quant, which keeps the scale in float32.",
        )


class FakeTensorQuantFunction(_StraightThrough):
    """`fake_tensor_quant` with its gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: torch.Tensor,
        amax: Range,
        num_bits: int = 8,
        unsigned: bool = False,
        narrow_range: bool = True,
        is_checked: bool = True,
    ) -> torch.Tensor:
        """As `fake_tensor_quant`; without the check, a GPU is not waited for."""
        amax = _as_tensor(amax, inputs)
        ctx.save_for_backward(inputs, amax)
        codes, scale = _quantize(
            inputs, amax, num_bits, unsigned, narrow_range, is_checked=is_checked
        )
        return _cast_back(codes.div_(scale), inputs.dtype)


class LegacyFakeTensorQuantFunction(FakeTensorQuantFunction):
    """The same under its former name."""


class FakeAffineTensorQuantFunction(torch.autograd.Function):
    """`fake_affine_tensor_quant` with its gradient."""

    @staticmethod
    def forward(
        ctx: Any, inputs: torch.Tensor, min_range: Range, max_range: Range, num_bits: int = 8
    ) -> torch.Tensor:
        """As `fake_affine_tensor_quant`."""
        low, high = _as_tensor(min_range, inputs), _as_tensor(max_range, inputs)
        ctx.save_for_backward(inputs, low, high)
        values = _computable(inputs)
        low, high = low.to(values), high.to(values)
        if largest_code(num_bits, unsigned=True) == 0:
            raise ArgumentError(
                f"num_bits must be 1 or more, found {num_bits}.", "8 is the usual width."
            )
        if not is_capturing() and bool((low > high).any()):
            raise ArgumentError("min_range is above max_range.", "give the smaller bound first.")
        half = 2.0 ** (num_bits - 1)
        flat = low == high
        width = divide_by_number(high - low, 2**num_bits - 1)
        step = torch.where(flat, torch.ones_like(low), width)
        zero_point = (low / step).round_() + half
        codes = ((values / step).round_() - zero_point).clamp_(-half, half - 1)
        return _cast_back(torch.where(flat, low, (codes + zero_point) * step), inputs.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Straight through where min <= x <= max."""
        inputs, low, high = ctx.saved_tensors
        return _pass_inside(inputs, low, high, grads[0]), None, None, None


class ScaledE4M3Function(torch.autograd.Function):
    """`scaled_e4m3` with its gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: torch.Tensor,
        amax: Range | None = None,
        E: int = 4,  # noqa: N803  # the names that scripts know
        M: int = 3,  # noqa: N803
        is_checked: bool = True,
    ) -> torch.Tensor:
        """As `scaled_e4m3`; without the check, a GPU is not waited for."""
        if (E, M) != E4M3:
            raise UnsupportedError(
                f"FP8 with E={E}, M={M}; only E=4, M=3 is supported.", "use E=4 and M=3."
            )
        amax = _as_tensor(E4M3_MAX if amax is None else amax, inputs)
        ctx.save_for_backward(inputs, amax)
        values = _computable(inputs)
        if is_checked and not is_capturing():
            _require_legal(values, amax.to(values), unsigned=False)
        return _cast_back(_round_scaled(values, amax.to(values)), inputs.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Straight through where |x| <= amax, 448 without one."""
        inputs, amax = ctx.saved_tensors
        return _pass_inside(inputs, -amax, amax, grads[0]), None, None, None, None


def _round_scaled(values: torch.Tensor, amax: torch.Tensor) -> torch.Tensor:
    """Values on the FP8 E4M3 grid for a range."""
    empty = amax <= EPS
    scale = torch.where(empty, torch.ones_like(amax), _divide(E4M3_MAX, amax))
    rounded = round_e4m3(values * scale).div_(scale)
    return rounded.masked_fill_(empty | (values.abs() < EPS), 0)


def round_e4m3(values: torch.Tensor) -> torch.Tensor:
    """The nearest number of the FP8 E4M3 grid, half to even, saturating at +-448.

    The grid has 3 mantissa bits for exponents -6 to 8 and continues in steps of 2^-9 down to zero
    (Micikevicius et al., "FP8 Formats for Deep Learning", 2022).
    """
    exponent = torch.frexp(values).exponent - 1
    step = torch.ldexp(torch.ones_like(values), exponent.clamp_min(-6) - 3)
    return (values / step).round_().mul_(step).clamp_(-E4M3_MAX, E4M3_MAX)


def _as_tensor(value: Range, inputs: torch.Tensor) -> torch.Tensor:
    """A range on the device of the inputs; numbers become 0-D tensors."""
    if not isinstance(inputs, torch.Tensor):
        _computable(inputs)
    if isinstance(value, Real) and not inputs.is_cpu:  # a copy from the CPU would wait
        return torch.full((), float(value), dtype=torch.float64, device=inputs.device).float()
    dtype = None if isinstance(value, torch.Tensor) else torch.float32
    try:
        return torch.as_tensor(value, dtype=dtype, device=inputs.device)
    except (TypeError, ValueError) as error:
        raise ArgumentTypeError(
            f"a range must be a number or a tensor, found {value!r} of type {type(value).__name__}.",
            "give the largest absolute value, such as 2.5.",
        ) from error

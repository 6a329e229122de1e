"""Layers for integer-only inference: calibrated on fake-quantized values, frozen, then run on codes.

With scales S and zero points Z of the input x, the weight w and the output a, and M = Sw * Sx / Sa:

    qa = clamp(round(M * (sum (qx - Zx) * (qw - Zw) + qb)) + Za),  qb = round_half_even(bias / (Sw * Sx)) in int32

(Jacob et al., CVPR 2018, arXiv 1712.05877, section 2.) The sums are int32, and M is an integer and a shift.
"""

from __future__ import annotations

from typing import Any

import torch

from qdq.errors import MissingRangeError, StateError
from qdq.systems.affine import FakeQuantize, Scheme, require_width
from qdq.systems.arithmetic import require_values
from qdq.systems.grid import Grid
from qdq.systems.integer.checks import choose_range, require_codes
from qdq.systems.integer.qparam import QParam
from qdq.systems.integer.state import require_original
from qdq.systems.typed_state import TypedState


class QModule(TypedState):
    """A layer with the range of its input, `qi`, and the range of its output, `qo`.

    Args:
        qi: It has a range for its input; False: `freeze` gets that of the layer before.
        qo: It has a range for its output.
        num_bits: Width of the codes.
        scheme: As for `affine.find_codes`.
        label: Name of the layer, for messages; "": its class.

    Attributes:
        is_frozen: Whether it computes on codes.

    Raises:
        ArgumentError: A width or scheme that does not exist.
        NumberTypeError: A width that is not an integer.
    """

    qi: QParam
    qo: QParam
    range_names: tuple[str, ...] = ("qi", "qo")
    """The ranges that it needs to be frozen; the last one is that of its output."""

    is_foreign_quantizer = True  # see `SystemQuantizer`

    def __init__(
        self,
        qi: bool = True,
        qo: bool = True,
        num_bits: int | None = 8,
        *,
        scheme: Scheme = "unsigned",
        label: str = "",
    ) -> None:
        super().__init__()
        self.label = label or type(self).__name__
        require_width(num_bits, scheme, self.label)
        self.num_bits = num_bits
        self.scheme: Scheme = scheme
        self.is_frozen = False
        if qi:
            self.qi = self._make_range("qi")
        if qo:
            self.qo = self._make_range("qo")

    def freeze(self, qi: QParam | None = None, qo: QParam | None = None) -> None:
        """Turn to codes, once.

        Args:
            qi: Range of the input, if it was made with `qi=False`.
            qo: Range of the output, if it was made with `qo=False`.

        Raises:
            ArgumentError: Two ranges for the input or the output, or none.
            StateError: It is frozen, not calibrated, or a replica of nn.DataParallel.
        """
        self.take_ranges(qi, qo)
        self.is_frozen = True

    def quantize_inference(self, x: torch.Tensor) -> torch.Tensor:
        """The codes of the output, int32.

        Args:
            x: Codes of the input, integers of any type.

        Raises:
            ArgumentError: Numbers that are no codes of the input: no integers, or outside its codes.
            StateError: It is not frozen.
        """
        raise NotImplementedError("quantize_inference should be implemented.")

    def grids(self) -> dict[str, Grid]:
        """The grids of "input", "weight" and "output", those that it has."""
        grids = {}
        for name, attribute in (("input", "qi"), ("output", "qo")):
            qparam = getattr(self, attribute, None)
            if qparam is not None and qparam.is_calibrated:
                grids[name] = qparam.describe()
        return grids

    @property
    def output_range(self) -> QParam:
        """The range of the output of a frozen layer."""
        qparam: QParam = getattr(self, self.range_names[-1])
        return qparam

    def check_freeze(self, qi: QParam | None = None, qo: QParam | None = None) -> list[QParam]:
        """The ranges with which `freeze` would freeze it, one for each of `range_names`; it raises the same errors."""
        self._require_open("freeze")
        require_original(self, self.label)
        ranges = []
        for name, offered in zip(self.range_names, (qi, qo), strict=False):
            ranges.append(choose_range(name, getattr(self, name, None), offered, self.label))
        return ranges

    def take_ranges(self, qi: QParam | None = None, qo: QParam | None = None) -> None:
        """Take the ranges that `freeze` was given; change nothing if it cannot freeze. See `check_freeze`."""
        for name, qparam in zip(self.range_names, self.check_freeze(qi, qo), strict=True):
            setattr(self, name, qparam)

    def require_frozen(self, call: str = "export") -> None:
        """Refuse a call that needs codes.

        Args:
            call: What was called, for the message.

        Raises:
            StateError: It is not frozen.
        """
        if not self.is_frozen:
            fix = "calibrate and freeze it first."
            raise StateError(f"{self.label}: {call} before freeze; it is not frozen.", fix)

    def require_codes(self, x: torch.Tensor) -> torch.Tensor:
        """The codes of the input, int32.

        Raises:
            ArgumentError: Numbers that are no codes of the input.
            StateError: It is not frozen.
        """
        self.require_frozen("quantize_inference")
        return require_codes(x, self.qi, self.label)

    def observe_input(self, x: torch.Tensor) -> torch.Tensor:
        """The input on the grid of `qi`, which follows it; the input itself if the layer before has quantized it."""
        self._require_open("forward")
        return self._observe("qi", x)

    def observe_output(self, x: torch.Tensor) -> torch.Tensor:
        """The output on the grid of `qo`, which follows it; the output itself without `qo`."""
        return self._observe("qo", x)

    def _require_open(self, call: str) -> None:
        if self.is_frozen:
            raise StateError(
                f"{self.label}: {call} after freeze; it computes on codes now.",
                "call quantize_inference, or keep a copy from before freeze.",
            )

    def _observe(self, name: str, x: torch.Tensor) -> torch.Tensor:
        if not hasattr(self, name):
            require_values(x, f"{self.label}, {name}")
            return x
        qparam = getattr(self, name)
        qparam.observe(x)
        result: torch.Tensor = FakeQuantize.apply(x, qparam)
        return result

    def __getattr__(self, name: str) -> Any:
        # A property would hide from `hasattr` whether there is a range.
        if name in self.range_names and name not in self._modules:
            raise MissingRangeError(
                f"{self.label}: it has no {name} before freeze.",
                "freeze the layers in their order, or use the range of the layer before.",
            )
        return super().__getattr__(name)

    def _make_range(self, name: str) -> QParam:
        return QParam(self.num_bits, scheme=self.scheme, label=f"{self.label}, {name}")

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        # A frozen layer has the ranges that `freeze` gave it. `load_state_dict` loads the children after this call.
        for name in ("qi", "qo"):
            scale = state_dict.get(f"{prefix}{name}.scale")
            if scale is not None and not hasattr(self, name):
                setattr(self, name, self._make_range(name).to(scale.device))
                self.is_frozen = True
        super()._load_from_state_dict(state_dict, prefix, *args)

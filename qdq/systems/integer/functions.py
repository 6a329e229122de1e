"""The layers without weights for integer-only inference: `QReLU`, `QMaxPooling2d` and `QSigmoid`."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.modules.utils import _pair

from qdq.errors import ArgumentError
from qdq.systems.affine import Scheme
from qdq.systems.integer.checks import naming_layer
from qdq.systems.integer.module import QModule
from qdq.systems.integer.qparam import QParam
from qdq.systems.settings import require_count


class _OnInputRange(QModule):
    """A layer whose output has the range of its input; its own `qo` is an entry in the state dicts of users."""

    range_names = ("qi",)

    def __init__(
        self, qi: bool = False, num_bits: int | None = None, *, scheme: Scheme = "unsigned"
    ) -> None:
        super().__init__(qi, num_bits=num_bits, scheme=scheme)

    def freeze(self, qi: QParam | None = None) -> None:  # type: ignore[override]
        """Take the range of the layer before; once. See `QModule.freeze`."""
        self.take_ranges(qi)
        self.is_frozen = True


class QReLU(_OnInputRange):
    """max(x, 0), on codes max(q, Z); scale and zero point do not change.

    Args:
        qi: As for `QModule`.
        num_bits: Width of the codes, if it has a range.
        scheme: As for `affine.find_codes`.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The ReLU of the fake-quantized input."""
        return F.relu(self.observe_input(x))

    def quantize_inference(self, x: torch.Tensor) -> torch.Tensor:
        """The codes of the output. See `QModule.quantize_inference`."""
        return torch.maximum(self.require_codes(x), self.qi.zero_point.to(torch.int32))


class QMaxPooling2d(_OnInputRange):
    """Max pooling, on codes the same; scale and zero point do not change.

    Args:
        kernel_size: As for `torch.nn.MaxPool2d`.
        stride: As for `torch.nn.MaxPool2d`.
        padding: As for `torch.nn.MaxPool2d`.
        qi: As for `QModule`.
        num_bits: Width of the codes, if it has a range.
        scheme: As for `affine.find_codes`.

    Raises:
        ArgumentError: Padding that is no number from 0 to half the kernel.
    """

    def __init__(
        self,
        kernel_size: Any = 3,
        stride: Any = 1,
        padding: Any = 0,
        qi: bool = False,
        num_bits: int | None = None,
        *,
        scheme: Scheme = "unsigned",
    ) -> None:
        super().__init__(qi, num_bits, scheme=scheme)
        _require_padding(kernel_size, padding, self.label)
        self.kernel_size = kernel_size
        self.stride = stride
        self.padding = padding

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The largest values of the fake-quantized input."""
        return F.max_pool2d(self.observe_input(x), self.kernel_size, self.stride, self.padding)

    def quantize_inference(self, x: torch.Tensor) -> torch.Tensor:
        """The largest codes. See `QModule.quantize_inference`."""
        codes = self.require_codes(x).float()  # exact, and implemented on every device
        with naming_layer(self.label, x):
            return F.max_pool2d(codes, self.kernel_size, self.stride, self.padding).to(torch.int32)


def _require_padding(kernel_size: Any, padding: Any, label: str) -> None:
    """Refuse padding from which torch takes no maximum: more than half the kernel."""
    for size, width in zip(_pair(kernel_size), _pair(padding), strict=False):
        require_count(size, "kernel_size", label, least=1)
        require_count(width, "padding", label)
        if width > size // 2:
            raise ArgumentError(
                f"{label}: padding is {padding}, the kernel {kernel_size}.",
                "pad at most half the kernel.",
            )


QMaxPool2d = QMaxPooling2d
"""Its name in torch: users write either."""


class QSigmoid(QModule):
    """The logistic sigmoid; on codes by a table, between whose points it is linear.

    Args:
        qi: As for `QModule`.
        qo: As for `QModule`.
        num_bits: Width of the codes.
        lut_size: Number of points, evenly spaced over the codes.
        scheme: As for `affine.find_codes`.

    Attributes:
        lut_qx: Codes of the input at the points, int32; empty before `freeze`.
        lut_qy: Codes of the output there.

    Raises:
        ArgumentError: Fewer than 2 points.
        NumberTypeError: A number of points that is no integer.
    """

    lut_qx: torch.Tensor
    lut_qy: torch.Tensor

    def __init__(
        self,
        qi: bool = True,
        qo: bool = True,
        num_bits: int = 8,
        lut_size: int = 64,
        *,
        scheme: Scheme = "unsigned",
    ) -> None:
        super().__init__(qi, qo, num_bits, scheme=scheme)
        require_count(lut_size, "lut_size", "QSigmoid", least=2)
        self.lut_size = lut_size
        self.register_buffer("lut_qx", torch.empty(0, dtype=torch.int32))
        self.register_buffer("lut_qy", torch.empty(0, dtype=torch.int32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The fake-quantized sigmoid of the fake-quantized input."""
        return self.observe_output(torch.sigmoid(self.observe_input(x)))

    @torch.no_grad()
    def freeze(self, qi: QParam | None = None, qo: QParam | None = None) -> None:
        """Compute the table; once. See `QModule.freeze`."""
        super().freeze(qi, qo)
        lowest, highest = self.qi.codes
        num_points = min(self.lut_size, highest - lowest + 1)
        steps = torch.arange(num_points, device=self.qi.scale.device)
        points = lowest + steps * (highest - lowest) // (num_points - 1)
        self.lut_qx = points.to(torch.int32)
        self.lut_qy = self.qo.quantize_tensor(torch.sigmoid(self.qi.dequantize_tensor(points)))

    @torch.no_grad()
    def quantize_inference(self, x: torch.Tensor) -> torch.Tensor:
        """The codes of the output, interpolated in integers. See `QModule.quantize_inference`."""
        codes = self.require_codes(x)
        right = torch.searchsorted(self.lut_qx, codes).clamp(min=1)
        left = right - 1
        width = self.lut_qx[right] - self.lut_qx[left]
        rise = (self.lut_qy[right] - self.lut_qy[left]) * (codes - self.lut_qx[left])
        steps = torch.div(2 * rise + width, 2 * width, rounding_mode="floor")
        return (self.lut_qy[left] + steps).to(torch.int32)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        for name in ("lut_qx", "lut_qy"):
            value = state_dict.get(f"{prefix}{name}")
            if value is not None:
                empty = torch.empty(value.shape, dtype=torch.int32, device=self.lut_qx.device)
                setattr(self, name, empty)
                self.is_frozen = len(value) > 0
        super()._load_from_state_dict(state_dict, prefix, *args)

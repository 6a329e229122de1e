"""`LinearQuant` and `LogQuant`: fixed point of activations, calibrated in the first forward calls."""

from __future__ import annotations

import torch

from qdq.errors import StateError
from qdq.systems.arithmetic import pass_gradient, require_batch, require_values
from qdq.systems.fixed_point import (
    compute_integral_part,
    describe_linear,
    describe_sign,
    quantize_linear,
    require_sf,
)
from qdq.systems.grid import Grid, describe_moving
from qdq.systems.logarithmic import compute_log_sf, describe_log, quantize_log_linear
from qdq.systems.quantizer import SystemQuantizer
from qdq.systems.settings import require_bits, require_count, require_rate

_UNSET = torch.iinfo(torch.int32).max  # the minimum of this and any sf is that sf


class _CountingQuant(SystemQuantizer):
    """Calibrates sf in its first forward calls and quantizes in later ones.

    Args:
        name: Its name, for messages; its path in the model is used where `path` is set.
        bits: Width of a code.
        sf: Number of bits after the point; None: not calibrated.
        overflow_rate: Fraction of the elements of a batch that may saturate.
        counter: Number of forward calls that calibrate. They count in training and in evaluation alike.

    Raises:
        ArgumentError: A number is out of range.
        NumberTypeError: A number of the wrong type.
    """

    _sf: torch.Tensor
    _counter: torch.Tensor

    def __init__(
        self,
        name: str,
        bits: int,
        sf: int | None = None,
        overflow_rate: float = 0.0,
        counter: int = 10,
    ) -> None:
        super().__init__(name)
        require_bits(bits, name)
        require_rate(overflow_rate, name)
        if sf is not None:
            require_sf(sf, name)
        require_count(counter, "counter", name)
        self.bits = bits
        self.overflow_rate = overflow_rate
        start = _UNSET if sf is None else int(sf)
        self.register_buffer("_sf", torch.tensor(start, dtype=torch.int32))
        self.register_buffer("_counter", torch.tensor(counter, dtype=torch.int32))

    @property
    def sf(self) -> int | None:
        """Number of bits after the point; None before the first forward call."""
        sf = int(self.read_number("_sf"))
        return None if sf == _UNSET else sf

    @sf.setter
    def sf(self, sf: int | None) -> None:
        if sf is not None:
            require_sf(sf, self.label)
        self.write_number("_sf", _UNSET if sf is None else int(sf))

    @property
    def counter(self) -> int:
        """Number of forward calls that will calibrate."""
        return int(self.read_number("_counter"))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """The values as they are while it calibrates, then the quantized ones; these calls do not wait for a GPU.

        Raises:
            ArgumentError: Empty or non-finite values.
            NumberTypeError: Not a float tensor.
            StateError: Not calibrated, or to be calibrated in several processes or replicas, which do not share counts.
        """
        counter = self.counter
        if counter == 0:
            require_batch(values, self.label)
            return pass_gradient(values, self._quantize(values, self._require_sf()))
        require_values(values, self.label)
        self.require_single("calibrates")
        sf = self._compute_sf(values)
        self.write_number("_sf", min(sf, self.read_number("_sf")))
        self.write_number("_counter", counter - 1)
        return values

    def extra_repr(self) -> str:
        """The state, between the brackets of `repr`."""
        return (
            f"sf={self.sf}, bits={self.bits}, overflow_rate={self.overflow_rate:.3f}, "
            f"counter={self.counter}"
        )

    def _require_sf(self) -> int:
        sf = self.sf
        if sf is None:
            raise StateError(
                f"{self.label} is not calibrated: sf is None and counter is {self.counter}.",
                "give sf, or a counter above 0 and run the model that often.",
            )
        return sf

    def _require_calibrated(self) -> int:
        if self.counter > 0:
            raise StateError(
                f"{self.label} still calibrates: counter is {self.counter}.",
                "run the model that often first.",
            )
        return self._require_sf()

    def _compute_sf(self, values: torch.Tensor) -> int:
        raise NotImplementedError

    def _quantize(self, values: torch.Tensor, sf: int) -> torch.Tensor:
        raise NotImplementedError


class LinearQuant(_CountingQuant):
    """Fixed point (`linear_quantize`), calibrated by the largest magnitude of the first `counter` batches."""

    def _compute_sf(self, values: torch.Tensor) -> int:
        return self.bits - 1 - compute_integral_part(values, self.overflow_rate)

    def _quantize(self, values: torch.Tensor, sf: int) -> torch.Tensor:
        return quantize_linear(values, sf, self.bits)

    def describe(self, values: torch.Tensor | None) -> Grid:
        """The grid: scale 2^-sf; of one bit the mean |x| of the values, which is constant for a weight only.

        Raises:
            StateError: Not calibrated.
        """
        sf = self._require_calibrated()
        if self.bits > 1:
            return describe_linear(sf, self.bits, self._sf.device)
        if values is not None:
            return describe_sign(values, "fixed point")
        return describe_moving("fixed point", self.bits)


class LogQuant(_CountingQuant):
    """Fixed point of ln |x| (`log_linear_quantize`), calibrated by the elements that are not 0."""

    def _compute_sf(self, values: torch.Tensor) -> int:
        return compute_log_sf(values, self.bits, self.overflow_rate)

    def _quantize(self, values: torch.Tensor, sf: int) -> torch.Tensor:
        return quantize_log_linear(values, sf, self.bits)

    def describe(self, values: torch.Tensor | None) -> Grid:
        """As `describe_log`.

        Raises:
            StateError: Not calibrated.
        """
        self._require_calibrated()
        return describe_log(values, self.bits)

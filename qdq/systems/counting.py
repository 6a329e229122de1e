"""`LinearQuant` and `LogQuant`: fixed point of activations, calibrated in the first forward calls."""

from __future__ import annotations

import torch

from qdq.distributed import find_rank
from qdq.errors import StateError
from qdq.systems.arithmetic import (
    pass_gradient,
    require_bits,
    require_count,
    require_rate,
    require_values,
)
from qdq.systems.fixed_point import (
    compute_integral_part,
    describe_linear,
    describe_moving,
    describe_sign,
    quantize_checked,
    require_sf,
    sign_quantize,
)
from qdq.systems.grid import Grid
from qdq.systems.layer import SystemQuantizer
from qdq.systems.logarithmic import (
    compute_log_sf,
    describe_log,
    log_linear_quantize,
)

_UNSET = torch.iinfo(torch.int32).max  # the minimum of this and any sf is that sf


class _CountingQuant(SystemQuantizer):
    """Calibrates sf in its first forward calls and quantizes in later ones.

    Args:
        name: Its name, for messages; its path in the model is used where `path` is set.
        bits: Width of a code.
        sf: Number of bits after the point; None: not calibrated.
        overflow_rate: Fraction of the elements of a batch that may saturate.
        counter: Number of forward calls that calibrate. They count in training and in evaluation alike.

    Attributes:
        path: Dotted name in the model, for messages; "" if it is not known.

    Raises:
        ArgumentError: A number is out of range.
        ArgumentTypeError: `bits` is no integer.
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
        super().__init__()
        require_bits(bits, name)
        require_rate(overflow_rate, name)
        if sf is not None:
            require_sf(sf, name)
        require_count(counter, name)
        self.name = name
        self.path = ""
        self.bits = bits
        self.overflow_rate = overflow_rate
        start = _UNSET if sf is None else int(sf)
        self.register_buffer("_sf", torch.tensor(start, dtype=torch.int32))
        self.register_buffer("_counter", torch.tensor(counter, dtype=torch.int32))

    @property
    def sf(self) -> int | None:
        """Number of bits after the point; None before the first forward call."""
        sf = int(self._sf)
        return None if sf == _UNSET else sf

    @property
    def counter(self) -> int:
        """Number of forward calls that will calibrate."""
        return int(self._counter)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """The values as they are while it calibrates, then the quantized ones.

        Raises:
            ArgumentError: Empty or non-finite values.
            ArgumentTypeError: Not a float tensor.
            StateError: Not calibrated, or to be calibrated in several processes or replicas, which do not share counts.
        """
        require_values(values, self._label)
        if self.counter > 0:
            self._require_single()
            self._sf.clamp_(max=self._compute_sf(values))
            self._counter.sub_(1)
            return values
        quantized = self._quantize(values, self._require_sf())
        return pass_gradient(values, quantized) if values.requires_grad else quantized

    def extra_repr(self) -> str:
        """The state, between the brackets of `repr`."""
        return (
            f"sf={self.sf}, bits={self.bits}, overflow_rate={self.overflow_rate:.3f}, "
            f"counter={self.counter}"
        )

    @property
    def _label(self) -> str:
        return self.path or self.name

    def _require_sf(self) -> int:
        sf = self.sf
        if sf is None:
            raise StateError(
                f"{self._label} is not calibrated: sf is None and counter is {self.counter}.",
                "give sf, or a counter above 0 and run the model that often.",
            )
        return sf

    def _require_calibrated(self) -> int:
        if self.counter > 0:
            raise StateError(
                f"{self._label} still calibrates: counter is {self.counter}.",
                "run the model that often first.",
            )
        return self._require_sf()

    def _require_single(self) -> None:
        if getattr(self, "_is_replica", False):
            raise StateError(
                f"{self._label} calibrates in a replica of nn.DataParallel, whose counts and sf are lost.",
                "calibrate the model itself, before it is wrapped.",
            )
        _, num_processes = find_rank()
        if num_processes > 1:
            raise StateError(
                f"{self._label} calibrates in {num_processes} processes, each of which would get its own sf.",
                "calibrate in one process and load its state dict in the others.",
            )

    def _compute_sf(self, values: torch.Tensor) -> int:
        raise NotImplementedError

    def _quantize(self, values: torch.Tensor, sf: int) -> torch.Tensor:
        raise NotImplementedError


class LinearQuant(_CountingQuant):
    """Fixed point (`linear_quantize`), calibrated by the largest magnitude of the first `counter` batches."""

    def _compute_sf(self, values: torch.Tensor) -> int:
        return self.bits - 1 - compute_integral_part(values, self.overflow_rate)

    def _quantize(self, values: torch.Tensor, sf: int) -> torch.Tensor:
        if self.bits == 1:
            return sign_quantize(values)
        return quantize_checked(values, sf, self.bits)

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
        return log_linear_quantize(values, sf, self.bits)

    def describe(self, values: torch.Tensor | None) -> Grid:
        """As `describe_log`.

        Raises:
            StateError: Not calibrated.
        """
        self._require_calibrated()
        return describe_log(values, self.bits)

"""Ranges of activations that follow the batches of training.

With decay B, the averages of the smallest and of the largest values, m_t = B * m_(t-1) + (1 - B) * v_t, are divided by
1 - B^t (Kingma, Ba, arXiv 1412.6980, section 3).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from qdq.errors import StateError
from qdq.forward import require_model
from qdq.systems.quantizer import SystemQuantizer
from qdq.systems.settings import require_count, require_number

EMA_DECAY = 0.999


class MovingRange(SystemQuantizer):
    """A quantizer of an activation, by averages of the smallest and largest values of the batches.

    They move in every forward in training mode, and in every step of an optimizer within `moving_ranges`.

    Args:
        name: Name of the layer, for messages.
        decay: B.
        delay: Number of steps in which it only watches; the paper of UINT8 training takes 50 000 to 2 million.

    Attributes:
        running_min: Average of the smallest values, not divided.
        running_max: Average of the largest values, not divided.
        num_steps: Number of batches so far.
        is_moving: Whether it also moves in evaluation mode, where there are gradients.

    Raises:
        ArgumentError: A decay outside [0, 1), or a negative delay.
        NumberTypeError: Numbers of the wrong type.
    """

    running_min: torch.Tensor
    running_max: torch.Tensor
    num_steps: torch.Tensor

    def __init__(self, name: str, decay: float = EMA_DECAY, delay: int = 0) -> None:
        super().__init__(name)
        require_number(decay, "decay", name, 0, 1)
        require_count(delay, "delay", name)
        self.decay = decay
        self.delay = delay
        self.is_moving = False
        self._pending: tuple[torch.Tensor, torch.Tensor] | None = None
        self.register_buffer("running_min", torch.zeros(()))
        self.register_buffer("running_max", torch.zeros(()))
        self.register_buffer("num_steps", torch.zeros((), dtype=torch.int64))

    def follow(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The ends of the range for a batch, which moves them in training.

        Args:
            values: The finite values of the batch.

        Returns:
            The divided averages; None during the delay, and in a measurement before the first step.

        Raises:
            StateError: It has seen no batch; it should move in a replica or in one of several processes.
        """
        if self.training or (self.is_moving and torch.is_grad_enabled()):
            self._observe(values.detach().float())
        low, high, num_steps = self._average()
        if self.training:
            self.after_step()
        if num_steps == 0 and not self.is_moving:
            raise self._uncalibrated()
        if num_steps == 0 or num_steps <= self.delay:
            return None
        return low, high

    def find_range(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The ends of the range: the divided averages.

        Raises:
            StateError: It has seen no more batches than the delay.
        """
        low, high, num_steps = self._average()
        if num_steps == 0 or num_steps <= self.delay:
            raise self._uncalibrated()
        return low, high

    @torch.no_grad()
    def after_step(self) -> None:
        """Keep the averages with the batch of this step, if the step reached the layer."""
        if self._pending is None:
            return
        low, high = self._pending
        self.running_min.mul_(self.decay).add_(low * (1 - self.decay))
        self.running_max.mul_(self.decay).add_(high * (1 - self.decay))
        self.write_number("num_steps", self.read_number("num_steps") + 1)
        self._pending = None

    def forget_step(self) -> None:
        """Drop the batch of a step that did not end."""
        self._pending = None

    def _observe(self, values: torch.Tensor) -> None:
        self.require_single("averages ranges")
        low, high = values.aminmax()
        if self._pending is not None:  # the layer runs more than once in a step
            low = torch.minimum(low, self._pending[0])
            high = torch.maximum(high, self._pending[1])
        self._pending = low, high

    def _average(self) -> tuple[torch.Tensor, torch.Tensor, int]:
        """The averages with the batch of this step, divided, and the number of batches in them."""
        low, high = self.running_min, self.running_max
        num_steps = int(self.read_number("num_steps"))
        if self._pending is not None:
            low = self.decay * low + (1 - self.decay) * self._pending[0]
            high = self.decay * high + (1 - self.decay) * self._pending[1]
            num_steps = num_steps + 1
        # A tensor: on a GPU, torch divides by a Python number with another rounding.
        weight = torch.full_like(low, 1 - self.decay ** max(num_steps, 1), dtype=torch.float64)
        return low / weight, high / weight, num_steps

    def _uncalibrated(self) -> StateError:
        return StateError(
            f"{self.label}: the range of its input has seen {int(self.num_steps)} batches, with a delay "
            f"of {self.delay}.",
            "train first.",
        )


@contextmanager
def moving_ranges(model: nn.Module) -> Iterator[None]:
    """Let the ranges of activations follow the batches in the block, though the model is in evaluation mode.

    `qdq.finetune` keeps a model in that mode. The ranges move with each step of an optimizer, by the forwards that had
    gradients: neither measurements nor a step that fails move them.

    Args:
        model: A model with quantizers of this kind.

    Raises:
        ArgumentTypeError: Not a module.
    """
    require_model(model)
    quantizers = [module for module in model.modules() if isinstance(module, MovingRange)]

    def move(*_: Any) -> None:
        for quantizer in quantizers:
            quantizer.after_step()

    for quantizer in quantizers:
        quantizer.is_moving = True
    handle = register_optimizer_step_post_hook(move)
    try:
        yield
    finally:
        handle.remove()
        for quantizer in quantizers:
            quantizer.is_moving = False
            quantizer.forget_step()

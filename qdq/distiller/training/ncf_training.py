"""`NCFQuantAwareTrainQuantizer`: range-linear quantization in training of networks whose input stays float."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from qdq.distiller.ranges.modes import LinearQuantMode, ModePair
from qdq.distiller.settings.overrides import Overrides
from qdq.distiller.training.range_training import QuantAwareTrainRangeLinearQuantizer
from qdq.systems.moving_range import EMA_DECAY
from qdq.systems.settings import FLOAT_BITS


class NCFQuantAwareTrainQuantizer(QuantAwareTrainRangeLinearQuantizer):
    """`QuantAwareTrainRangeLinearQuantizer` without `quantize_inputs`: users and items are numbers, not values.

    The arguments are those of that class; `num_bits_inputs` has no effect.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        bits_activations: int | None = FLOAT_BITS,
        bits_weights: int | None = FLOAT_BITS,
        bits_bias: int | None = FLOAT_BITS,
        overrides: Overrides | None = None,
        mode: LinearQuantMode | ModePair | Mapping[str, Any] | str = LinearQuantMode.SYMMETRIC,
        ema_decay: float = EMA_DECAY,
        per_channel_wts: bool = False,
        num_bits_inputs: int | None = None,
        freeze_bn_delay: int | None = None,
    ) -> None:
        super().__init__(
            model,
            optimizer,
            bits_activations,
            bits_weights,
            bits_bias,
            overrides,
            mode,
            ema_decay,
            per_channel_wts,
            quantize_inputs=False,
            num_bits_inputs=num_bits_inputs,
            freeze_bn_delay=freeze_bn_delay,
        )

"""Incremental quantization (INQ) to powers of two: the largest weights first, and the rest is trained in between.

Zhou, Yao, Guo, Xu, Chen: Incremental Network Quantization, ICLR 2017, arXiv 1702.03044.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from qdq.device import find_device
from qdq.distributed import joining_processes
from qdq.errors import ArgumentError
from qdq.forward import require_model
from qdq.patterns import Pattern
from qdq.systems.grid import note_grid
from qdq.systems.powers import PowerLevels
from qdq.systems.rounds import RoundOptions, Rounds
from qdq.systems.selection import Selection, select_layers
from qdq.systems.settings import require_kind, require_number

logger = logging.getLogger(__name__)

PORTIONS = (0.5, 0.75, 0.875, 1.0)
"""Fraction of the weights of a layer that is quantized after each round."""


@dataclass(frozen=True)
class IncrementalRound:
    """The log of a round.

    Args:
        portion: Fraction of the weights that are quantized, over all layers.
        loss: Mean loss while the others were trained.
    """

    portion: float
    loss: float


@dataclass(frozen=True)
class IncrementalTraining:
    """Result of `train_incremental`.

    Args:
        selection: The quantized layers, and the others with the reasons.
        rounds: The log.
    """

    selection: Selection
    rounds: tuple[IncrementalRound, ...]

    def format_table(self) -> str:
        """A line a round."""
        lines = ["  round  quantized      loss"]
        for number, row in enumerate(self.rounds):
            lines.append(f"  {number:5d}  {row.portion:9.1%}  {row.loss:8.5f}")
        return "\n".join(lines)


def train_incremental(
    model: nn.Module,
    batches: Iterable[Any],
    example: Any,
    options: RoundOptions,
    *,
    bits: int = 4,
    portions: Sequence[float] = PORTIONS,
    by_layer: bool = False,
    float_layers: Iterable[Pattern] | None = None,
) -> IncrementalTraining:
    """Quantize the weights of a float model to powers of two, in place, and train the rest in between.

    Each round quantizes the largest of the free weights, and these do not change any more; all else is trained.

    Args:
        model: A float model, on its device.
        batches: As for `qdq.finetune`.
        example: Example inputs, see `selection.select_layers`.
        options: How each round is trained.
        bits: Width, from 2; 4 bits are 0 and 4 powers of two with both signs.
        portions: Fraction of the weights of each layer that is quantized after each round.
        by_layer: Instead, quantize one layer a round, in the order in which they run.
        float_layers: Patterns of layers that stay in float; None: the first and the last one that run.

    Raises:
        ArgumentError: No layer, or portions that do not rise to 1; otherwise as for `qdq.finetune`.
        NumberTypeError: A number of the wrong type.
    """
    require_model(model)
    require_kind(options, RoundOptions, "options", "train_incremental")
    portions = _list_rising(portions)
    with joining_processes(find_device(model)):
        selection = select_layers(model, example, float_layers)
        settings = {
            "system": "powers of two",
            "bits": bits,
            "portions": portions,
            "by_layer": by_layer,
            "layers": list(selection.layers),
        }
        freezing = _Freezing(selection, bits)
        runs = Rounds(model, batches, options, settings)
        freezing.unpack(runs.resume())
        num_rounds = len(selection.layers) if by_layer else len(portions)
        for number in range(len(runs.rows), num_rounds):
            for place, name in enumerate(selection.layers):
                portion = float(place <= number) if by_layer else portions[number]
                freezing.freeze(name, portion)
            with freezing.masking_gradients():
                loss = runs.tune(f"round-{number}")
            row = {"portion": freezing.portion, "loss": loss}
            runs.save(row, freezing.masks)
            logger.info("round %d: %s", number, row)
        freezing.finish()
    return IncrementalTraining(selection, tuple(IncrementalRound(**row) for row in runs.rows))


def _list_rising(portions: Any) -> list[float]:
    """The portions, which must rise to 1."""
    numbers = list(portions) if isinstance(portions, Iterable) else [portions]
    for number in numbers:
        require_number(number, "a portion", "train_incremental", 0, math.inf)
    is_rising = all(first < second for first, second in pairwise([0.0, *numbers]))
    if not numbers or not is_rising or numbers[-1] != 1:
        raise ArgumentError(f"portions are {numbers}; they must rise to 1.", f"use {PORTIONS}.")
    return numbers


class _Freezing:
    """The weights of all layers, and which of their elements are quantized.

    Args:
        selection: The layers.
        bits: As for `train_incremental`.

    Attributes:
        masks: Name -> True where the weight is quantized.
    """

    def __init__(self, selection: Selection, bits: int) -> None:
        self.masks: dict[str, torch.Tensor] = {}
        self._layers = selection.layers
        self._levels: dict[str, PowerLevels] = {}
        for name, layer in self._layers.items():
            self._levels[name] = PowerLevels.of(layer.weight, bits, name)
            self.masks[name] = torch.zeros_like(layer.weight, dtype=torch.bool)

    @property
    def portion(self) -> float:
        """Fraction of all weights that are quantized."""
        num_frozen = sum(int(mask.sum()) for mask in self.masks.values())
        return num_frozen / sum(mask.numel() for mask in self.masks.values())

    @torch.no_grad()
    def freeze(self, name: str, portion: float) -> None:
        """Quantize the largest free weights of a layer, until a fraction of all its weights is quantized."""
        weight = self._layers[name].weight
        mask = self.masks[name]
        count = math.ceil(portion * weight.numel()) - int(mask.sum())
        if count <= 0:
            return
        magnitudes = torch.where(mask, -1.0, weight.abs().double()).flatten()
        largest = magnitudes.argsort(descending=True, stable=True)[:count]
        chosen = torch.zeros_like(mask).flatten()
        chosen[largest] = True
        chosen = chosen.reshape(mask.shape)
        weight.copy_(torch.where(chosen, self._levels[name].quantize(weight), weight))
        self.masks[name] = mask | chosen

    @contextmanager
    def masking_gradients(self) -> Iterator[None]:
        """Give quantized weights no gradient in the block, so that the optimizer does not move them."""
        with ExitStack() as exits:
            for name, layer in self._layers.items():
                if layer.weight.requires_grad:
                    is_free = ~self.masks[name]
                    handle = layer.weight.register_hook(
                        lambda gradient, free=is_free: gradient * free
                    )
                    exits.callback(handle.remove)
            yield

    def unpack(self, masks: Mapping[str, torch.Tensor]) -> None:
        """Continue from the masks of an earlier run; without any, keep the start."""
        if masks:
            self.masks = dict(masks)

    def finish(self) -> None:
        """Remember the grids."""
        for name, layer in self._layers.items():
            note_grid(layer, "weight", self._levels[name].describe(layer.weight))

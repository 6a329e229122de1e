"""Training of ternary weights by ADMM: rounds of fine-tuning with a penalty, see `ternary`."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from qdq.device import find_device
from qdq.distributed import joining_processes
from qdq.forward import require_model
from qdq.patterns import Pattern
from qdq.systems.binary import SMALLEST_SCALE
from qdq.systems.rounds import RoundOptions, Rounds
from qdq.systems.selection import Selection, select_layers
from qdq.systems.settings import require_count, require_kind, require_number
from qdq.systems.ternary import TernarySplitting

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TernaryRound:
    """The log of a round.

    Args:
        loss: Mean loss, with the penalty.
        distance: |W - G| / |W| over all ternary layers: how far the weights are from ternary ones.
        zeros: Fraction of the ternary weights that are 0.
    """

    loss: float
    distance: float
    zeros: float


@dataclass(frozen=True)
class TernaryTraining:
    """Result of `train_ternary`.

    Args:
        selection: The ternary layers, and the others with the reasons.
        rounds: The log.
        rest_loss: Mean loss while the rest was trained; None if there was nothing to train.
    """

    selection: Selection
    rounds: tuple[TernaryRound, ...]
    rest_loss: float | None

    def format_table(self) -> str:
        """A line a round."""
        lines = ["  round      loss  |W-G|/|W|  zeros"]
        for number, row in enumerate(self.rounds):
            lines.append(f"  {number:5d}  {row.loss:8.5f}  {row.distance:9.5f}  {row.zeros:5.1%}")
        return "\n".join(lines)


def train_ternary(
    model: nn.Module,
    batches: Iterable[Any],
    example: Any,
    options: RoundOptions,
    *,
    rounds: int = 8,
    rho: float = 1e-3,
    growth: float = 1.0,
    per_channel: bool = True,
    alpha: float | None = None,
    float_layers: Iterable[Pattern] | None = None,
) -> TernaryTraining:
    """Train a float model until its weights are ternary, in place.

    From G = P(W) and U = 0, each round trains W with the penalty rho / 2 * |W - G + U|^2, then G = P(W + U) and
    U = U + W - G. At the end W = G, and what is not ternary (biases, BatchNorm, float layers) is trained once more.

    Args:
        model: A float model, on its device.
        batches: As for `qdq.finetune`.
        example: Example inputs, see `selection.select_layers`.
        options: How each round is trained.
        rounds: Number of rounds.
        rho: Weight of the penalty in the first round.
        growth: Factor of rho from round to round, at least 1. Above 1, codes can change in the first rounds, and the
            distance falls in the last ones. U, which is scaled by 1 / rho, is divided by it (Boyd et al.: Distributed
            Optimization and Statistical Learning via ADMM, 2011, section 3.4.1).
        per_channel: As for `project_ternary`.
        alpha: As for `project_ternary`.
        float_layers: Patterns of layers that stay in float; None: the first and the last one that run.

    Raises:
        ArgumentError: No layer, no round, or a number out of range; otherwise as for `qdq.finetune`.
        ArgumentTypeError: Not a module, or no options.
        NumberTypeError: A number of the wrong type.
    """
    require_model(model)
    require_kind(options, RoundOptions, "options", "train_ternary")
    require_count(rounds, "rounds", "train_ternary", least=1)
    require_number(rho, "rho", "train_ternary", SMALLEST_SCALE, math.inf)
    require_number(growth, "growth", "train_ternary", 1, math.inf)
    if alpha is not None:
        require_number(alpha, "alpha", "train_ternary", SMALLEST_SCALE, math.inf)
    with joining_processes(find_device(model)):
        selection = select_layers(model, example, float_layers)
        settings = {
            "system": "ternary",
            "rounds": rounds,
            "rho": rho,
            "growth": growth,
            "per_channel": per_channel,
            "alpha": alpha,
            "layers": list(selection.layers),
        }
        splitting = TernarySplitting(selection, per_channel, alpha)
        runs = Rounds(model, batches, options, settings)
        splitting.unpack(runs.resume())
        for number in range(len(runs.rows), rounds):
            penalty = partial(splitting.penalty, rho * growth**number)
            loss = runs.tune(f"round-{number}", penalty)
            splitting.update()
            row = {"loss": loss, **splitting.measure()}
            splitting.scale_dual(1 / growth)
            runs.save(row, splitting.pack())
            logger.info("round %d: %s", number, row)
        splitting.finish()
        rest_loss = runs.tune_rest(splitting.weights.values())
    rows = tuple(TernaryRound(**row) for row in runs.rows)
    return TernaryTraining(selection, rows, rest_loss)

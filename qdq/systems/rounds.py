"""Rounds of fine-tuning, from which a killed run resumes: `finetune` within a round, `RoundFile` between two."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qdq.device import find_device
from qdq.errors import ArgumentError, ArgumentTypeError
from qdq.files import as_path, to_jsonable
from qdq.qat import finetune
from qdq.qat.epochs import digest_first_batch
from qdq.qat.losses import Distillation, Loss
from qdq.qat.trainer import digest_weights
from qdq.schedule import Schedule
from qdq.systems.round_file import RoundFile, Row


@dataclass(frozen=True)
class RoundOptions:
    """How each round is trained; the fields are parameters of `qdq.finetune`.

    Args:
        loss: The loss of the task; not "own", which has no place for a penalty.
        distillation: The distance to the teacher; None leaves it out.
        teacher: None: the model as it is before the first round.
        schedule: Length and rates of one round.
        folder: For the state and the log after each round, and a folder with the run of each round; None: no files. A
            killed run resumes when it is called again in the same way, with the same float model, and gives the same
            weights.
        seed: Seed of the first round; each later one has the next number.

    Raises:
        ArgumentError: The loss is "own".
        ArgumentTypeError: The schedule is none.
    """

    loss: Loss | None = None
    distillation: Distillation | None = None
    teacher: nn.Module | None = None
    schedule: Schedule = Schedule()  # noqa: RUF009  # frozen
    folder: Path | str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.loss == "own":
            raise ArgumentError(
                "loss is 'own', and a model that returns its own loss has no place for a penalty.",
                "give a function (outputs, batch) -> scalar.",
            )
        if not isinstance(self.schedule, Schedule):
            raise ArgumentTypeError(
                f"schedule is of type {type(self.schedule).__name__}.", "give a qdq.Schedule."
            )


class Rounds:
    """The rounds of one run.

    Args:
        model: The float model.
        batches: As for `finetune`.
        options: How each round is trained.
        settings: Everything else that the run depends on.

    Attributes:
        rows: The log, one row a round.

    Raises:
        ArgumentError: The folder cannot be written to.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        options: RoundOptions,
        settings: Mapping[str, Any],
    ) -> None:
        self.rows: list[Row] = []
        self._model = model
        self._batches = batches
        self._options = options
        self._folder: Path | None = None
        self._file: RoundFile | None = None
        self._teacher = options.teacher
        if self._teacher is None and options.distillation is not None:
            self._teacher = copy.deepcopy(model).eval().requires_grad_(False)
        if options.folder is not None:
            self._folder = as_path(options.folder, "folder")
            self._file = RoundFile(self._folder, self._describe(settings))

    def _describe(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        options = self._options
        weights = options.distillation
        facts: dict[str, Any] = {
            **settings,
            "weights": digest_weights(self._model),
            "schedule": asdict(options.schedule),
            "loss": getattr(options.loss, "__qualname__", type(options.loss).__qualname__),
            "teacher": None if options.teacher is None else digest_weights(options.teacher),
            "seed": options.seed,
            "data": digest_first_batch(self._batches, options.seed, find_device(self._model)),
        }
        if weights is not None:
            facts["distillation"] = [weights.mse, weights.kl, weights.features, weights.temperature]
        described: dict[str, Any] = to_jsonable(facts)
        return described

    def resume(self) -> dict[str, torch.Tensor]:
        """Give the model the state after the last round that an earlier run has finished.

        Returns:
            The tensors of the system then, on the device of the model; empty if there was no such run.

        Raises:
            ArgumentError: The run had other settings.
            DataError: The file is damaged.
        """
        if self._file is None:
            return {}
        tensors, self.rows = self._file.read(self._model)
        device = find_device(self._model)
        return {name: tensor.to(device) for name, tensor in tensors.items()}

    def save(self, row: Row, tensors: Mapping[str, torch.Tensor]) -> None:
        """Log a finished round, and write the state after it.

        Args:
            row: Its line of the log.
            tensors: Of the system, by name.
        """
        self.rows.append(row)
        if self._file is not None:
            self._file.write(self._model, tensors, self.rows)

    def tune(self, name: str, penalty: Callable[[], torch.Tensor] | None = None) -> float:
        """Train for one round.

        Args:
            name: Name of the folder of the round.
            penalty: Added to the loss.

        Returns:
            The mean of its losses.
        """
        options = self._options
        loss = options.loss
        if penalty is not None:
            assert not isinstance(loss, str)  # noqa: S101  # refused above
            loss = _add_penalty(loss, penalty)
        tuning = finetune(
            self._model,
            self._batches,
            loss=loss,
            distillation=options.distillation,
            teacher=self._teacher,
            schedule=options.schedule,
            ranges="none",
            folder=None if self._folder is None else self._folder / name,
            seed=options.seed + len(self.rows),
        )
        return statistics.fmean(tuning.losses)

    def tune_rest(self, weights: Iterable[torch.Tensor]) -> float | None:
        """Train what is not quantized, such as biases and BatchNorm.

        Args:
            weights: The quantized weights, which do not change.

        Returns:
            The mean of the losses; None if there is nothing to train.
        """
        with ExitStack() as exits:
            for weight in weights:
                exits.callback(weight.requires_grad_, weight.requires_grad)
                weight.requires_grad_(False)
            if not any(parameter.requires_grad for parameter in self._model.parameters()):
                return None
            return self.tune("rest")


def _add_penalty(
    loss: Callable[[Any, Any], torch.Tensor] | None, penalty: Callable[[], torch.Tensor]
) -> Callable[[Any, Any], torch.Tensor]:
    """A loss plus a penalty on the weights; the penalty alone without a loss."""

    def penalized(outputs: Any, batch: Any) -> torch.Tensor:
        total = penalty()
        return total if loss is None else total + loss(outputs, batch)

    return penalized

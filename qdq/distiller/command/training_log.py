"""The lines of a training: `Epoch: [0][   10/  176]    Loss ...`, from the batches and the outputs of the network."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import torch
from torch import nn

from qdq.distiller.command.log import format_progress
from qdq.distiller.command.scores import Scores

logger = logging.getLogger(__name__)


class TrainingLog:
    """Batches of a training that know their epoch and log scores. A with-block ends the log.

    Args:
        batches: Batches of `(images, labels)`, of known number.
        model: The network that is trained on them.
        print_freq: Batches between two lines.
    """

    def __init__(self, batches: Any, model: nn.Module, print_freq: int) -> None:
        self._first_epoch = 0
        self._batches = batches
        self._print_freq = print_freq
        self._epoch = 0
        self._step = 0
        self._labels: torch.Tensor | None = None
        self._scores = Scores()
        self._hook = model.register_forward_hook(self._observe)

    def __enter__(self) -> TrainingLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._hook.remove()

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Any]:
        for step, batch in enumerate(self._batches, 1):
            self._step, self._labels = step, batch[1]
            yield batch

    def begin_phase(self, first_epoch: int) -> None:
        """Count epochs from another one on, as `train_compressed` asks for.

        Args:
            first_epoch: Number of the first epoch of the phase in the whole training.
        """
        self._first_epoch = first_epoch
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch, as `qdq.finetune` asks for.

        Args:
            epoch: Its number in the phase.
        """
        self._epoch = epoch
        self._scores = Scores()

    @property
    def epoch(self) -> int:
        """Number of the epoch in the whole training."""
        return self._first_epoch + self._epoch

    @property
    def has_begun(self) -> bool:
        """Whether the network was trained on a batch of this epoch."""
        return self._scores.num_samples > 0

    def _observe(self, model: nn.Module, inputs: Any, outputs: torch.Tensor) -> None:
        """Take the outputs of a training step; measurements have no gradients."""
        if not torch.is_grad_enabled() or self._labels is None:
            return
        self._scores.add(outputs.detach(), self._labels)
        if self._step % self._print_freq == 0:
            scores = self._scores.read()
            logger.info(format_progress(scores, self._step, len(self), self.epoch))

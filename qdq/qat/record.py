"""What a run of fine-tuning leaves: losses, the curve of the metric, the best model, and the files to go on from."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qdq.distributed import broadcast_number, failing_together, find_rank, read_together
from qdq.errors import ArgumentError, DataError, DependencyError, StateError
from qdq.files import guard_files
from qdq.forward import evaluating
from qdq.qat.checkpoint import (
    MODEL_FORMAT,
    STATE_FORMAT,
    keeping_random_state,
    load_tensors,
    pack_random,
    plain_state,
    require_same_shapes,
    save_tensors,
    save_tuned,
)
from qdq.qat.ranges import describe_ranges
from qdq.qat.trainer import Trainer

logger = logging.getLogger(__name__)

STATE_FILE, BEST_FILE, LAST_FILE = "state.safetensors", "best.safetensors", "last.safetensors"
SCALARS_FOLDER = "tensorboard"
_SAVE_SECONDS = 30.0  # what a killed run loses at most


@dataclass(frozen=True)
class Measurement:
    """The metric at one moment.

    Args:
        step: After so many steps; 0 is before the first.
        metric: Higher is better.
        loss: Mean loss of the steps since the measurement before; None at step 0.
        lr: Learning rate of the last step; 0 at step 0.
    """

    step: int
    metric: float
    loss: float | None
    lr: float


class Record:
    """Losses and measurements of a run, in memory and in its folder.

    Of several processes the first alone reads and writes files, and its metric counts.

    Args:
        trainer: What trains the model.
        metric: `model -> number`, higher is better; None: nothing is measured.
        every: Steps between two measurements.
        folder: Where the files go; None: nowhere.
        settings: What the run depends on; a folder of a run with others is refused.
        tensorboard: Write scalars too.

    Attributes:
        losses: Loss of each step.
        curve: The measurements.
        epoch: The epoch, and how many of its batches were taken.

    Raises:
        ArgumentError: The folder cannot be written to; tensorboard without a folder.
        DependencyError: tensorboard is not installed.
    """

    def __init__(
        self,
        trainer: Trainer,
        metric: Callable[[nn.Module], float] | None,
        every: int,
        folder: Path | None,
        settings: dict[str, Any],
        tensorboard: bool,
    ) -> None:
        self._trainer, self._metric, self._every, self._settings = trainer, metric, every, settings
        self._folder = folder
        self._is_first = find_rank()[0] == 0
        self._saved = time.monotonic()
        self._best: dict[str, torch.Tensor] | None = None
        self.losses: list[float] = []
        self.curve: list[Measurement] = []
        self._random: dict[str, torch.Tensor] = {}
        self.epoch = (0, 0)
        self.seconds = 0.0
        self._writes_scalars = tensorboard and self._is_first
        self._writer: Any = None
        if tensorboard:
            _require_tensorboard(folder)
        if folder is not None and self._is_first:
            scalars = folder / SCALARS_FOLDER / "events" if tensorboard else None
            guard_files(
                outputs=[folder / STATE_FILE, folder / BEST_FILE, folder / LAST_FILE, scalars]
            )

    @property
    def best(self) -> Measurement | None:
        """The measurement with the best metric, the earliest of several."""
        usable = [each for each in self.curve if not math.isnan(each.metric)]
        return max(usable, key=lambda each: each.metric, default=None)

    def add_step(self, loss: float, epoch: tuple[int, int], seconds: float) -> None:
        """A step is done; `epoch` is the one it is of, and how many of its batches have been taken.

        Raises:
            StateError: The metric could not be measured in another process.
        """
        self.losses.append(loss)
        self.epoch = epoch
        self.seconds += seconds
        self._random = pack_random()  # as of this step: the next batch draws more
        step = self._trainer.step
        if self._writer:
            self._writer.add_scalar("loss", loss, step)
            self._writer.add_scalar("lr", self._trainer.lr, step)
        if step % self._every == 0 or step == self._trainer.total:
            try:
                self.measure()
            except BaseException:  # Ctrl-C too
                self.restore_best()
                raise

    def measure(self) -> None:
        """Take the metric of the model as it is now, and keep the model if none was better.

        Raises:
            StateError: It could not be measured in another process.
        """
        if self._metric is None:
            return
        with failing_together(StateError):
            metric = self._take_metric()
        metric = broadcast_number(metric)
        with failing_together(StateError):
            self._add_measurement(metric)

    def _take_metric(self) -> float:
        assert self._metric is not None  # noqa: S101
        with evaluating(self._trainer.model), keeping_random_state():
            return float(self._metric(self._trainer.model))

    def _add_measurement(self, metric: float) -> None:
        step = self._trainer.step
        recent = self.losses[self.curve[-1].step :] if self.curve else []
        loss = sum(recent) / len(recent) if recent else None
        self.curve.append(Measurement(step, metric, loss, self._trainer.lr))
        if self.best is self.curve[-1]:
            self._best = plain_state(self._trainer.model)
            if self._folder and self._is_first:
                facts = {"step": step, "metric": self.curve[-1].metric}
                save_tuned(self._trainer.model, self._folder / BEST_FILE, facts)
        if self._writer:
            self._writer.add_scalar("metric", self.curve[-1].metric, step)
            for name, amax in describe_ranges(self._trainer.model).items():
                self._writer.add_scalar(f"amax/{name}", amax, step)

    def count_without_gain(self) -> int:
        """How many measurements were taken since the best one."""
        best = self.best
        return 0 if best is None else len(self.curve) - 1 - self.curve.index(best)

    def save_when_due(self) -> None:
        """Write the state of the run, if there is a step that has not been saved for long."""
        if self.losses and time.monotonic() - self._saved > _SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        """Write the state of the run."""
        self._saved = time.monotonic()
        if self._folder is None or not self._is_first:
            return
        if self._writer:
            self._writer.flush()  # what the state has behind it must not be lost with the process
        facts = {
            "format": STATE_FORMAT,
            "settings": self._settings,
            "step": self._trainer.step,
            "epoch": self.epoch,
            "seconds": self.seconds,
            "curve": [vars(measurement) for measurement in self.curve],
        }
        tensors = self._trainer.pack() | {
            f"random//{name}": tensor for name, tensor in self._random.items()
        }
        tensors["losses"] = torch.tensor(self.losses, dtype=torch.float64)
        save_tensors(self._folder / STATE_FILE, tensors, facts)

    def resume(self) -> dict[str, torch.Tensor]:
        """Go on where an earlier run in the folder was; gives its random state, nothing if there was none.

        Raises:
            ArgumentError: The run has other settings.
            DataError: A file of it is damaged, or the best model is gone.
            ModelError: The best model is of another run.
        """
        if self._folder is not None and broadcast_number((self._folder / STATE_FILE).is_file()):
            self._go_on(self._folder)
        if self._folder is not None and self._writes_scalars:
            # what a killed run had written after the state that it goes on from is not shown
            self._writer = _open_tensorboard(
                self._folder, self._trainer.step + 1 if self.losses else 0
            )
        return self._random

    def _go_on(self, folder: Path) -> None:
        path = folder / STATE_FILE
        try:
            tensors, facts = load_tensors(path, STATE_FORMAT, read_together)
        except DataError as error:
            raise DataError(
                error.message, "remove the file to begin anew, or choose another folder."
            ) from error
        if facts["settings"] != self._settings:
            names = self._settings | facts["settings"]
            changed = [
                name for name in names if self._settings.get(name) != facts["settings"].get(name)
            ]
            raise ArgumentError(
                f"{path} is of a run with other settings: {', '.join(changed)}.",
                "choose another folder, or remove it to start anew.",
            )
        if facts["curve"]:
            self._best, _ = load_tensors(folder / BEST_FILE, MODEL_FORMAT, read_together)
            require_same_shapes(plain_state(self._trainer.model), self._best, folder / BEST_FILE)
        self._trainer.unpack(tensors, facts["step"])
        self.losses = tensors["losses"].tolist()
        self.curve = [Measurement(**each) for each in facts["curve"]]
        self.epoch, self.seconds = tuple(facts["epoch"]), facts["seconds"]
        logger.info("%s: going on after step %d", path, facts["step"])
        self._random = {
            key.removeprefix("random//"): t
            for key, t in tensors.items()
            if key.startswith("random//")
        }

    def finish(self) -> int:
        """Write the last state and model, and give the model the best weights; gives their step."""
        self.save()
        if self._folder and self._is_first:
            save_tuned(self._trainer.model, self._folder / LAST_FILE, {"step": self._trainer.step})
        return self.restore_best()

    def abandon(self) -> None:
        """After an error or Ctrl-C in a step: write what the last whole step left, and restore the best weights."""
        try:
            if self.losses and self._trainer.intact and self._trainer.step == len(self.losses):
                self.finish()
        finally:  # the disk may be full
            self.restore_best()

    def restore_best(self) -> int:
        """Give the model the best weights, if the metric was measured; the step whose weights it has then."""
        best = self.best
        if best is None or self._best is None:
            return self._trainer.step
        self._trainer.finish()  # ranges are buffers again, as in the state that was kept
        self._trainer.model.load_state_dict(self._best)
        return best.step

    def close(self) -> None:
        """Close what writes scalars."""
        if self._writer:
            self._writer.close()


def _require_tensorboard(folder: Path | None) -> None:
    """Refuse before the work what could not be written.

    Raises:
        ArgumentError: There is no folder.
        DependencyError: tensorboard is not installed.
    """
    if folder is None:
        raise ArgumentError("tensorboard needs a folder.", "pass folder=...")
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise DependencyError(
            "tensorboard is not installed.", "pip install 'qdq[tensorboard]'"
        ) from error


def _open_tensorboard(folder: Path, step: int) -> Any:
    """What writes scalars; those of this step and later ones that are there already no longer count."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / SCALARS_FOLDER), purge_step=step)

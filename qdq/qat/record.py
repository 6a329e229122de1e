"""The record of a run of fine-tuning: losses, the curve of the metric, the best model, and the files to resume from."""

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

from qdq.device import without_tf32
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
    select_prefix,
)
from qdq.qat.ranges import describe_ranges
from qdq.qat.trainer import Trainer

logger = logging.getLogger(__name__)

STATE_FILE = "state.safetensors"
BEST_FILE = "best.safetensors"
LAST_FILE = "last.safetensors"
SCALARS_FOLDER = "tensorboard"
_RANDOM_PREFIX = "random//"  # of the random state among the tensors of the state file
_SAVE_SECONDS = 30.0  # the most time that a killed run loses


@dataclass(frozen=True)
class Measurement:
    """The metric at one moment.

    Args:
        step: Number of steps before it; 0 is before the first.
        metric: Higher is better.
        loss: Mean loss of the steps since the previous measurement; None at step 0.
        lr: Learning rate of the last step; 0 at step 0.
    """

    step: int
    metric: float
    loss: float | None
    lr: float


class Record:
    """Losses and measurements of a run, in memory and in its folder.

    With several processes, only the first reads and writes files, and its metric counts.

    Args:
        trainer: The trainer of the model.
        metric: `model -> number`, higher is better; None: nothing is measured.
        measure_every: Steps between two measurements.
        folder: The folder for the files; None: no files.
        settings: Everything that the run depends on; the folder of a run with other settings is refused.
        tensorboard: Also write scalars.

    Attributes:
        losses: Loss of each step.
        curve: The measurements.
        epoch: The epoch, and the number of its batches that were taken.
        seconds: Time of all steps, without measurements.
        settings: The parameter of the same name.

    Raises:
        ArgumentError: The folder cannot be written to; tensorboard without a folder.
        DependencyError: tensorboard is not installed.
    """

    def __init__(
        self,
        trainer: Trainer,
        metric: Callable[[nn.Module], float] | None,
        measure_every: int,
        folder: Path | None,
        settings: dict[str, Any],
        tensorboard: bool,
    ) -> None:
        self.settings = settings
        self.losses: list[float] = []
        self.curve: list[Measurement] = []
        self.epoch = (0, 0)
        self.seconds = 0.0
        self._trainer = trainer
        self._metric = metric
        self._measure_every = measure_every
        self._folder = folder
        self._is_first = find_rank()[0] == 0
        self._saved_at = time.monotonic()
        self._best_state: dict[str, torch.Tensor] | None = None
        self._random_state: dict[str, torch.Tensor] = {}
        self._writes_scalars = tensorboard and self._is_first
        self._writer: Any = None
        if tensorboard:
            _require_tensorboard(folder)
        if folder is not None and self._is_first:
            outputs = [folder / STATE_FILE, folder / BEST_FILE, folder / LAST_FILE]
            if tensorboard:
                outputs.append(folder / SCALARS_FOLDER / "events")
            guard_files(outputs=outputs)

    @property
    def best(self) -> Measurement | None:
        """The measurement with the best metric, the earliest of equal ones; None without measurements."""
        best = None
        for measurement in self.curve:
            if math.isnan(measurement.metric):
                continue
            if best is None or measurement.metric > best.metric:
                best = measurement
        return best

    @property
    def is_at_start(self) -> bool:
        """Whether the best weights, or without measurements the present ones, are those of before the first step."""
        best = self.best
        if best is not None:
            return best.step == 0
        return self._trainer.step == 0 and self._trainer.intact

    def add_step(self, loss: float, epoch: tuple[int, int], seconds: float) -> None:
        """Record a finished step.

        Args:
            loss: Its loss.
            epoch: Its epoch, and the number of batches of that epoch so far, including this one.
            seconds: Its time.

        Raises:
            StateError: The metric could not be measured in another process.
        """
        self.losses.append(loss)
        self.epoch = epoch
        self.seconds += seconds
        self._random_state = pack_random(self._trainer.device)  # before the next batch draws more
        step = self._trainer.step
        if self._writer:
            self._writer.add_scalar("loss", loss, step)
            self._writer.add_scalar("lr", self._trainer.lr, step)
        if step % self._measure_every == 0 or step == self._trainer.total:
            try:
                self.measure()
            except BaseException:  # Ctrl-C too
                self.restore_best()
                raise

    def measure(self) -> None:
        """Measure the metric of the current model, and keep its state if it is the best so far.

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
        model = self._trainer.model
        with evaluating(model), without_tf32(), keeping_random_state(device=self._trainer.device):
            return float(self._metric(model))

    def _add_measurement(self, metric: float) -> None:
        step = self._trainer.step
        measurement = Measurement(step, metric, self._mean_recent_loss(), self._trainer.lr)
        self.curve.append(measurement)
        if self.best is measurement:
            self._keep_best(measurement)
        if self._writer:
            self._writer.add_scalar("metric", metric, step)
            for name, amax in describe_ranges(self._trainer.model).items():
                self._writer.add_scalar(f"amax/{name}", amax, step)

    def _mean_recent_loss(self) -> float | None:
        """Mean loss since the last measurement; None without a measurement or a step since then."""
        if not self.curve:
            return None
        recent = self.losses[self.curve[-1].step :]
        if not recent:
            return None
        return sum(recent) / len(recent)

    def _keep_best(self, measurement: Measurement) -> None:
        self._best_state = plain_state(self._trainer.model)
        if self._folder and self._is_first:
            facts = {"step": measurement.step, "metric": measurement.metric}
            save_tuned(self._trainer.model, self._folder / BEST_FILE, facts)

    def count_without_gain(self) -> int:
        """Number of measurements since the best one."""
        best = self.best
        if best is None:
            return 0
        return len(self.curve) - 1 - self.curve.index(best)

    def save_when_due(self) -> None:
        """Write the state of the run if the last save was long ago."""
        if self.losses and time.monotonic() - self._saved_at > _SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        """Write the state of the run."""
        self._saved_at = time.monotonic()
        if self._folder is None or not self._is_first:
            return
        if self._writer:
            self._writer.flush()  # scalars of saved steps must not be lost with the process
        facts = {
            "format": STATE_FORMAT,
            "settings": self.settings,
            "step": self._trainer.step,
            "epoch": self.epoch,
            "seconds": self.seconds,
            "curve": [vars(measurement) for measurement in self.curve],
        }
        tensors = self._trainer.pack()
        for name, tensor in self._random_state.items():
            tensors[f"{_RANDOM_PREFIX}{name}"] = tensor
        tensors["losses"] = torch.tensor(self.losses, dtype=torch.float64)
        save_tensors(self._folder / STATE_FILE, tensors, facts)

    def resume(self) -> dict[str, torch.Tensor]:
        """Continue from the state that an earlier run left in the folder, if there is one.

        Returns:
            The random state of that run; empty if there was none.

        Raises:
            ArgumentError: The run has other settings.
            DataError: A file is damaged, or the best model is missing.
            ModelError: The best model is of another run.
        """
        if self._folder is None:
            return self._random_state
        if broadcast_number((self._folder / STATE_FILE).is_file()):
            self._load_state(self._folder)
        if self._writes_scalars:
            # Scalars that a killed run wrote after its last saved state are not shown.
            first_step = self._trainer.step + 1 if self.losses else 0
            self._writer = _open_tensorboard(self._folder, first_step)
        return self._random_state

    def _load_state(self, folder: Path) -> None:
        path = folder / STATE_FILE
        try:
            tensors, facts = load_tensors(path, STATE_FORMAT, read_together)
        except DataError as error:
            raise DataError(
                error.message, "remove the file to start again, or choose another folder."
            ) from error
        self._require_same_settings(facts["settings"], path)
        if facts["curve"]:
            best_path = folder / BEST_FILE
            self._best_state, _ = load_tensors(best_path, MODEL_FORMAT, read_together)
            require_same_shapes(plain_state(self._trainer.model), self._best_state, best_path)
        self._trainer.unpack(tensors, facts["step"])
        self.losses = tensors["losses"].tolist()
        self.curve = [Measurement(**fields) for fields in facts["curve"]]
        self.epoch = tuple(facts["epoch"])
        self.seconds = facts["seconds"]
        self._random_state = select_prefix(tensors, _RANDOM_PREFIX)
        logger.info("%s: resuming after step %d", path, facts["step"])

    def _require_same_settings(self, settings: dict[str, Any], path: Path) -> None:
        names = self.settings | settings
        changed = [name for name in names if self.settings.get(name) != settings.get(name)]
        if changed:
            raise ArgumentError(
                f"{path} is of a run with other settings: {', '.join(changed)}.",
                "choose another folder, or remove it to start again.",
            )

    def finish(self) -> int:
        """Write the last state and model, and give the model the best weights; returns their step."""
        self.save()
        if self._folder and self._is_first:
            save_tuned(self._trainer.model, self._folder / LAST_FILE, {"step": self._trainer.step})
        return self.restore_best()

    def abandon(self) -> None:
        """After an error or Ctrl-C, write the state after the last complete step and restore the best weights."""
        is_whole_step = self._trainer.intact and self._trainer.step == len(self.losses)
        try:
            if self.losses and is_whole_step:
                self.finish()
        finally:  # the disk may be full
            self.restore_best()

    def restore_best(self) -> int:
        """Give the model the best weights, if the metric was measured; returns the step of its weights."""
        best = self.best
        if best is None or self._best_state is None:
            return self._trainer.step
        self._trainer.finish()  # ranges are buffers again, as in the best state
        self._trainer.model.load_state_dict(self._best_state)
        return best.step

    def close(self) -> None:
        """Close the writer of scalars."""
        if self._writer:
            self._writer.close()


def _require_tensorboard(folder: Path | None) -> None:
    """Refuse scalars that could not be written, before the work starts.

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
    """A writer of scalars; scalars of earlier runs from `step` on are discarded."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / SCALARS_FOLDER), purge_step=step)

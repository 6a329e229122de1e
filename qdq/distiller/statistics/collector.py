"""`StatisticsCollector`: both passes of the statistics of a model, while other code runs the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from contextlib import AbstractContextManager, contextmanager
from typing import Generic, TypeVar

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from qdq.device import copy_to_host
from qdq.distiller.settings.names import find_layers
from qdq.distiller.statistics.records import LayerStatistics, ModelStatistics, TensorRecord
from qdq.distiller.statistics.tallies import DeviationTally, RangeTally, Tally
from qdq.distiller.statistics.watch_layers import Slot, watching_layers
from qdq.errors import CalibrationError, StateError, UnsupportedError
from qdq.forward import unwrap_compiled

_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)
_Tally = TypeVar("_Tally", bound=Tally)


class StatisticsCollector:
    """Collects statistics while other code runs the model: in `first_pass`, then in `second_pass`.

    On a GPU nothing waits for the device before the end of a pass.

    Args:
        model: The float model.

    Raises:
        UnsupportedError: The model is data-parallel.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = unwrap_compiled(model)
        require_whole(self._model)
        self._layers = find_layers(self._model)
        self._ranges: dict[Slot, TensorRecord] = {}
        self._records: dict[Slot, TensorRecord] = {}

    @contextmanager
    def first_pass(self) -> Iterator[None]:
        """Collect ranges and means in calls of the model in the block.

        Raises:
            CalibrationError: No layer ran, NaN or Inf.
        """
        reading = _Pass(lambda _: RangeTally())
        with self._watching(reading):
            yield
        self._ranges = reading.finish()
        self._records = {}

    @contextmanager
    def second_pass(self) -> Iterator[None]:
        """Collect deviations in calls of the model in the block, on the same data.

        Raises:
            StateError: There was no first pass.
            CalibrationError: NaN or Inf, or other data than in the first pass.
        """
        if not self._ranges:
            raise StateError(
                "the second pass of the statistics needs the means of the first.",
                "run the data in first_pass() before.",
            )
        reading = _Pass(self._make_deviations)
        with self._watching(reading):
            yield
        self._records = reading.finish()

    def _watching(self, reading: _Pass[_Tally]) -> AbstractContextManager[None]:
        return watching_layers(self._model, self._layers, reading.begin, reading.observe)

    def _make_deviations(self, slot: Slot) -> DeviationTally:
        if slot not in self._ranges:
            raise CalibrationError(
                f"the {slot.label} has values in pass 2; it had none in pass 1.",
                "run the same data in both passes.",
            )
        return DeviationTally(self._ranges[slot])

    def statistics(self) -> ModelStatistics:
        """The statistics of the layers that ran, in the order of the model.

        Raises:
            StateError: A pass is missing.
        """
        if not self._records:
            raise StateError(
                "the statistics have not had their second pass.",
                "run the data in first_pass(), then in second_pass().",
            )
        inputs: dict[str, dict[int, TensorRecord]] = {}
        for (layer, position), record in self._records.items():
            if position is not None:
                inputs.setdefault(layer, {})[position] = record
        statistics = {}
        for name in self._layers:
            output = self._records.get(Slot(name, None))
            if output is not None:
                layer_inputs = dict(sorted(inputs.get(name, {}).items()))
                statistics[name] = LayerStatistics(layer_inputs, output)
        return statistics


class _Pass(Generic[_Tally]):
    """The tallies of one pass. A tensor that leaves one layer and enters others is read once.

    Args:
        make_tally: Makes the tally of a slot.
    """

    def __init__(self, make_tally: Callable[[Slot], _Tally]) -> None:
        self._make_tally = make_tally
        self._tallies: dict[Slot, _Tally] = {}
        # Tensor -> what its row depends on, and the row.
        self._rows: MutableMapping[torch.Tensor, tuple[object, torch.Tensor]] = (
            WeakIdKeyDictionary()
        )

    def begin(self) -> None:
        """Read all tensors again: a caller may reuse the memory of an input, which the tensor does not show."""
        self._rows.clear()

    def observe(self, slot: Slot, values: torch.Tensor) -> None:
        """Add a tensor to the tally of its slot."""
        if slot not in self._tallies:
            self._tallies[slot] = self._make_tally(slot)
        tally = self._tallies[slot]
        with torch.inference_mode(False), torch.no_grad():
            tally.add(values, self._measure(tally, values))

    def _measure(self, tally: _Tally, values: torch.Tensor) -> torch.Tensor:
        if values.is_inference():  # it has no version, so a change would not be noticed
            return tally.measure(values)
        state = values._version, tally.center
        if values in self._rows:
            former, row = self._rows[values]
            if former == state:
                return row
        row = tally.measure(values)
        self._rows[values] = state, row
        return row

    def finish(self) -> dict[Slot, TensorRecord]:
        """The records; each device is waited for once.

        Raises:
            CalibrationError: No layer ran, NaN or Inf, or other data than in the first pass.
        """
        if not self._tallies:
            raise CalibrationError(
                "no layer of the model ran, so there are no statistics.",
                "run at least one batch through the model.",
            )
        on_host = copy_to_host([tally.rows() for tally in self._tallies.values()])
        records = {}
        for (slot, tally), rows in zip(self._tallies.items(), on_host, strict=True):
            records[slot] = tally.finish(rows.numpy(), f"the {slot.label}")
        return records


def require_whole(model: nn.Module) -> None:
    """Refuse a data-parallel model, whose replicas would each see a part of the data.

    Args:
        model: Any module.

    Raises:
        UnsupportedError: It is one, or has one inside.
    """
    for module in model.modules():
        if isinstance(module, _WRAPPERS):
            raise UnsupportedError(
                f"the model is data-parallel ({type(module).__name__}): each replica sees a part of the data.",
                "pass the wrapped model, model.module.",
            )

"""One pass over data in float: `Collection`, a with-block, and `collect_statistics`, which a killed run can resume."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from tqdm import tqdm

from qdq.distributed import failing_together, find_rank, gather_bytes
from qdq.errors import ArgumentError, CalibrationError, DataError
from qdq.files import guard_files
from qdq.formats import Format
from qdq.forward import (
    call_model,
    evaluating,
    require_batches,
    require_model,
    split_inputs,
    tensors_of,
)
from qdq.nn import QuantMixin
from qdq.observers.collector import TensorCollector, TensorReader
from qdq.quantizer import SharedQuantizer, TensorQuantizer, named_quantizers
from qdq.statistics import _FORMAT as STATISTICS_FORMAT
from qdq.statistics import Statistics, merge_parts, require_place_of_summary, require_suffix
from qdq.swap import quantized_layers

logger = logging.getLogger(__name__)

_SAVE_SECONDS = 5.0


class Collection:
    """Collects statistics while the block runs.

    Inside the block the model is in evaluation mode, without gradients, and computes in float; every enabled quantizer
    that is not of a weight collects. Afterwards all states are as before.

    Args:
        model: A swapped model.

    Attributes:
        collecting: Name -> quantizer that collects: inputs of layers, and quantizers that stand in a forward by hand.
        weights: Name of an enabled weight quantizer -> name of its layer, the layer, the parameter.
        leaders: Name of a quantizer that collects -> name of the one that has its range: itself, or whose it shares.

    Raises:
        ArgumentError: No enabled quantizer, or one with several axes.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        weights = {
            id(getattr(layer, attribute)): (name, layer, parameter)
            for name, layer in quantized_layers(model).items()
            if isinstance(layer, QuantMixin)
            for attribute, parameter in layer.weights_of(layer).items()
        }
        enabled = {
            name: quantizer for name, quantizer in named_quantizers(model) if quantizer.is_enabled
        }
        if not enabled:
            raise ArgumentError(
                "the model has no enabled quantizer.",
                "call swap_modules first, and rewire_operations for products that are function calls (or "
                "enable_quantization).",
            )
        self.weights = {name: weights[id(q)] for name, q in enabled.items() if id(q) in weights}
        self.collecting = {
            name: quantizer for name, quantizer in enabled.items() if name not in self.weights
        }
        names = {id(quantizer): name for name, quantizer in named_quantizers(model)}
        self.leaders = {name: names[id(q.leader)] for name, q in self.collecting.items()}
        self._reader = TensorReader()
        self._collectors = self._make_collectors()

    def _make_collectors(self) -> dict[str, TensorCollector]:
        """One for each range, by the name of the quantizer that has it."""
        of_convolutions = {
            id(quantizer): -len(layer.kernel_size) - 1
            for layer in quantized_layers(self._model).values()
            if isinstance(layer, _ConvNd)
            for quantizer in layer.quantizers().values()
        }
        collectors = {}
        for name, quantizer in self.collecting.items():
            leader = quantizer.leader
            axis = leader.axis
            if axis is not None and not isinstance(axis, int):
                raise ArgumentError(
                    f"{name} has the axes {axis}; calibration knows ranges per tensor and along one axis.",
                    "collect by hand with its own calibrator (enable_calib, load_calib_amax).",
                )
            channels = of_convolutions.get(id(leader)) if axis is None else axis
            collectors[self.leaders[name]] = TensorCollector(channels, self._reader)
        return collectors

    def __enter__(self) -> Collection:
        with ExitStack() as exits:
            exits.enter_context(evaluating(self._model))
            for _, quantizer in named_quantizers(self._model):
                exits.enter_context(quantizer.restoring_state())
                quantizer.disable_quant()
                quantizer.disable_calib()
            for name, quantizer in self.collecting.items():
                collector = self._collectors[self.leaders[name]]
                exits.enter_context(quantizer.collecting_into(collector))
            self._exits = exits.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._exits.close()

    def begin_batch(self, number: int) -> None:
        """Say that what comes belongs to the batch with this number."""
        self._reader.forget()
        for collector in self._collectors.values():
            collector.batch = number

    def statistics(self) -> Statistics:
        """What has been collected so far.

        Raises:
            CalibrationError: NaN or Inf in a batch on a GPU, with the quantizer and the batch.
        """
        quantizers = dict(named_quantizers(self._model))
        tensors = {}
        for name, collector in self._collectors.items():
            try:
                tensors[name] = collector.statistics()
            except CalibrationError as error:
                raise CalibrationError(
                    f"the input of quantizer {name}: {error.message}", error.fix
                ) from None
        batches = max(
            (int(tensor.numbers[-1]) + 1 for tensor in tensors.values() if tensor.num_batches),
            default=0,
        )
        formats = {name: format_of(quantizers[name]) for name in tensors}
        shared = {name: leader for name, leader in self.leaders.items() if name != leader}
        return Statistics(tensors, formats, batches, fingerprint_model(self._model), shared=shared)


def collect_statistics(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    num_batches: int | None = None,
    statistics: Path | str | None = None,
) -> Statistics:
    """Run batches through a model in float and collect what every method of calibration needs.

    With a file, what was collected is saved every few seconds; after a kill, the same call goes on with the batch it
    had reached, and once the file is complete it is only read. Under `torch.distributed` every process collects its
    own batches (see `shard_batches`), and all return the same: batch i of process r of n has the number i n + r.

    Args:
        model: A swapped model, on its device.
        batches: What the model is called with (see `trace.call_model`): tensors `[B, ...]`, `(inputs, labels)` or
            dictionaries; iterated once, of whatever length. To be resumed they must come in the same order again.
        num_batches: Take no more than so many (in each process); None: all.
        statistics: The file, ending in `.safetensors`. Process r of several has one of its own until all are done.

    Raises:
        ArgumentError: Nothing to calibrate; a file of another model, of other data or of more batches.
        ArgumentTypeError: `batches` is one tensor or dictionary.
        CalibrationError: NaN or Inf in the data, with the quantizer and the batch; another process failed.
        DataError: The file is of another kind. A damaged one is renamed, and a warning says so.
    """
    return collect_and_hold_out(model, batches, num_batches, statistics, hold_out=False)[0]


def collect_and_hold_out(
    model: nn.Module,
    batches: Iterable[Any],
    num_batches: int | None,
    path: Path | str | None,
    *,
    hold_out: bool,
) -> tuple[Statistics, list[Any]]:
    """As `collect_statistics`; with `hold_out` the last batch is not collected but returned, unless it is the only one.

    Returns:
        The statistics, and the batches that were held out, at most one.
    """
    with failing_together():
        require_model(model)
        require_batches(batches)
        if num_batches is not None and (not isinstance(num_batches, int) or num_batches < 1):
            raise ArgumentError(
                f"num_batches is {num_batches!r}.", "give 1 or more, or leave it out to take all."
            )
        collection = Collection(model)
        file = _File(path, fingerprint_model(model), num_batches)
    finished = file.load_finished()
    stream = _Stream(islice(batches, num_batches), hold_out)
    with failing_together():
        found = finished or _collect(model, collection, stream, file)
        if finished:
            file.require_same_sources(model, finished, stream)
    if not finished:
        found = replace(
            merge_parts(map(Statistics.from_bytes, gather_bytes(found.to_bytes()))), complete=True
        )
        if found.batches:  # a pass without any is none: the next one begins anew
            file.finish(found)
    with failing_together():
        return found, stream.read_held()


def _collect(model: nn.Module, collection: Collection, stream: _Stream, file: _File) -> Statistics:
    """The share of this process."""
    before = file.load_begun()
    rank, size = find_rank()
    done = before.batches if before else 0
    result = before or collection.statistics()
    data, seen = "", 0
    with collection:
        for local, batch in enumerate(tqdm(stream, desc="calibrate", unit="batch", disable=None)):
            if local == 0:
                data = digest_sources(model, batch)
                file.require_sources(before, data)
            seen = local + 1
            if seen <= done:
                continue
            number = local * size + rank
            collection.begin_batch(number)
            try:
                call_model(model, batch)
            except CalibrationError as error:
                raise CalibrationError(f"batch {number}: {error.message}", error.fix) from None
            done = seen
            if file.is_due():
                file.save(_joined(before, collection.statistics(), done, data, complete=False))
        if seen < done:
            raise ArgumentError(
                f"an earlier run of this pass had taken {done} batches, now there are {seen}.",
                "give the same batches in the same order, or remove the file.",
            )
        result = _joined(before, collection.statistics(), done, data, complete=True)
    return replace(result, limit=file.limit)


def _joined(
    before: Statistics | None, now: Statistics, batches: int, data: str, *, complete: bool
) -> Statistics:
    """What an earlier, killed run had collected with what this one has."""
    whole = merge_parts([before, now]) if before else now
    return replace(whole, batches=batches, data=data or whole.data, complete=complete)


class _Stream:
    """The batches of one pass, all but the last if that is held out; one alone is taken and held out."""

    def __init__(self, batches: Iterable[Any], hold_out: bool) -> None:
        self._batches = iter(batches)
        self._hold_out = hold_out
        self._held: list[Any] = []
        self._read = 0

    def __iter__(self) -> Iterator[Any]:
        for batch in self._batches:
            self._read += 1
            if self._hold_out:
                before, self._held = self._held, [batch]
                yield from before
            else:
                yield batch
        if self._read == 1:
            yield from self._held

    def read_held(self) -> list[Any]:
        """The batch that is held out, after reading what is left; none if nothing is held out or there is no batch."""
        for _ in self if self._hold_out else ():
            pass
        return self._held


class _File:
    """The file of a pass, and in several processes the one in which this process saves its share.

    Args:
        path: The file; None: nothing is saved.
        model: Fingerprint of the model.
        limit: How many batches are to be taken at most.
    """

    def __init__(self, path: Path | str | None, model: str, limit: int | None) -> None:
        self._path = None if path is None else require_suffix(path)
        self._model = model
        self.limit = limit
        self._saved = time.monotonic()
        self._rank, self._size = find_rank()
        self._own = self._path
        if self._path and self._size > 1:
            self._own = self._path.with_suffix(
                f".rank{self._rank}of{self._size}{self._path.suffix}"
            )
        if self._own:
            guard_files(outputs=[self._own, self._own.with_suffix(".json")])
            require_place_of_summary(self._own)

    def load_finished(self) -> Statistics | None:
        """What the file holds if no batch is missing; the first process reads it for all.

        Raises:
            ArgumentError: It is of another model, holds more batches, or one process has begun what several go on with.
            DataError: It is of another kind.
        """
        content = b""
        with failing_together():
            if self._path and self._rank == 0 and self._path.is_file():
                statistics = _load_or_set_aside(self._path)
                content = b"" if statistics is None else statistics.to_bytes()
        content = gather_bytes(content)[0]
        if not content:
            return None
        found = self._require_same_model(Statistics.from_bytes(content))
        if self.limit is not None and found.batches > self.limit and self._size == 1:
            raise ArgumentError(
                f"{self._path} holds {found.batches} batches, {self.limit} are asked for.",
                "ask for as many or more, or choose another file.",
            )
        if found.complete and found.limit in (None, self.limit):
            return found
        if self._size > 1:
            raise ArgumentError(
                f"{self._path} holds a pass of one process that is not complete.",
                "finish it with one process, or remove it.",
            )
        return None

    def load_begun(self) -> Statistics | None:
        """What an earlier run of this process had saved.

        Raises:
            ArgumentError: It is of another model.
            DataError: It is of another kind.
        """
        statistics = _load_or_set_aside(self._own) if self._own and self._own.is_file() else None
        if statistics is None:
            return None
        begun = self._require_same_model(statistics)
        logger.info("%s holds %d batches; going on with the next", self._own, begun.batches)
        return begun

    def _require_same_model(self, found: Statistics) -> Statistics:
        if found.model != self._model:
            raise ArgumentError(
                f"{self._path} was collected with another model: names, formats or shapes differ.",
                "swap and rewire the model as in that run, or choose another file.",
            )
        return found

    def require_sources(self, begun: Statistics | None, digest: str) -> None:
        """Refuse weights or a first batch that are not those of the earlier run.

        Raises:
            ArgumentError: They differ.
        """
        if begun and begun.data and begun.data != digest:
            raise ArgumentError(
                f"{self._path} was collected from other weights or other data: their digest differs.",
                "give the same weights and the same batches in the same order (no shuffling without a seed), or "
                "remove the file, or choose another one.",
            )

    def require_same_sources(self, model: nn.Module, finished: Statistics, stream: _Stream) -> None:
        """As `require_sources`, where nothing is left to collect; no batch at all is fine.

        Raises:
            ArgumentError: The weights or the first batch differ.
        """
        first = next(iter(stream), None) if self._rank == 0 else None
        if first is not None:
            self.require_sources(finished, digest_sources(model, first))

    def is_due(self) -> bool:
        """Whether it is time to save again."""
        return self._own is not None and time.monotonic() - self._saved >= _SAVE_SECONDS

    def save(self, share: Statistics) -> None:
        """Save the share of this process."""
        assert self._own is not None  # noqa: S101
        share.save(self._own)
        self._saved = time.monotonic()

    def finish(self, whole: Statistics) -> None:
        """Save the whole, once, and remove the shares."""
        with failing_together():
            if self._path and self._rank == 0:
                whole.save(self._path)
        if self._own and self._own != self._path:
            self._own.unlink(missing_ok=True)


def _load_or_set_aside(path: Path) -> Statistics | None:
    """What a file of statistics holds; a damaged one is renamed, and the pass begins anew.

    Raises:
        DataError: The file is of another kind.
    """
    try:
        return Statistics.load(path)
    except DataError as error:
        if _is_of_another_kind(path):
            raise
        aside = path.with_name(f"{path.stem}.damaged{path.suffix}")
        os.replace(path, aside)
        logger.warning(
            "%s It is now %s, and everything is collected again.", error.message, aside.name
        )
        return None


def _is_of_another_kind(path: Path) -> bool:
    """Whether a file is whole and not of statistics: it is somebody else's, and must not be touched."""
    try:
        with safetensors.safe_open(path, "numpy") as file:
            return STATISTICS_FORMAT not in (file.metadata() or {})
    except (OSError, safetensors.SafetensorError):
        return False


def fingerprint_model(model: nn.Module) -> str:
    """Digest of what statistics depend on: names, formats and axes of quantizers, names and shapes of parameters."""
    lines = [
        f"{name} {q._num_bits} {q._unsigned} {q._narrow_range} {q._axis}"
        for name, q in _owners(model)
    ]
    lines += [f"{name} {list(parameter.shape)}" for name, parameter in model.named_parameters()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _owners(model: nn.Module) -> Iterator[tuple[str, TensorQuantizer]]:
    """The quantizers that have a range of their own."""
    return ((name, q) for name, q in named_quantizers(model) if not isinstance(q, SharedQuantizer))


def digest_sources(model: nn.Module, batch: Any) -> str:
    """Digest of parameters, buffers and the tensors that the model is called with: what every statistic comes from."""
    layers = [module for module in model.modules() if not isinstance(module, TensorQuantizer)]
    states = (
        tensor
        for layer in layers
        for of in (layer.parameters, layer.buffers)
        for tensor in of(recurse=False)
    )
    return digest_tensors(
        tensor for tensor in (*states, *tensors_of(split_inputs(batch))) if not tensor.is_meta
    )


def digest_tensors(tensors: Iterable[torch.Tensor]) -> str:
    """Digest of types, shapes and values."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {list(tensor.shape)} ".encode())
        digest.update(bytes_of(tensor))
    return digest.hexdigest()


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The values of a tensor in the order of their indices, for a digest; says nothing of its shape or type."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def format_of(quantizer: TensorQuantizer) -> Format | None:
    """The format, None if it is no integer format."""
    try:
        return quantizer.format
    except AttributeError:
        return None

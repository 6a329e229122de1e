"""One pass over data in float: `Collection`, a with-block, and `collect_statistics`, which continues a killed run."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from tqdm import tqdm

from qdq.batch import require_batches, split_inputs, tensors_of
from qdq.calibrate.pass_file import PassFile
from qdq.device import copy_to_host, without_tf32
from qdq.distributed import failing_together, find_rank, gather_bytes
from qdq.errors import ArgumentError, CalibrationError
from qdq.formats import Format
from qdq.forward import call_model, evaluating, require_model
from qdq.nn import QuantInputMixin, QuantMixin
from qdq.observers.collector import TensorCollector, TensorReader
from qdq.quantizer import SharedQuantizer, TensorQuantizer, named_quantizers
from qdq.statistics import Statistics, merge_parts

_COPIED_BYTES = 1 << 26  # copied from a device to the host at once


class WeightSite(NamedTuple):
    """The parameter that a weight quantizer quantizes.

    Args:
        layer_name: Dotted name of the layer; "" for the model itself.
        layer: The layer.
        parameter: Name of the parameter in the layer.
    """

    layer_name: str
    layer: nn.Module
    parameter: str

    @property
    def label(self) -> str:
        """The name for messages."""
        return f"{self.layer_name or 'the model'}.{self.parameter}"

    @property
    def weight(self) -> nn.Parameter:
        """The parameter itself, also while the layer computes with a quantized copy of it."""
        weight = self.layer._parameters[self.parameter]
        assert weight is not None  # noqa: S101  # layers without a weight are not swapped
        return weight


class Collection:
    """Finds the quantizers and layers of a model, and collects statistics while the block runs.

    The model is searched once, when the collection is made. Inside the block the model is in evaluation mode, without
    gradients, and computes in float; every enabled quantizer collects, except those of weights. Afterwards all states
    are restored.

    Args:
        model: A swapped model.
        may_be_empty: Accept a model without an enabled quantizer.

    Attributes:
        model: The model.
        quantizers: Name -> quantizer, for all quantizers.
        names: The inverse of `quantizers`.
        layers: Name -> swapped layer.
        weights: Name of an enabled weight quantizer -> its weight.
        collecting: Name -> quantizer that collects: inputs of layers, and quantizers that a forward calls directly.
        leaders: Name of a quantizer that collects -> name of the quantizer that holds its range: itself, or its leader.

    Raises:
        ArgumentError: No enabled quantizer, or one with several axes.
    """

    def __init__(self, model: nn.Module, *, may_be_empty: bool = False) -> None:
        self.model = model
        self.quantizers: dict[str, TensorQuantizer] = {}
        self.layers: dict[str, QuantInputMixin] = {}
        for name, module in model.named_modules():
            if isinstance(module, TensorQuantizer):
                self.quantizers[name] = module
            elif isinstance(module, QuantInputMixin):
                self.layers[name] = module
        self.names = {quantizer: name for name, quantizer in self.quantizers.items()}

        sites = _find_weights(self.layers)
        self.weights: dict[str, WeightSite] = {}
        self.collecting: dict[str, TensorQuantizer] = {}
        self.leaders: dict[str, str] = {}
        for name, quantizer in self.quantizers.items():
            if not quantizer.is_enabled or quantizer.is_fixed:
                continue
            if quantizer in sites:
                self.weights[name] = sites[quantizer]
            else:
                self.collecting[name] = quantizer
                self.leaders[name] = self.names[quantizer.leader]
        if not self.weights and not self.collecting and not may_be_empty:
            raise ArgumentError(
                "the model has no enabled quantizer.",
                "call swap_modules first, and rewire_operations for products that are function calls (or "
                "enable_quantization).",
            )
        self._reader = TensorReader()
        self._collectors = self._make_collectors()

    def _make_collectors(self) -> dict[str, TensorCollector]:
        """One collector for each range, by the name of the quantizer that holds the range."""
        axis_of_convolution: dict[TensorQuantizer, int] = {}
        for layer in self.layers.values():
            if isinstance(layer, _ConvNd):
                channel_axis = -len(layer.kernel_size) - 1
                axis_of_convolution |= dict.fromkeys(layer.quantizers().values(), channel_axis)

        collectors = {}
        for name, leader_name in self.leaders.items():
            leader = self.quantizers[leader_name]
            axis = leader.axis
            if axis is not None and not isinstance(axis, int):
                raise ArgumentError(
                    f"{name} has the axes {axis}; calibration supports ranges per tensor and along one axis.",
                    "collect by hand with its own calibrator (enable_calib, load_calib_amax).",
                )
            channels = axis_of_convolution.get(leader) if axis is None else axis
            collectors[leader_name] = TensorCollector(channels, self._reader)
        return collectors

    def __enter__(self) -> Collection:
        with ExitStack() as exits:
            exits.enter_context(evaluating(self.model))
            for quantizer in self.quantizers.values():
                exits.enter_context(quantizer.pausing())
            for name, quantizer in self.collecting.items():
                collector = self._collectors[self.leaders[name]]
                exits.enter_context(quantizer.collecting_into(collector))
            self._exits = exits.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._exits.close()

    def begin_batch(self, number: int) -> None:
        """Announce that the next calls belong to the batch with this number."""
        self._reader.forget()
        for collector in self._collectors.values():
            collector.batch = number

    def statistics(self) -> Statistics:
        """The statistics collected so far; each device is waited for once.

        Raises:
            CalibrationError: NaN or Inf in a batch on a GPU, with the quantizer and the batch.
        """
        on_devices = []
        for collector in self._collectors.values():
            on_devices += collector.tensors()
        on_host = iter(copy_to_host(on_devices))
        tensors = {}
        num_batches = 0
        for name, collector in self._collectors.items():
            try:
                tensors[name] = collector.finish(on_host)
            except CalibrationError as error:
                raise CalibrationError(
                    f"the input of quantizer {name}: {error.message}", error.fix
                ) from None
            num_batches = max(num_batches, tensors[name].end_number)
        return Statistics(
            tensors=tensors,
            formats={name: format_of(self.quantizers[name]) for name in tensors},
            batches=num_batches,
            model=self.fingerprint,
            shared={name: leader for name, leader in self.leaders.items() if name != leader},
        )

    @cached_property
    def fingerprint(self) -> str:
        """As `fingerprint_model`."""
        return _fingerprint(self.quantizers, self.model)


def _find_weights(layers: dict[str, QuantInputMixin]) -> dict[TensorQuantizer, WeightSite]:
    """The weights of all layers by their quantizers."""
    sites = {}
    for name, layer in layers.items():
        if isinstance(layer, QuantMixin):
            for attribute, parameter in layer.weights_of(layer).items():
                sites[getattr(layer, attribute)] = WeightSite(name, layer, parameter)
    return sites


# -- the pass --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Collected:
    """The result of one pass over the data.

    Args:
        collection: The quantizers and layers of the model.
        statistics: Statistics of all batches, of all processes.
        held_out: The held-out batches of this process, at most one.
    """

    collection: Collection
    statistics: Statistics
    held_out: list[Any]


def collect_statistics(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    num_batches: int | None = None,
    statistics: Path | str | None = None,
) -> Statistics:
    """Run batches through a model in float and collect everything that any calibration method needs.

    With a file, the statistics are saved every few seconds. After a kill, the same call continues with the next batch;
    once the file is complete, it is only read. Under `torch.distributed` every process collects its own batches (see
    `shard_batches`), and all return the same: batch i of process r of n has the number i n + r.

    Args:
        model: A swapped model, on its device.
        batches: Inputs of the model (see `forward.call_model`): tensors `[B, ...]`, `(inputs, labels)` or
            dictionaries; iterated once. To continue a run, they must come in the same order again.
        num_batches: Upper limit on the number of batches (in each process); None: all.
        statistics: The file, ending in `.safetensors`. Process r of several has its own file until all are done.

    Raises:
        ArgumentError: Nothing to calibrate; a file for another model, for other data or with more batches.
        ArgumentTypeError: `batches` is one tensor or dictionary.
        CalibrationError: NaN or Inf in the data, with the quantizer and the batch; another process failed.
        DataError: The file is of another kind. A damaged one is renamed, and a warning says so.
    """
    collected = collect_and_hold_out(model, batches, num_batches, statistics, hold_out=False)
    return collected.statistics


def collect_and_hold_out(
    model: nn.Module,
    batches: Iterable[Any],
    num_batches: int | None,
    path: Path | str | None,
    *,
    hold_out: bool,
) -> Collected:
    """As `collect_statistics`; with `hold_out` the last batch is returned, not collected, unless it is the only one.

    Raises:
        ArgumentError: As for `collect_statistics`.
        ArgumentTypeError: As for `collect_statistics`.
        CalibrationError: As for `collect_statistics`.
        DataError: As for `collect_statistics`.
    """
    with failing_together():
        require_model(model)
        require_batches(batches)
        if num_batches is not None and (not isinstance(num_batches, int) or num_batches < 1):
            raise ArgumentError(
                f"num_batches is {num_batches!r}.", "give 1 or more, or leave it out to take all."
            )
        collection = Collection(model)
        file = PassFile(path, collection.fingerprint, num_batches)
    stream = _Stream(islice(batches, num_batches), hold_out)
    statistics = _load_or_collect(collection, stream, file)
    with failing_together():
        return Collected(collection, statistics, stream.read_held_out())


def _load_or_collect(collection: Collection, stream: _Stream, file: PassFile) -> Statistics:
    """The statistics of all processes, from the file if it is complete."""
    finished = file.load_finished()
    if finished:
        with failing_together():
            _require_same_sources(collection.model, finished, stream, file)
        return finished
    with failing_together():
        local = _collect(collection, stream, file)
    parts = gather_bytes(local.to_bytes())
    merged = replace(merge_parts(map(Statistics.from_bytes, parts)), complete=True)
    if merged.batches:  # a pass without any batch is not saved: the next one starts over
        file.finish(merged)
    return merged


def _require_same_sources(
    model: nn.Module, finished: Statistics, stream: _Stream, file: PassFile
) -> None:
    """Refuse weights or a first batch that differ from those of a finished pass; no batch at all is fine."""
    is_first_process = find_rank()[0] == 0
    first_batch = next(iter(stream), None) if is_first_process else None
    if first_batch is not None:
        file.require_sources(finished, digest_sources(model, first_batch))


def _collect(collection: Collection, stream: _Stream, file: PassFile) -> Statistics:
    """The statistics of the batches of this process.

    Batches that an earlier, killed run had processed are read but not run again.

    Args:
        collection: Collects in the block.
        stream: The batches of this process.
        file: Saves the statistics at intervals.

    Raises:
        ArgumentError: Other batches or weights than in the earlier run.
        CalibrationError: NaN or Inf, with the batch.
    """
    begun = file.load_begun()
    num_begun = begun.batches if begun else 0
    num_read = 0
    data = ""
    rank, size = find_rank()
    with collection, without_tf32():
        for batch in tqdm(stream, desc="calibrate", unit="batch", disable=None):
            if num_read == 0:
                data = digest_sources(collection.model, batch)
                file.require_sources(begun, data)
            number = num_read * size + rank
            num_read += 1
            if num_read <= num_begun:
                continue
            _collect_batch(collection, batch, number)
            if file.is_due():
                partial = _join_begun(begun, collection.statistics(), num_read, data)
                file.save(replace(partial, complete=False))
        if num_read < num_begun:
            raise ArgumentError(
                f"an earlier run of this pass processed {num_begun} batches, but now there are only {num_read}.",
                "give the same batches in the same order, or remove the file.",
            )
        joined = _join_begun(begun, collection.statistics(), num_read, data)
    return replace(joined, complete=True, limit=file.limit)


def _collect_batch(collection: Collection, batch: Any, number: int) -> None:
    """Run the model on one batch; an error names the batch."""
    collection.begin_batch(number)
    try:
        call_model(collection.model, batch)
    except CalibrationError as error:
        raise CalibrationError(f"batch {number}: {error.message}", error.fix) from None


def _join_begun(
    begun: Statistics | None, statistics: Statistics, num_batches: int, data: str
) -> Statistics:
    """The statistics of an earlier, killed run together with those of this run.

    Args:
        begun: The statistics of the earlier run, if there was one.
        statistics: The statistics of this run.
        num_batches: Number of batches of both runs.
        data: Digest of the weights and the first batch; "" if no batch was read.
    """
    joined = merge_parts([begun, statistics]) if begun else statistics
    return replace(joined, batches=num_batches, data=data or joined.data)


class _Stream:
    """The batches of one pass. The last one is held out on request; a single batch is both taken and held out."""

    def __init__(self, batches: Iterable[Any], hold_out: bool) -> None:
        self._batches = iter(batches)
        self._hold_out = hold_out
        self._held_out: list[Any] = []
        self._num_read = 0

    def __iter__(self) -> Iterator[Any]:
        for batch in self._batches:
            self._num_read += 1
            if not self._hold_out:
                yield batch
                continue
            previous = self._held_out
            self._held_out = [batch]
            yield from previous
        if self._num_read == 1:
            yield from self._held_out

    def read_held_out(self) -> list[Any]:
        """Read the remaining batches and return the held-out one; an empty list if there is none."""
        if self._hold_out:
            for _ in self:
                pass
        return self._held_out


# -- digests ---------------------------------------------------------------------------------------------------------


def fingerprint_model(model: nn.Module) -> str:
    """Digest of everything that statistics must match: quantizers with formats and axes, parameters with shapes."""
    return _fingerprint(dict(named_quantizers(model)), model)


def _fingerprint(quantizers: dict[str, TensorQuantizer], model: nn.Module) -> str:
    """As `fingerprint_model`, for quantizers that are already known."""
    lines = []
    for name, q in quantizers.items():
        if not isinstance(q, SharedQuantizer):
            lines.append(f"{name} {q.num_bits} {q.unsigned} {q.narrow_range} {q.axis}")
    for name, parameter in model.named_parameters():
        lines.append(f"{name} {list(parameter.shape)}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def digest_sources(model: nn.Module, batch: Any) -> str:
    """Digest of parameters, buffers and input tensors, which determine every statistic."""
    tensors: list[torch.Tensor] = []
    for module in model.modules():
        if not isinstance(module, TensorQuantizer):
            tensors += module.parameters(recurse=False)
            tensors += module.buffers(recurse=False)
    tensors += tensors_of(split_inputs(batch))
    return digest_tensors(tensor for tensor in tensors if not tensor.is_meta)


def digest_tensors(tensors: Iterable[torch.Tensor]) -> str:
    """Digest of types, shapes and values."""
    digest = hashlib.sha256()
    for group in _split_by_size(tensors):
        for tensor in copy_to_host(group):
            digest.update(f"{tensor.dtype} {list(tensor.shape)} ".encode())
            digest.update(bytes_of(tensor))
    return digest.hexdigest()


def _split_by_size(tensors: Iterable[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Groups of tensors that are copied to the host together, which takes their size again on their device."""
    group: list[torch.Tensor] = []
    num_bytes = 0
    for tensor in tensors:
        group.append(tensor)
        num_bytes += tensor.nbytes
        if num_bytes >= _COPIED_BYTES:
            yield group
            group = []
            num_bytes = 0
    yield group


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The values of a tensor in the order of their indices, for a digest; its shape and type are not included."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def format_of(quantizer: TensorQuantizer) -> Format | None:
    """The format; None if it is not an integer format."""
    try:
        return quantizer.format
    except AttributeError:
        return None

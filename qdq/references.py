"""Samples of the calibration and the outputs that belong to them, kept in the run folder for a bundle."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import nn

from qdq.batch import count_samples, drop_samples, list_filled_batches, take_samples
from qdq.check import OnnxModel
from qdq.errors import ArgumentError
from qdq.files import as_path, guard_files
from qdq.forward import require_model
from qdq.metrics import Array
from qdq.pairs import Pair, save_pairs
from qdq.predictor import list_file_inputs, predict
from qdq.quantizer import named_quantizers


def save_references(
    model: nn.Module, batches: Iterable[Any], path: Path | str, onnx: Path | str, *, count: int = 8
) -> Path:
    """Run a quantized model on a few samples, and keep their inputs and outputs for `make_bundle`.

    The samples are taken from all batches in turn, one each. If the ONNX file fixes the number of samples, whole
    batches are taken. The model runs twice: as it is, and with all quantizers off.

    Args:
        model: The model that was exported.
        batches: Samples of the calibration, as for `calibrate_model`.
        path: The file, `Run.references_file` in a run.
        onnx: The exported file. Its inputs give the names and types.
        count: Number of samples, at least 1; fewer are kept if there are fewer.

    Raises:
        ArgumentError: `count` is below 1, or two files are the same.
        CheckError: The ONNX file cannot be read.
        DataError: No batch, or the model cannot run on a sample.
    """
    require_model(model)
    path, onnx = as_path(path, "path"), as_path(onnx, "onnx")
    guard_files(inputs=[onnx], outputs=[path])
    if count < 1:
        raise ArgumentError(f"count is {count}; it must be 1 or more.", "use 8.")
    file = OnnxModel(onnx)
    samples = draw_samples(batches, count, file)
    quantized = _run(model, samples, file)
    with ExitStack() as paused:
        for _, quantizer in named_quantizers(model):
            paused.enter_context(quantizer.pausing())
        unquantized = _run(model, samples, file)
    pairs = []
    for sample, outputs, float_outputs in zip(samples, quantized, unquantized, strict=True):
        inputs = dict(zip(file.inputs, list_file_inputs(file, sample), strict=True))
        pairs.append(Pair(inputs, outputs, float_outputs))
    return save_pairs(pairs, path, onnx)


def draw_samples(batches: Iterable[Any], count: int, file: OnnxModel) -> list[Any]:
    """The first sample of each batch, then the second of each, and so on; whole batches if the file fixes their size.

    Args:
        batches: As for `save_references`.
        count: The most samples.
        file: The file that will run on them.

    Raises:
        DataError: No batch with samples.
    """
    return _take_in_turn(list_filled_batches(batches), count, _has_fixed_batch(file))


def _has_fixed_batch(file: OnnxModel) -> bool:
    """Whether a file takes only a certain number of samples other than one."""
    first_sizes = [shape[0] for shape in file.inputs.values() if shape]
    return all(isinstance(size, int) and size != 1 for size in first_sizes)


def _take_in_turn(batches: list[Any], count: int, whole: bool) -> list[Any]:
    """The first sample of each batch, then the second of each, and so on.

    Args:
        batches: Batches with samples.
        count: The most samples.
        whole: Take whole batches instead.
    """
    if whole:
        size = count_samples(batches[0])
        return [batch for batch in batches if count_samples(batch) == size][:count]
    samples: list[Any] = []
    most = max(map(count_samples, batches))
    for position in range(most):
        for batch in batches:
            if len(samples) == count:
                return samples
            if position < count_samples(batch):
                samples.append(take_samples(drop_samples(batch, position), 1))
    return samples


def _run(model: nn.Module, samples: list[Any], file: OnnxModel) -> list[dict[str, Array]]:
    """The outputs of each sample, by the names of the file."""
    outputs = []
    for sample in samples:
        arrays = predict(model, [sample])
        values = arrays.values() if isinstance(arrays, dict) else [arrays]
        outputs.append(dict(zip(file.outputs, values, strict=True)))
    return outputs

"""Outputs of modules and ONNX files on the same images, and a table of their accuracy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from qdq.batch import list_leaves, require_batches, split_inputs, tensors_of
from qdq.check import OnnxModel, Session
from qdq.device import without_tf32
from qdq.errors import ArgumentError, ArgumentTypeError, DataError, is_out_of_memory
from qdq.forward import call_model, evaluating, name_leaves, require_model
from qdq.graph.tensors import list_data_files
from qdq.metrics import Array, agreement, sqnr_db, top_k
from qdq.quantizer import named_quantizers

_FLOAT_TYPES = {
    "tensor(float16)": torch.float16,
    "tensor(float)": torch.float32,
    "tensor(double)": torch.float64,
}


@dataclass(frozen=True)
class Candidate:
    """One row of the table.

    Args:
        name: Name of the model.
        top1: Fraction of images whose label is the largest output, 0 to 1; None without labels.
        top5: Fraction of images whose label is among the five largest, 0 to 1; None without labels.
        agreement: Fraction of images with the same largest output as the reference, 0 to 1.
        sqnr_db: SQNR of the outputs against the reference, in dB; infinite for the reference itself.
        megabytes: Size of its file, or of its parameters; None if it was not requested.
    """

    name: str
    top1: float | None
    top5: float | None
    agreement: float
    sqnr_db: float
    megabytes: float | None


@dataclass(frozen=True)
class Evaluation:
    """Result of `evaluate_outputs`.

    Args:
        images: Number of images.
        candidates: The rows, the reference first.
    """

    images: int
    candidates: tuple[Candidate, ...]

    def format_table(self) -> str:
        """The table as text."""
        title = f"on {self.images} images"
        width = max(len(title), *(len(candidate.name) for candidate in self.candidates))
        lines = [f"{title:{width}}   top-1   top-5  agreement  SQNR dB       MB"]
        for candidate in self.candidates:
            cells = [
                f"{candidate.name:{width}}",
                _format_percent(candidate.top1),
                _format_percent(candidate.top5),
                f"   {_format_percent(candidate.agreement)}",
                _format_number(candidate.sqnr_db),
                _format_number(candidate.megabytes),
            ]
            lines.append("  ".join(cells))
        return "\n".join(lines)


@without_tf32()
def predict(
    model: nn.Module | Path | str, batches: Iterable[Any], *, session: Session = "plain"
) -> Array:
    """First output of a model on all batches.

    The tensors of a batch may be on any device: they are moved to that of the module, or to the CPU for a file. On a
    GPU, a module runs without TF32, whose error is as large as one of int8.

    Args:
        model: A module, or the path of an ONNX file (run by ONNX Runtime on the CPU).
        batches: As for `forward.call_model`: tensors, `(images, labels)`, dictionaries or `Labelled`.
        session: Session of ONNX Runtime. "plain" computes exactly what is in the file, "default" is what its users get
            (`check.OnnxModel`). A module needs none.

    Returns:
        float array `[N, ...]`.

    Raises:
        ArgumentError: An unknown session.
        ArgumentTypeError: `model` is neither.
        DataError: No batch, not enough memory for one, or one that is not on the device of the module.
        CheckError: The ONNX file cannot be run on them.
    """
    require_batches(batches)
    if isinstance(model, nn.Module):
        run = partial(_run_module, model)
        label = "predict (torch)"
    elif isinstance(model, str | Path):
        run = partial(_run_file, OnnxModel(Path(model), session=session))
        label = "predict (onnx)"
    else:
        raise ArgumentTypeError(
            f"model is of type {type(model).__name__}.",
            "pass a module, or the path of an ONNX file.",
        )
    progress = tqdm(batches, desc=label, unit="batch", disable=None)
    outputs = [run(batch) for batch in progress]
    if not outputs:
        raise DataError("there is no batch to predict.", "give at least one image.")
    return np.concatenate(outputs)


def _run_file(model: OnnxModel, batch: Any) -> Array:
    """First output of an ONNX file on one batch."""
    args, kwargs = split_inputs(batch)
    names = list(model.inputs)
    # Flags and strings are constants of the file.
    leaves = [leaf for leaf in list_leaves(args) if isinstance(leaf, torch.Tensor | np.ndarray)]
    if not args:
        named = name_leaves(kwargs)
        names = [name for name in names if name in named]
        leaves = [named[name] for name in names]
    dtypes = [_FLOAT_TYPES.get(model.types[name]) for name in names]
    if len(leaves) != len(dtypes):  # refused by the file, with its own message
        dtypes = [None] * len(leaves)
    return model(*map(_to_input, leaves, dtypes))[0]


def _to_input(leaf: Any, dtype: torch.dtype | None) -> Any:
    """An input of a file as an array.

    Args:
        leaf: The input.
        dtype: The type of floats that the file takes, None if it takes something else. Narrower floats become it.
    """
    if not isinstance(leaf, torch.Tensor):
        return np.asarray(leaf)
    tensor = leaf.detach().cpu()
    if dtype is not None and tensor.is_floating_point():
        is_wider = torch.promote_types(tensor.dtype, dtype) == dtype
        tensor = tensor.to(dtype if is_wider else tensor.dtype)
    if tensor.dtype == torch.bfloat16:  # numpy has none
        tensor = tensor.float()
    return tensor.numpy()


def _run_module(model: nn.Module, batch: Any) -> Array:
    """First output of a module on one batch.

    Raises:
        DataError: Not enough memory.
    """
    try:
        with evaluating(model):
            output = call_model(model, batch)
            return _to_array(tensors_of(output)[0])
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        shapes = ", ".join(str(list(tensor.shape)) for tensor in tensors_of(split_inputs(batch)))
        raise DataError(
            f"there is not enough memory to run the model on a batch of {shapes}.",
            "give smaller batches, or free memory.",
        ) from error


def _to_array(tensor: torch.Tensor) -> Array:
    array: Array = tensor.detach().float().cpu().numpy()
    return array


def measure_tie_floor(model: nn.Module, batches: Iterable[Any]) -> float:
    """SQNR in dB that rounding ties alone leave between two correct runs of a quantized model.

    The model is run twice, without TF32. In the second run the input of every quantizer is larger by 2^-22 of itself,
    about as much as another order of summation in float32 changes it. A float model hardly changes. A quantized one
    does, because values next to a tie round to the other code, and later layers propagate the difference. The SQNR of
    another runtime may be a little above or below this figure, but not far above.

    Args:
        model: A calibrated model.
        batches: As for `predict`; a hundred images are enough.

    Returns:
        The SQNR; infinite if no value was next to a tie.

    Raises:
        DataError: No batch.
    """
    require_model(model)
    require_batches(batches)
    batches = list(batches)
    expected = predict(model, batches)
    with ExitStack() as hooks:
        for name, quantizer in named_quantizers(model):
            if not name.endswith("_weight_quantizer"):
                hook = quantizer.register_forward_pre_hook(_enlarge_input)
                hooks.callback(hook.remove)
        return sqnr_db(expected, predict(model, batches))


def _enlarge_input(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (inputs[0] * (1 + 2**-22), *inputs[1:])


def evaluate_outputs(
    outputs: Mapping[str, Array],
    labels: Sequence[int] | None = None,
    *,
    files: Mapping[str, Path | nn.Module] | None = None,
) -> Evaluation:
    """Compare outputs of the same images; the first entry is the reference.

    Args:
        outputs: Name -> logits `[N, classes]`.
        labels: Class of each image `[N]`, None if unknown.
        files: Name -> file, or module whose parameters are counted, for the sizes.

    Raises:
        ArgumentError: Nothing to compare, or different shapes.
        ArgumentTypeError: Outputs without names, or labels that are not a sequence.
    """
    if not isinstance(outputs, Mapping):
        raise ArgumentTypeError(
            f"outputs is of type {type(outputs).__name__}; expected names with arrays.",
            "pass {'float': outputs}.",
        )
    if labels is not None and (isinstance(labels, str) or not hasattr(labels, "__len__")):
        raise ArgumentTypeError(
            f"labels is of type {type(labels).__name__}.", "pass a class for each image, or None."
        )
    if not outputs:
        raise ArgumentError("there are no outputs to evaluate.", "pass at least the reference.")
    reference = next(iter(outputs.values()))
    candidates = []
    for name, logits in outputs.items():
        top1, top5 = _measure_accuracy(logits, labels)
        candidates.append(
            Candidate(
                name=name,
                top1=top1,
                top5=top5,
                agreement=agreement(reference, logits),
                sqnr_db=sqnr_db(reference, logits),
                megabytes=_measure_size((files or {}).get(name)),
            )
        )
    return Evaluation(len(reference), tuple(candidates))


def _measure_accuracy(
    logits: Array, labels: Sequence[int] | None
) -> tuple[float | None, float | None]:
    """Top-1 and top-5 accuracy; None without labels."""
    if labels is None:
        return None, None
    classes = np.asarray(labels)
    return top_k(logits, classes, 1), top_k(logits, classes, 5)


def _measure_size(source: Path | nn.Module | None) -> float | None:
    """Megabytes of a file with its external data, or of the parameters of a module."""
    if source is None:
        return None
    if isinstance(source, Path):
        files = [source, *list_data_files(source)]
        return sum(file.stat().st_size for file in files) / 1e6
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in source.parameters())
    return num_bytes / 1e6


def _format_percent(fraction: float | None) -> str:
    if fraction is None:
        return "     -"
    return f"{100 * fraction:5.1f}%"


def _format_number(value: float | None) -> str:
    if value is None or np.isinf(value):
        return "      -"
    return f"{value:7.2f}"

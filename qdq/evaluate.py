"""Outputs of modules and ONNX files on the same images, and a table of their accuracy."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
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
from qdq.metrics import (
    Array,
    Batches,
    Outputs,
    agreement,
    count_rows,
    decide_db,
    has_classes,
    list_batches,
    name_arrays,
    pair_arrays,
    sqnr_db,
    top_k,
)
from qdq.outputs import Mask, OutputView, Selection
from qdq.quantizer import named_quantizers

_FLOAT_TYPES = {
    "tensor(float16)": torch.float16,
    "tensor(float)": torch.float32,
    "tensor(double)": torch.float64,
}


_NUDGE = 2**-22  # of the input of a quantizer, to look for ties


@dataclass(frozen=True)
class OutputFigures:
    """One of several outputs of a candidate.

    Args:
        name: Name of the output.
        top1: As for `Candidate`; None for an output without labels.
        top5: Likewise.
        agreement: As for `Candidate`; None for an output without labels, because its largest element need not be an
            answer.
        sqnr_db: As for `Candidate`.
    """

    name: str
    top1: float | None
    top5: float | None
    agreement: float | None
    sqnr_db: float


@dataclass(frozen=True)
class Candidate:
    """One row of the table.

    Args:
        name: Name of the model.
        top1: Fraction of images whose label is the largest output, 0 to 1; None without labels.
        top5: Fraction of images whose label is among the five largest, 0 to 1; None without labels.
        agreement: Fraction of images with the same largest output as the reference, 0 to 1; None if the output is not
            `[N, classes]`, or if there are several.
        sqnr_db: SQNR of the outputs against the reference, in dB; infinite for the reference itself. Of several
            outputs, that of the worst.
        megabytes: Size of its file, or of its parameters; None if it was not requested.
        outputs: Figures of each output if there are several.
    """

    name: str
    top1: float | None
    top5: float | None
    agreement: float | None
    sqnr_db: float
    megabytes: float | None
    outputs: tuple[OutputFigures, ...] = ()


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
        labels = [candidate.name for candidate in self.candidates]
        for candidate in self.candidates:
            labels += [f"  {figures.name}" for figures in candidate.outputs]
        width = max(len(title), *map(len, labels))
        lines = [f"{title:{width}}   top-1   top-5  agreement  SQNR dB       MB"]
        for candidate in self.candidates:
            lines.append(_format_row(candidate.name, width, candidate, candidate.megabytes))
            for figures in candidate.outputs:
                lines.append(_format_row(f"  {figures.name}", width, figures, None))
        return "\n".join(lines)


def _format_row(
    label: str, width: int, figures: Candidate | OutputFigures, megabytes: float | None
) -> str:
    """A row of the table, whose first column has `width` characters."""
    cells = [
        f"{label:{width}}",
        _format_percent(figures.top1),
        _format_percent(figures.top5),
        f"   {_format_percent(figures.agreement)}",
        _format_number(figures.sqnr_db),
        _format_number(megabytes),
    ]
    return "  ".join(cells)


@without_tf32()
def predict(
    model: nn.Module | Path | str,
    batches: Iterable[Any],
    *,
    session: Session = "plain",
    outputs: Selection | None = None,
    mask: Mask | None = None,
) -> Any:
    """Outputs of a model on all batches.

    The tensors of a batch may be on any device: they are moved to that of the module, or to the CPU for a file. On a
    GPU, a module runs without TF32, whose error is as large as one of int8.

    Args:
        model: A module, or the path of an ONNX file (run by ONNX Runtime on the CPU).
        batches: As for `forward.call_model`: tensors, `(images, labels)`, dictionaries or `Labelled`.
        session: Session of ONNX Runtime. "plain" computes exactly what is in the file, "default" is what its users get
            (`check.OnnxModel`). A module needs none.
        outputs: Parts to return: name -> name of an output (`outputs.name_outputs`), or a function of all named
            outputs that returns the part. It gets tensors, also for a file. None: all outputs.
        mask: The name of an input, such as "attention_mask", or a function of the batch that returns a tensor; it is 0
            at padding. Outputs that have its sizes first, `[N, T, ...]`, become `[positions, ...]` without padding.

    Returns:
        An array `[N, ...]` for one output; for several, a dictionary of them by name. If the sizes of an output
        differ between batches in more than the samples, its arrays are in a list. Floats are float32.

    Raises:
        ArgumentError: An unknown session, output or input.
        ArgumentTypeError: `model` is neither, or the model returns no tensor.
        DataError: No batch, not enough memory for one, one that is not on the device of the module, or a mask that fits
            no output.
        CheckError: The ONNX file cannot be run on them.
    """
    return _unwrap(_predict(model, batches, session, OutputView(outputs, mask)))


def _predict(
    model: nn.Module | Path | str, batches: Iterable[Any], session: Session, view: OutputView
) -> dict[str, Batches]:
    """All outputs by name; arguments as for `predict`."""
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
    collected: dict[str, list[Array]] = {}
    num_batches = 0
    for batch in tqdm(batches, desc=label, unit="batch", disable=None):
        arrays = run(batch, view)
        if num_batches and arrays.keys() != collected.keys():
            raise DataError(
                f"the model returns {list(arrays)} for a batch, and {list(collected)} for the first one.",
                "give batches for which it returns the same outputs, or select those with outputs=.",
            )
        for name, array in arrays.items():
            collected.setdefault(name, []).append(array)
        num_batches += 1
    if not num_batches:
        raise DataError("there is no batch to predict.", "give at least one image.")
    return {name: _join(arrays) for name, arrays in collected.items()}


def _join(arrays: list[Array]) -> Batches:
    """The arrays of all batches as one, or as they are if their sizes differ in more than the samples."""
    sizes = {array.shape[1:] for array in arrays}
    return np.concatenate(arrays) if len(sizes) == 1 else arrays


def _unwrap(named: dict[str, Batches]) -> Outputs:
    """A single output without its name."""
    if len(named) == 1:
        (only,) = named.values()
        return only
    return named


def _run_file(model: OnnxModel, batch: Any, view: OutputView) -> dict[str, Array]:
    """Outputs of an ONNX file on one batch."""
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
    outputs = {}
    for name, array in zip(model.outputs, model(*map(_to_input, leaves, dtypes)), strict=True):
        is_numeric = isinstance(array, np.ndarray) and array.dtype != object
        outputs[name] = torch.from_numpy(array) if is_numeric else None
    return _to_arrays(outputs, batch, view)


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


def _run_module(model: nn.Module, batch: Any, view: OutputView) -> dict[str, Array]:
    """Outputs of a module on one batch.

    Raises:
        DataError: Not enough memory.
    """
    try:
        with evaluating(model):
            return _to_arrays(call_model(model, batch), batch, view)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        shapes = ", ".join(str(list(tensor.shape)) for tensor in tensors_of(split_inputs(batch)))
        raise DataError(
            f"there is not enough memory to run the model on a batch of {shapes}.",
            "give smaller batches, or free memory.",
        ) from error


def _to_arrays(outputs: Any, batch: Any, view: OutputView) -> dict[str, Array]:
    """The parts of some outputs as arrays; a part without a dimension is one sample.

    Raises:
        ArgumentTypeError: There is none.
    """
    arrays = {}
    for name, tensor in view.select_rows(outputs, batch).items():
        arrays[name] = np.atleast_1d(_to_array(tensor))
    if not arrays:
        raise ArgumentTypeError(
            f"the model returns no tensor, but a {type(outputs).__name__}.",
            "have its forward return a tensor, or tensors in a dictionary, dataclass, list or tuple.",
        )
    return arrays


def _to_array(tensor: torch.Tensor) -> Array:
    tensor = tensor.detach()
    if tensor.is_floating_point():
        tensor = tensor.float()
    array: Array = tensor.cpu().numpy()
    return array


def measure_tie_floor(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    expected: Outputs | None = None,
    outputs: Selection | None = None,
    mask: Mask | None = None,
) -> float | dict[str, float]:
    """SQNR in dB that rounding ties alone leave between two correct runs of a quantized model.

    The model is run twice more, without TF32. The input of every quantizer is larger by 2^-22 of itself in one run and
    smaller in the other, about as much as another order of summation in float32 changes it. A float model hardly
    changes. A quantized one does, because values next to a tie round to the other code, and later layers propagate the
    difference. The lower SQNR of the two runs counts. That of another runtime may be a little above or below this
    figure, but not far below.

    Args:
        model: A calibrated model.
        batches: As for `predict`, and all that the file is compared on: other samples have other ties.
        expected: What `predict` returned for the model on these batches, with which the file is compared. It saves a
            run, and other samples are refused.
        outputs: As for `predict`.
        mask: As for `predict`.

    Returns:
        The SQNR, for several outputs that of each by name; infinite if no value was next to a tie.

    Raises:
        ArgumentError: `expected` is of other samples or outputs.
        DataError: No batch.
    """
    require_model(model)
    require_batches(batches)
    batches = list(batches)
    run = partial(predict, model, batches, outputs=outputs, mask=mask)
    if expected is None:
        expected = run()
    floors: dict[str, float] = {}
    for direction in (1, -1):
        with _nudging(model, direction * _NUDGE):
            nudged = run()
        for name, pair in pair_arrays(expected, nudged).items():
            floors[name] = min(floors.get(name, math.inf), sqnr_db(*pair))
    if isinstance(expected, Mapping):
        return floors
    (floor,) = floors.values()
    return floor


@contextmanager
def _nudging(model: nn.Module, fraction: float) -> Iterator[None]:
    """Enlarge the input of every activation quantizer by a fraction of itself in the block."""

    def nudge(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (inputs[0] * (1 + fraction), *inputs[1:])

    with ExitStack() as hooks:
        for name, quantizer in named_quantizers(model):
            if not name.endswith("_weight_quantizer"):
                hooks.callback(quantizer.register_forward_pre_hook(nudge).remove)
        yield


def evaluate_outputs(
    outputs: Mapping[str, Outputs],
    labels: Sequence[int] | Mapping[str, Sequence[int]] | None = None,
    *,
    files: Mapping[str, Path | nn.Module] | None = None,
) -> Evaluation:
    """Compare outputs of the same images; the first entry is the reference.

    Args:
        outputs: Name -> logits `[N, classes]`, or whatever `predict` returned. Of several outputs, each gets a line.
        labels: Class of each image `[N]`, None if unknown. For several outputs, name -> the classes of those that are
            scores.
        files: Name -> file, or module whose parameters are counted, for the sizes.

    Raises:
        ArgumentError: Nothing to compare, different shapes or outputs, or labels that do not belong to an output.
        ArgumentTypeError: Outputs without names, or labels that are not a sequence.
    """
    if not isinstance(outputs, Mapping):
        raise ArgumentTypeError(
            f"outputs is of type {type(outputs).__name__}; expected names with arrays.",
            "pass {'float': outputs}.",
        )
    if not outputs:
        raise ArgumentError("there are no outputs to evaluate.", "pass at least the reference.")
    reference = next(iter(outputs.values()))
    classes = _name_labels(labels, reference)
    candidates = []
    for name, predicted in outputs.items():
        figures = _compare_outputs(reference, predicted, classes)
        is_single = not isinstance(reference, Mapping)
        candidates.append(
            Candidate(
                name=name,
                top1=figures[0].top1 if is_single else None,
                top5=figures[0].top5 if is_single else None,
                agreement=figures[0].agreement if is_single else None,
                sqnr_db=decide_db({entry.name: entry.sqnr_db for entry in figures}),
                megabytes=_measure_size((files or {}).get(name)),
                outputs=() if is_single else figures,
            )
        )
    num_images = min(map(count_rows, name_arrays(reference).values()))  # padding adds rows
    return Evaluation(num_images, tuple(candidates))


def _name_labels(labels: Any, reference: Outputs) -> dict[str, Sequence[int] | None]:
    """The labels of each output that has class scores, None if they are unknown.

    Raises:
        ArgumentError: Labels without the name of one of several outputs, or of one that does not exist.
        ArgumentTypeError: Labels that are not a sequence.
    """
    arrays = name_arrays(reference)
    if not isinstance(labels, Mapping):
        if not isinstance(reference, Mapping):
            return dict.fromkeys(arrays, _require_sequence(labels))
        if labels is None:
            return {}
    named: dict[str, Any] = dict(labels) if isinstance(labels, Mapping) else {"": labels}
    unknown = [name for name in named if name not in arrays]
    if unknown:
        raise ArgumentError(
            f"labels are of {unknown[0] or 'no output'!r}, and the outputs are {list(arrays)}.",
            "pass {NAME: labels} with one of these names.",
        )
    return {name: _require_sequence(classes) for name, classes in named.items()}


def _require_sequence(labels: Any) -> Any:
    if labels is not None and (isinstance(labels, str) or not hasattr(labels, "__len__")):
        raise ArgumentTypeError(
            f"labels is of type {type(labels).__name__}.", "pass a class for each image, or None."
        )
    return labels


def _compare_outputs(
    reference: Outputs, outputs: Outputs, labels: Mapping[str, Sequence[int] | None]
) -> tuple[OutputFigures, ...]:
    """Figures of every output of one candidate; arguments as for `evaluate_outputs`."""
    figures = []
    for name, (expected, actual) in pair_arrays(reference, outputs).items():
        top1, top5 = _measure_accuracy(name, actual, labels.get(name))
        has_answers = name in labels and has_classes(expected)
        answers = agreement(expected, actual) if has_answers else None
        figures.append(OutputFigures(name, top1, top5, answers, sqnr_db(expected, actual)))
    return tuple(figures)


def _measure_accuracy(
    name: str, logits: Any, labels: Sequence[int] | None
) -> tuple[float | None, float | None]:
    """Top-1 and top-5 accuracy; None without labels.

    Raises:
        ArgumentError: Labels of an output that has no class scores, or of other samples.
    """
    if labels is None:
        return None, None
    classes = np.asarray(labels)
    shapes = [np.shape(batch) for batch in list_batches(logits)]
    if len(shapes) > 1 or not has_classes(logits) or classes.shape != shapes[0][:1]:
        described = ", ".join(map(str, shapes[:3]))
        raise ArgumentError(
            f"labels {classes.shape} of the output {name}, which is {described}; expected [N] and [N, classes].",
            "give the class of each row; a mask turns [N, T, classes] into such rows.",
        )
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

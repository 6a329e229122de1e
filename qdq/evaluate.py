"""Outputs of a module or an ONNX file on the same images, and one table of what they are worth."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from qdq.check import OnnxModel, Session
from qdq.errors import ArgumentError, ArgumentTypeError, DataError, is_out_of_memory
from qdq.forward import (
    call_model,
    evaluating,
    name_leaves,
    require_batches,
    require_model,
    split_inputs,
    tensors_of,
)
from qdq.graph.tensors import list_data_files
from qdq.metrics import Array, agreement, sqnr_db, top_k
from qdq.quantizer import named_quantizers


@dataclass(frozen=True)
class Candidate:
    """One row of the table.

    Args:
        name: What it is.
        top1: Share of images whose label is the largest output, 0..1; None without labels.
        top5: Share of images whose label is among the five largest, 0..1; None without labels.
        agreement: Share of images with the same largest output as the reference, 0..1.
        sqnr_db: SQNR of the outputs against the reference, in dB; infinite for the reference itself.
        megabytes: Size of its file, or of its parameters; None if not asked for.
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
        images: How many images.
        candidates: The rows, the reference first.
    """

    images: int
    candidates: tuple[Candidate, ...]

    def format_table(self) -> str:
        """The table as text."""
        title = f"on {self.images} images"
        width = max(len(title), *(len(candidate.name) for candidate in self.candidates))
        lines = [f"{title:{width}}   top-1   top-5  agreement  SQNR dB       MB"]
        for c in self.candidates:
            sqnr = "      -" if np.isinf(c.sqnr_db) else f"{c.sqnr_db:7.2f}"
            size = "      -" if c.megabytes is None else f"{c.megabytes:7.2f}"
            lines.append(
                f"{c.name:{width}}  {_percent(c.top1)}  {_percent(c.top5)}     {_percent(c.agreement)}  {sqnr}  {size}"
            )
        return "\n".join(lines)


def predict(
    model: nn.Module | Path | str, batches: Iterable[Any], *, session: Session = "plain"
) -> Array:
    """First output of a model on all batches.

    Args:
        model: A module, or the path of an ONNX file (run by ONNX Runtime on the CPU).
        batches: As for `trace.call_model`: tensors or `(images, labels)`.
        session: Of ONNX Runtime: "plain" computes what the file says, "default" is what its users have
            (`check.OnnxModel`). A module needs none.

    Returns:
        float array `[N, ...]`.

    Raises:
        ArgumentError: Another session.
        DataError: No batch, or one for which memory is too short.
        CheckError: The ONNX file cannot be run on them.
    """
    if not isinstance(model, str | Path | nn.Module):
        raise ArgumentTypeError(
            f"model is of type {type(model).__name__}.",
            "pass a module, or the path of an ONNX file.",
        )
    require_batches(batches)
    onnx_model = None if isinstance(model, nn.Module) else OnnxModel(Path(model), session=session)
    outputs = []
    label = "predict (torch)" if onnx_model is None else "predict (onnx)"
    for batch in tqdm(batches, desc=label, unit="batch", disable=None):
        if isinstance(model, nn.Module):
            outputs.append(_run_module(model, batch))
        elif onnx_model is not None:
            args, kwargs = split_inputs(batch)
            named = name_leaves(kwargs)
            arrays = (
                tree_leaves(args)
                if args
                else [named[name] for name in onnx_model.inputs if name in named]
            )
            outputs.append(onnx_model(*map(np.asarray, arrays))[0])
    if not outputs:
        raise DataError("there is no batch to predict.", "give at least one image.")
    return np.concatenate(outputs)


def _run_module(model: nn.Module, batch: Any) -> Array:
    """First output of a module on one batch.

    Raises:
        DataError: Memory is too short.
    """
    try:
        with evaluating(model):
            return _first(call_model(model, batch))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        shapes = ", ".join(str(list(tensor.shape)) for tensor in tensors_of(split_inputs(batch)))
        raise DataError(
            f"memory is too short to run the model on a batch of {shapes}.",
            "give smaller batches, or free memory.",
        ) from error


def measure_tie_floor(model: nn.Module, batches: Iterable[Any]) -> float:
    """SQNR in dB that rounding ties alone leave between two correct runs of a quantized model.

    The model is run twice, the second time with the input of every quantizer larger by 2^-22 of itself, about what
    another order of summation in float32 changes. A float model hardly notices; a quantized one does, because values
    next to a tie round to the other code and later layers carry that on. Another runtime may land a little above or
    below this, not far above.

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
    kept = list(batches)
    expected = predict(model, kept)
    with ExitStack() as hooks:
        for name, quantizer in named_quantizers(model):
            if not name.endswith("_weight_quantizer"):
                hook = quantizer.register_forward_pre_hook(
                    lambda _, inputs: (inputs[0] * (1 + 2**-22), *inputs[1:])
                )
                hooks.callback(hook.remove)
        return sqnr_db(expected, predict(model, kept))


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
        ArgumentTypeError: Outputs without names, or labels that are no sequence.
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
    classes = None if labels is None else np.asarray(labels)
    candidates = tuple(
        Candidate(
            name=name,
            top1=None if classes is None else top_k(logits, classes, 1),
            top5=None if classes is None else top_k(logits, classes, 5),
            agreement=agreement(reference, logits),
            sqnr_db=sqnr_db(reference, logits),
            megabytes=_megabytes((files or {}).get(name)),
        )
        for name, logits in outputs.items()
    )
    return Evaluation(len(reference), candidates)


def _first(output: Any) -> Array:
    array: Array = tensors_of(output)[0].detach().float().cpu().numpy()
    return array


def _megabytes(source: Path | nn.Module | None) -> float | None:
    if source is None:
        return None
    if isinstance(source, Path):
        files = [source, *list_data_files(source)]
        return sum(file.stat().st_size for file in files) / 1e6
    return float(
        sum(tensor.numel() * tensor.element_size() for tensor in source.parameters()) / 1e6
    )


def _percent(share: float | None) -> str:
    return "     -" if share is None else f"{100 * share:5.1f}%"

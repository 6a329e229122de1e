"""Outputs of modules, ONNX files and engines: for one batch, or for all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
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
from qdq.engine import Engine, is_engine, load_engine
from qdq.errors import ArgumentTypeError, DataError, is_out_of_memory
from qdq.forward import call_model, evaluating, name_leaves
from qdq.metrics import Array, Batches, Outputs
from qdq.outputs import Mask, OutputView, Selection

Predict = Callable[[Any], Outputs]
"""Inputs -> outputs, as `make_predictor` returns it."""

_FLOAT_TYPES = {
    "tensor(float16)": torch.float16,
    "tensor(float)": torch.float32,
    "tensor(double)": torch.float64,
}


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
        model: A module, the path of an ONNX file (run by ONNX Runtime on the CPU), or that of an engine (`.engine`,
            `.plan` or `.trt`, run by TensorRT on the GPU).
        batches: As for `forward.call_model`: tensors, `(images, labels)`, dictionaries or `Labelled`.
        session: Session of ONNX Runtime. "plain" computes exactly what is in the file, "default" is what its users get
            (`check.OnnxModel`). Modules and engines need none.
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
        BuildError: The engine cannot be loaded here.
        DependencyError: There is no GPU or no TensorRT for an engine.
    """
    require_batches(batches)
    view = OutputView(outputs, mask)
    run = _make_runner(model, session, view)
    label = "predict (torch)" if isinstance(model, nn.Module) else "predict (onnx)"
    collected: dict[str, list[Array]] = {}
    num_batches = 0
    for batch in tqdm(batches, desc=label, unit="batch", disable=None):
        arrays = run(batch)
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
    return _unwrap({name: _join(arrays) for name, arrays in collected.items()})


def make_predictor(
    model: nn.Module | Path | str,
    *,
    session: Session = "plain",
    outputs: Selection | None = None,
    mask: Mask | None = None,
) -> Predict:
    """A function from the inputs of one batch to the outputs of a model, the same for a module and for a file.

    It returns for one batch what `predict` returns for all of them. A metric of a task that calls it does not see what
    computes the outputs.

    Args:
        model: As for `predict`; a file is read once, here.
        session: As for `predict`.
        outputs: Likewise.
        mask: Likewise.

    Raises:
        ArgumentError: As for `predict`.
        ArgumentTypeError: Likewise.
    """
    run = _make_runner(model, session, OutputView(outputs, mask))

    @without_tf32()
    def predict_batch(batch: Any) -> Outputs:
        return _unwrap(dict(run(batch)))

    return predict_batch


def _make_runner(
    model: nn.Module | Path | str, session: Session, view: OutputView
) -> Callable[[Any], dict[str, Array]]:
    """A function from a batch to the arrays of all outputs by name."""
    if isinstance(model, nn.Module):
        return partial(_run_module, model, view=view)
    if isinstance(model, str | Path):
        return partial(_run_file, open_file(Path(model), session), view=view)
    raise ArgumentTypeError(
        f"model is of type {type(model).__name__}.",
        "pass a module, or the path of an ONNX file or an engine.",
    )


def open_file(path: Path, session: Session = "plain") -> OnnxModel | Engine:
    """An ONNX file or an engine as a function of arrays.

    Args:
        path: The file.
        session: As for `predict`.

    Raises:
        ArgumentError: As for `predict`.
        BuildError: Likewise.
        CheckError: Likewise.
        DependencyError: Likewise.
    """
    return load_engine(path) if is_engine(path) else OnnxModel(path, session=session)


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


def _run_file(model: OnnxModel | Engine, batch: Any, view: OutputView) -> dict[str, Array]:
    """Outputs of an ONNX file or an engine on one batch."""
    inputs = list_file_inputs(model, batch)
    outputs = {}
    for name, array in zip(model.outputs, model(*inputs), strict=True):
        is_numeric = isinstance(array, np.ndarray) and array.dtype != object
        outputs[name] = torch.from_numpy(array) if is_numeric else None
    return _to_arrays(outputs, batch, view)


def list_file_inputs(model: OnnxModel | Engine, batch: Any) -> list[Any]:
    """The arrays that a file takes for a batch, in the order of its inputs.

    Args:
        model: The file.
        batch: As for `predict`.
    """
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
    return list(map(_to_input, leaves, dtypes))


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

"""The torch model of a run folder, made again from its settings, and its samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from safetensors import SafetensorError, safe_open
from torch import nn

from qdq.build import has_type
from qdq.bundle.commands import choose_model, list_types
from qdq.bundle.folder import name_arrays
from qdq.bundle.models import make_variants
from qdq.check.parity import OnnxModel
from qdq.diverge import Divergence, find_divergence
from qdq.diverge.dumps import list_debug_tensors
from qdq.errors import DataError
from qdq.fold import fold_batchnorm
from qdq.formats import INT8, parse_formats
from qdq.graph.coverage import measure_coverage
from qdq.metrics import Array
from qdq.nn.scaling import OFFSET_KEY, shift_input
from qdq.pairs import Pair as ReferencePair
from qdq.pairs import load_pairs
from qdq.predictor import list_file_inputs
from qdq.qat.checkpoint import load_tuned
from qdq.references import draw_samples
from qdq.rewire import rewire_operations
from qdq.run import MODEL_FILE, QUANTIZED_FILE, REFERENCES_FILE, STATE_FILE, require_one_target
from qdq.schema import read_json
from qdq.swap import swap_modules
from qdq.text import printable
from qdq.trt.flags import DEBUG_TENSORS, STRONG_TYPES
from qdq.trt.trtexec import Pair, debug_flags
from qdq.workloads import load_workload
from qdq.workloads.workload import WorkloadOptions

_FIX = "run the same command again, or call qdq.find_divergence with your model."
_SETTINGS = (
    "model",
    "weights",
    "data",
    "metric",
    "calib_batches",
    "eval_images",
    "batch_size",
    "image_size",
    "seed",
    "exclude",
    "output_options",
)


@dataclass(frozen=True)
class RunDivergence:
    """Result of `diverge_run`.

    Args:
        divergence: The comparison.
        trtexec: Version of TensorRT -> the command that writes the dumps, for the folder `dumps` in a bundle. Empty if
            there are dumps already, or no bundle can be made, because the file has bfloat16 tensors.
    """

    divergence: Divergence
    trtexec: Mapping[str, list[str]]


def diverge_run(run: Path, *, dumps: Path | None = None, samples: int = 1) -> RunDivergence:
    """Compare the file of a run with its torch model, which is made again as the recipe made it.

    Args:
        run: A folder of `qdq ptq` or `qdq qat`.
        dumps: As for `find_divergence`.
        samples: Number of calibration samples, the first of those that `save_references` kept.

    Raises:
        ArgumentError: It is the folder of a run of several targets.
        DataError: The folder lacks a file, or is of a recipe whose model qdq cannot make; the samples are not those
            of the dumps.
        QdqError: As for `load_workload`, `load_tuned` and `find_divergence`.
    """
    require_one_target(run)
    onnx = _require_file(run / MODEL_FILE)
    _require_file(run / QUANTIZED_FILE)
    settings = _read_settings(run)
    model, calibration = _make_model(settings, run / QUANTIZED_FILE)
    load_tuned(model, run / QUANTIZED_FILE)
    file = OnnxModel(onnx)
    batches = draw_samples(calibration, samples, file)
    inputs = dict(zip(file.inputs, list_file_inputs(file, batches[0]), strict=True))
    if dumps is not None:
        _require_same_inputs(run / REFERENCES_FILE, inputs)
    divergence = find_divergence(model, onnx, batches, dumps=dumps)
    if dumps is not None:
        return RunDivergence(divergence, {})
    pairs = load_pairs(_require_file(run / REFERENCES_FILE)).pairs
    return RunDivergence(divergence, _list_commands(onnx, file, pairs[:1]))


def _require_file(path: Path) -> Path:
    if not path.is_file():
        raise DataError(
            f"{printable(path.parent)} has no {path.name}: it is no run folder, the run is not finished, or is of an "
            "earlier qdq.",
            _FIX,
        )
    return path


def _read_settings(run: Path) -> dict[str, Any]:
    """The settings of the run.

    Raises:
        DataError: They are not those of `qdq ptq` or `qdq qat`.
    """
    state = read_json(_require_file(run / STATE_FILE), _FIX)
    settings = state.get("settings") if isinstance(state, dict) else None
    lacking = [key for key in _SETTINGS if not isinstance(settings, dict) or key not in settings]
    if lacking or not isinstance(settings, dict):
        raise DataError(
            f"the settings in {printable(run / STATE_FILE)} lack {lacking[0]!r}: it is not a run of `qdq ptq` or "
            "`qdq qat`, so its model cannot be made again.",
            "call qdq.find_divergence with your model.",
        )
    return settings


def _make_model(settings: Mapping[str, Any], quantized: Path) -> tuple[nn.Module, Any]:
    """The swapped and rewired model of a run, and its calibration samples.

    Args:
        settings: Those of the run.
        quantized: Its weights and ranges.
    """
    options = settings["output_options"]
    workload = load_workload(
        WorkloadOptions(
            model=settings["model"],
            weights=settings["weights"],
            data=settings["data"],
            metric=settings["metric"],
            calib_batches=settings["calib_batches"],
            eval_samples=settings["eval_images"],
            batch_size=settings["batch_size"],
            image_size=settings["image_size"],
            seed=settings["seed"],
            outputs={name: name for name in options["outputs"]} or None,
            mask=options["mask"],
        )
    )
    model, exclude = workload.module, tuple(settings["exclude"])
    formats = parse_formats(settings.get("formats", INT8))  # earlier versions do not say
    fold_batchnorm(model, workload.example)
    _shift_inputs(model, quantized)
    swap_modules(model, workload.example, exclude=exclude, formats=formats)
    rewire_operations(model, workload.example, exclude=exclude, formats=formats)
    return model, workload.calibration


def _shift_inputs(model: nn.Module, quantized: Path) -> None:
    """Give the layers that `center_inputs` has centered in a run their offsets, before they are swapped.

    Raises:
        DataError: The file cannot be read, or has an offset of a layer that the model does not have.
    """
    modules = dict(model.named_modules())
    try:
        with safe_open(quantized, "pt") as file:
            names = [name for name in file.keys() if name.endswith(f".{OFFSET_KEY}")]  # noqa: SIM118  # no mapping
            for name in names:
                layer = modules[name.removesuffix(f".{OFFSET_KEY}")]
                shift_input(layer, file.get_tensor(name))
    except (OSError, SafetensorError, KeyError) as error:
        raise DataError(
            f"{printable(quantized)} does not fit the model: {printable(str(error))}.", _FIX
        ) from error


def _require_same_inputs(references: Path, inputs: Mapping[str, Array]) -> None:
    """Refuse samples that are not those on which the target has run.

    Raises:
        DataError: There are no references, or others.
    """
    first = load_pairs(_require_file(references)).pairs[0].inputs
    is_same = first.keys() == inputs.keys()
    if is_same:
        is_same = all(np.array_equal(first[name], inputs[name]) for name in inputs)
    if not is_same:
        raise DataError(
            f"the first sample is not that of {printable(references)}, on which the engine has run: the data of the "
            "run changed.",
            "restore the data, or call qdq.find_divergence with your model and that sample.",
        )


def _list_commands(
    onnx: Path, file: OnnxModel, pairs: Sequence[ReferencePair]
) -> dict[str, list[str]]:
    """The trtexec command for each version, with paths from a folder in the bundle.

    Args:
        onnx: The file of the run.
        file: The same file in ONNX Runtime.
        pairs: The first pair of the references, on which the engine shall run.
    """
    model = ir.load(onnx)
    if has_type(model, ir.DataType.BFLOAT16):
        return {}
    inputs = pairs[0].inputs
    shapes = {}
    for name, array in inputs.items():
        if not all(isinstance(size, int) for size in file.inputs[name]):
            shapes[name] = array.shape
    pair = Pair(name_arrays(Path("..", "inputs"), 0, inputs), {}, shapes)
    tensors = list_debug_tensors(model)
    names = make_variants(model, pairs, with_float=False).graphs.keys()
    has_only_int8 = list_types(measure_coverage(model).layers) == ["Int8"]
    commands = {}
    for label, version in (("10", DEBUG_TENSORS), ("11", STRONG_TYPES)):
        name, is_typed = choose_model(names, version, has_only_int8=has_only_int8)
        commands[label] = debug_flags(Path("..", name), tensors, pair, version, half=is_typed)
    return commands

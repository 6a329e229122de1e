"""The repairs of `qdq check --fix`, after which the file computes the same numbers."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import onnx
import onnx_ir as ir

from qdq.check.calls import is_expansion_too_large
from qdq.check.facts import FileFacts
from qdq.check.inspection import inspect_file
from qdq.check.load import LoadedModel, load_onnx, require_whole
from qdq.errors import CheckError
from qdq.files import as_path, is_same_file, write_atomic
from qdq.graph.merge_pairs import MergePairs
from qdq.graph.raise_scales import RaiseWeightScales
from qdq.graph.repair import MakeCodesSigned, MakeScalesScalar, WriteAxes, WriteZeroPoints
from qdq.graph.save import save_model
from qdq.graph.tensors import list_tensors
from qdq.graph.validate import first_line

_Repair = MakeScalesScalar | WriteAxes | MakeCodesSigned | WriteZeroPoints

_REPAIRS: tuple[tuple[str, Callable[[], _Repair]], ...] = (
    ("QDQ103", MakeScalesScalar),
    ("QDQ105", WriteAxes),
    ("QDQ129", MakeCodesSigned),
    ("QDQ102", WriteZeroPoints),
)


def fix_onnx(path: Path | str, output: Path | str) -> dict[str, int]:
    """Write a copy of a QDQ ONNX file without the flaws that can be fixed without changing a number.

    These are: per-tensor scales of shape [1] (QDQ103), a missing axis if the shape leaves no choice (QDQ105),
    uint8 codes whose zero point is 128 (QDQ129), DQ of int8 codes without zero point (QDQ102), scales of weight
    channels that are all zero (QDQ140), and equal pairs on one tensor or in a row (QDQ120).

    The fixed model is checked before it is written: if onnx and ONNX Runtime accept the file, they must accept the
    copy. If there is nothing to fix, the copy is the file, byte for byte.

    Args:
        path: The file.
        output: Where to write; may be `path`. The file is written completely or not at all.

    Returns:
        The number of nodes that were changed or removed, for each rule that has any.

    Raises:
        ArgumentError: The folder of `output` cannot be written to.
        CheckError: The file cannot be read, contains parts that would be lost, or would be worse when fixed.
    """
    path, output = as_path(path, "path"), as_path(output, "output")
    loaded = load_onnx(path)
    facts = inspect_file(loaded)
    if facts.has_cycle or facts.tensor_faults or is_expansion_too_large(loaded.model):
        raise _not_fixable(path, "it is damaged (QDQ205, QDQ208)")

    counts = _apply_repairs(path, loaded.model)
    if not counts and _may_copy_bytes(loaded, output):
        if not is_same_file(output, path):
            write_atomic(output, path.read_bytes())
        return counts

    require_whole(load_onnx(path))  # the file as it was before the repairs
    _require_accepted(loaded.model, facts)
    save_model(loaded.model, output)
    return counts


def _not_fixable(path: Path, reason: str) -> CheckError:
    return CheckError(
        f"{path} cannot be fixed: {reason}.",
        "nothing was written; first fix the findings of `qdq check`.",
    )


def _apply_repairs(path: Path, model: ir.Model) -> dict[str, int]:
    """Apply all repairs in place.

    Returns:
        The number of nodes that were changed, for each rule that has any.
    """
    counts: dict[str, int] = {}
    try:
        for rule, make in _REPAIRS:
            repair = make()
            repair(model)
            counts[rule] = len(repair.changed)

        raise_scales = RaiseWeightScales(only_dead=True)
        raise_scales(model)
        counts["QDQ140"] = len(set(raise_scales.changed))

        merge = MergePairs()
        merge(model)
        counts["QDQ120"] = merge.removed_q + merge.removed_dq
    except Exception as error:  # onnx-ir wraps anything that a repair raises on a damaged graph
        raise _not_fixable(path, first_line(error)) from error
    return {rule: count for rule, count in counts.items() if count}


def _may_copy_bytes(loaded: LoadedModel, output: Path) -> bool:
    """Whether the file works unchanged at the other path: its data are in it, or the folder is the same."""
    if output.resolve().parent == loaded.path.resolve().parent:
        return True
    locations = {tensor.data_location for _, tensor in list_tensors(loaded.proto)}
    return onnx.TensorProto.EXTERNAL not in locations


def _require_accepted(model: ir.Model, facts: FileFacts) -> None:
    """Refuse a fixed model that cannot be written, or that onnx or ONNX Runtime newly refuses."""
    try:
        fixed = _inspect_copy(model)
    except Exception as error:  # onnx-ir and the file system raise their own errors
        raise _not_fixable(facts.path, first_line(error)) from error

    accepted = _list_refusals(facts)
    for judge, refusal in _list_refusals(fixed).items():
        if refusal is not None and accepted[judge] is None:
            raise _not_fixable(facts.path, f"the fixed file would be refused: {refusal}")


def _inspect_copy(model: ir.Model) -> FileFacts:
    """The facts about a model once it is written."""
    # the copy may go to another folder, or replace the file
    ir.external_data.load_to_model(model)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "model.onnx"
        save_model(model, copy)
        return inspect_file(load_onnx(copy))


def _list_refusals(facts: FileFacts) -> dict[str, str | None]:
    """The reason why each check of onnx and ONNX Runtime refuses a file; None if it accepts it."""
    return {
        "structure": facts.checker.structure,
        "types": facts.checker.types,
        "limit": facts.checker.limit,
        "runtime": None if facts.runtime is None else facts.runtime.refusal,
    }

"""What `qdq check --fix` does: repairs after which the file computes the same numbers."""

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

_REPAIRS: tuple[
    tuple[str, Callable[[], MakeScalesScalar | WriteAxes | MakeCodesSigned | WriteZeroPoints]], ...
] = (
    ("QDQ103", MakeScalesScalar),
    ("QDQ105", WriteAxes),
    ("QDQ129", MakeCodesSigned),
    ("QDQ102", WriteZeroPoints),
)


def fix_onnx(path: Path | str, output: Path | str) -> dict[str, int]:
    """Write a copy of a QDQ ONNX file without the flaws that can be mended with every number kept.

    That are: per-tensor scales of shape [1] (QDQ103), a missing axis that the shape leaves no choice about (QDQ105),
    uint8 codes whose zero point is 128 (QDQ129), DQ of int8 codes without zero point (QDQ102), scales of weight
    channels that are all zero (QDQ140), and equal pairs on one tensor or in a row (QDQ120).

    The mended model is checked before it is written: where onnx and ONNX Runtime accept the file, they must accept the
    copy. Where nothing is to mend, the copy is the file, byte for byte.

    Args:
        path: The file.
        output: Where to write; may be `path`. The file is written whole or not at all.

    Returns:
        How many nodes were mended or taken away, for each rule where there were any.

    Raises:
        ArgumentError: The folder of `output` cannot be written to.
        CheckError: The file cannot be read, holds what would be lost on the way, or would be worse mended.
    """
    path, output = as_path(path, "path"), as_path(output, "output")
    loaded = load_onnx(path)
    facts = inspect_file(loaded)
    if facts.has_cycle or facts.tensor_faults or is_expansion_too_large(loaded.model):
        raise _unmendable(path, "it is damaged (QDQ205, QDQ208)")
    counts = _mend(path, loaded.model)
    if not counts and _may_copy_bytes(loaded, output):
        if not is_same_file(output, path):
            write_atomic(output, path.read_bytes())
        return counts
    require_whole(load_onnx(path))  # as it was before the repairs
    _require_sound(loaded.model, facts)
    save_model(loaded.model, output)
    return counts


def _unmendable(path: Path, reason: str) -> CheckError:
    return CheckError(
        f"{path} cannot be mended: {reason}.",
        "nothing is written; mend what `qdq check` names first.",
    )


def _mend(path: Path, model: ir.Model) -> dict[str, int]:
    """Apply all repairs in place; how many nodes were changed for each rule."""
    counts: dict[str, int] = {}
    try:
        for rule, make in _REPAIRS:
            repair = make()
            repair(model)
            counts[rule] = len(repair.changed)
        dead = RaiseWeightScales(only_dead=True)
        dead(model)
        counts["QDQ140"] = len(set(dead.changed))
        merge = MergePairs()
        merge(model)
    except Exception as error:  # onnx-ir wraps whatever a damaged graph makes of a repair
        raise _unmendable(path, first_line(error)) from error
    counts["QDQ120"] = merge.removed_q + merge.removed_dq
    return {rule: count for rule, count in counts.items() if count}


def _may_copy_bytes(loaded: LoadedModel, output: Path) -> bool:
    """Whether the file works at the other place as it is: its data are in it, or beside both."""
    if output.resolve().parent == loaded.path.resolve().parent:
        return True
    return not any(
        tensor.data_location == onnx.TensorProto.EXTERNAL
        for _, tensor in list_tensors(loaded.proto)
    )


def _require_sound(model: ir.Model, facts: FileFacts) -> None:
    """Refuse a mended model that cannot be written, or that onnx or ONNX Runtime refuses and accepted before."""
    try:
        ir.external_data.load_to_model(
            model
        )  # the copy may lie in another folder, or in the place of the file
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / "model.onnx"
            save_model(model, copy)
            mended = inspect_file(load_onnx(copy))
    except Exception as error:  # onnx-ir and the file system each have their own
        raise _unmendable(facts.path, first_line(error)) from error
    verdicts = [
        (facts.checker.structure, mended.checker.structure),
        (facts.checker.types, mended.checker.types),
        (facts.checker.limit, mended.checker.limit),
        (facts.runtime and facts.runtime.refusal, mended.runtime and mended.runtime.refusal),
    ]
    for before, after in verdicts:
        if after is not None and before is None:
            raise _unmendable(facts.path, f"mended, it would be refused: {after}")

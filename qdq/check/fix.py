"""What `qdq check --fix` does: repairs after which the file computes the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir

from qdq.check.load import load_onnx
from qdq.graph.merge_pairs import MergePairs
from qdq.graph.raise_scales import RaiseWeightScales
from qdq.graph.repair import MakeCodesSigned, MakeScalesScalar, WriteAxes, WriteZeroPoints
from qdq.graph.save import save_model

_REPAIRS: tuple[tuple[str, Callable[[], MakeScalesScalar | WriteAxes | MakeCodesSigned | WriteZeroPoints]], ...] = (
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

    Args:
        path: The file.
        output: Where to write; may be `path`. The file is written whole or not at all.

    Returns:
        How many nodes were mended or taken away, for each rule where there were any.

    Raises:
        ArgumentError: The folder of `output` cannot be written to.
        CheckError: The file cannot be read, or is no valid ONNX.
    """
    model = load_onnx(Path(path)).model
    counts: dict[str, int] = {}
    for rule, make in _REPAIRS:
        repair = make()
        repair(model)
        counts[rule] = len(repair.changed)
    dead = RaiseWeightScales(only_dead=True)
    dead(model)
    counts["QDQ140"] = len(set(dead.changed))
    merge = MergePairs()
    merge(model)
    counts["QDQ120"] = merge.removed_q + merge.removed_dq
    ir.external_data.load_to_model(model)  # so that the copy may lie in another folder, or in the place of the file
    save_model(model, Path(output))
    return {rule: count for rule, count in counts.items() if count}

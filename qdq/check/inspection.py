"""Collect the facts about a file besides its graph: who accepts it, its damaged constants, its size."""

from __future__ import annotations

import contextlib
import os

import onnx
import onnx_ir as ir

from qdq.check.calls import is_expansion_too_large
from qdq.check.facts import FileFacts
from qdq.check.load import LoadedModel
from qdq.graph.tensors import external_fields, list_tensors
from qdq.graph.validate import (
    CheckerVerdict,
    RuntimeVerdict,
    check_model,
    iterate_nodes,
    load_in_runtime,
    skip_checker,
    skip_runtime,
)

_Operators = frozenset[tuple[str, str]]  # domain and type


def inspect_file(loaded: LoadedModel, *, ask_runtime: bool = True) -> FileFacts:
    """Ask onnx and ONNX Runtime, and look at order, cycles and constants.

    Args:
        loaded: The file; the nodes of its graph are sorted by this.
        ask_runtime: Whether ONNX Runtime has to load it.
    """
    unknown = _list_unknown(loaded.proto)
    is_sorted, has_cycle = _sort_nodes(loaded.model)
    checker, runtime = _ask(loaded, unknown, ask_runtime)
    return FileFacts(
        path=loaded.path,
        proto=loaded.proto,
        is_utf8=loaded.is_utf8,
        is_sorted=is_sorted,
        has_cycle=has_cycle,
        unknown=unknown,
        tensor_faults=loaded.tensor_faults,
        checker=checker,
        runtime=runtime,
    )


def _ask(
    loaded: LoadedModel, unknown: _Operators, ask_runtime: bool
) -> tuple[CheckerVerdict, RuntimeVerdict | None]:
    """The verdicts of onnx and of ONNX Runtime.

    Both expand every call of a function, so they are not asked about a file that would become too large.

    Args:
        loaded: The file.
        unknown: Operators that onnx does not know.
        ask_runtime: Whether ONNX Runtime has to load it.

    Returns:
        The verdict of onnx; the verdict of ONNX Runtime, None if it was not asked.
    """
    if is_expansion_too_large(loaded.model):
        reason = (
            "it was not asked, because the functions of the file expand to too many nodes (QDQ208)"
        )
        checker, runtime = skip_checker(reason), skip_runtime(reason)
        return checker, runtime if ask_runtime else None

    checker = check_model(loaded.proto, unknown)
    if not ask_runtime:
        return checker, None
    return checker, load_in_runtime(loaded.path, unknown)


def _list_unknown(proto: onnx.ModelProto) -> _Operators:
    """Operators that onnx does not have and that are not functions of the file."""
    unknown = {(node.domain, node.op_type) for node in iterate_nodes(proto)}
    for function in proto.functions:
        unknown.discard((function.domain, function.name))
    for domain, name in list(unknown):
        registered = "" if domain == "ai.onnx" else domain
        if onnx.defs.has(name, registered):
            unknown.discard((domain, name))
    return frozenset(unknown)


def _sort_nodes(model: ir.Model) -> tuple[bool, bool]:
    """Put the nodes in order.

    Returns:
        Whether they were in order, and whether a cycle makes that impossible.
    """
    nodes = list(model.graph.all_nodes())
    try:
        model.graph.sort()
    except ValueError:
        return False, True
    is_sorted = nodes == list(model.graph.all_nodes())
    return is_sorted, False


def count_file_bytes(loaded: LoadedModel) -> int:
    """Size of a model and of its external data."""
    total = loaded.path.stat().st_size
    for path in _list_data_files(loaded):
        with contextlib.suppress(OSError):
            if os.path.isfile(path):
                total += os.path.getsize(path)
    return total


def _list_data_files(loaded: LoadedModel) -> set[str]:
    """Real paths of the files that constants refer to; they may not exist."""
    paths = set()
    for _, tensor in list_tensors(loaded.proto):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        location = external_fields(tensor).get("location", "")
        paths.add(os.path.realpath(loaded.path.parent / location))
    return paths

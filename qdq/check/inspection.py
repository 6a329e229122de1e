"""All that is known of a file beside its graph: who accepts it, what is damaged, how large it is."""

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


def inspect_file(loaded: LoadedModel, *, ask_runtime: bool = True) -> FileFacts:
    """Ask onnx and ONNX Runtime, and look at order, cycles and constants.

    Args:
        loaded: The file; the nodes of its graph are sorted by this.
        ask_runtime: Whether ONNX Runtime has to load it.
    """
    unknown = _list_unknown(loaded.proto)
    is_sorted, has_cycle = _sort(loaded.model)
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
    loaded: LoadedModel, unknown: frozenset[tuple[str, str]], ask_runtime: bool
) -> tuple[CheckerVerdict, RuntimeVerdict | None]:
    """What onnx and ONNX Runtime say; both write every call of a function out, so they do not get too many."""
    if is_expansion_too_large(loaded.model):
        reason = "it was not asked, as the functions of the file become too many nodes (QDQ208)"
        return skip_checker(reason), skip_runtime(reason) if ask_runtime else None
    return check_model(loaded.proto, unknown), load_in_runtime(
        loaded.path, unknown
    ) if ask_runtime else None


def _list_unknown(proto: onnx.ModelProto) -> frozenset[tuple[str, str]]:
    """Operators that onnx does not have and that are no functions of the file."""
    used = {(node.domain, node.op_type) for node in iterate_nodes(proto)}
    defined = {(function.domain, function.name) for function in proto.functions}
    return frozenset(
        (domain, name)
        for domain, name in used - defined
        if not onnx.defs.has(name, "" if domain == "ai.onnx" else domain)
    )


def _sort(model: ir.Model) -> tuple[bool, bool]:
    """Put the nodes in order; whether they were, and whether they cannot be."""
    before = list(model.graph.all_nodes())
    try:
        model.graph.sort()
    except ValueError:
        return False, True
    return before == list(model.graph.all_nodes()), False


def count_file_bytes(loaded: LoadedModel) -> int:
    """Size of a model and of the files beside it that hold its data."""
    folder = loaded.path.parent
    tensors = [
        tensor
        for _, tensor in list_tensors(loaded.proto)
        if tensor.data_location == onnx.TensorProto.EXTERNAL
    ]
    files = {
        os.path.realpath(folder / external_fields(tensor).get("location", "")) for tensor in tensors
    }
    total = loaded.path.stat().st_size
    for path in files:
        with contextlib.suppress(OSError):
            total += os.path.getsize(path) if os.path.isfile(path) else 0
    return total

"""Match nodes of an ONNX graph with function calls of a torch module, if the match is certain.

ONNX decomposes operators: the tanh GELU, `F.linear` with bias, `F.group_norm` and `torch.addcmul` all become an Add and
other nodes. So the n-th Add of a module is its n-th `add` only if nothing else can have become one there, none is
missing, and the nodes are in the order of the calls. If one of these is in doubt, no node is matched: a wrong range is
worse than none.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

import onnx_ir as ir

from qdq.functions import FUNCTIONS, ONNX_BESIDES
from qdq.graph.pairs import is_op
from qdq.range_files.format import METADATA_ERRORS

_HIERARCHY = "pkg.torch.onnx.class_hierarchy"  # written by torch.onnx: the classes around a node, then its operator
_NODES_OF = {name: function.onnx for name, function in FUNCTIONS.items() if function.onnx}
_OPERATORS = {"interpolate": r"upsample_\w+"}  # names in torch's exporter, if they differ


def function_of(site: str) -> str:
    """The function of a call: `matmul_2` is the third call of `matmul`.

    Args:
        site: A call, as in `find_calls`.
    """
    if site in _NODES_OF or site in ONNX_BESIDES:
        return site
    return re.sub(r"_\d+$", "", site)


def find_calls(
    function: str, calls: Sequence[str], nodes: Sequence[ir.Node]
) -> tuple[list[tuple[str, ir.Node]], str]:
    """Find the nodes of the calls of a function.

    Args:
        function: Its name.
        calls: All calls that the module makes, in order ("relu", "add", "add_1").
        nodes: The nodes of the module, in the order of the graph.

    Returns:
        The calls with their nodes, and the reason if there are none.
    """
    kinds = _NODES_OF.get(function, ())
    kinds_text = " or ".join(kinds)
    candidates = [node for node in nodes if is_op(node, *kinds) and not _is_integer(node)]
    operators = [_operator_of(node) for node in candidates]
    if all(operators):
        candidates = _select_by_operator(function, candidates, operators)
    else:
        rivals = _list_rivals(function, calls)
        if rivals:
            names = ", ".join(rivals)
            return [], f"not matched: {names} of the same forward may become {kinds_text} too"

    sites = [site for site in calls if function_of(site) == function]
    if len(candidates) != len(sites):
        return [], (
            f"not matched: {len(candidates)} {kinds_text} in the ONNX file "
            f"for {len(sites)} calls of {function} in its forward"
        )
    if not all(_is_before(first, second) for first, second in pairwise(candidates)):
        return [], (
            f"not matched: the file does not show in which order the {len(candidates)} "
            f"{kinds_text} were called"
        )
    return list(zip(sites, candidates, strict=True)), ""


def _select_by_operator(
    function: str, nodes: Sequence[ir.Node], operators: Sequence[str]
) -> list[ir.Node]:
    """The nodes whose torch operator is that of a function.

    Args:
        function: Its name.
        nodes: The nodes.
        operators: The torch operator of each node.
    """
    operator = _OPERATORS.get(function, re.escape(function))
    pattern = re.compile(rf"aten\.{operator}\.\w+")
    selected = []
    for node, name in zip(nodes, operators, strict=True):
        if pattern.fullmatch(name):
            selected.append(node)
    return selected


def _list_rivals(function: str, calls: Iterable[str]) -> list[str]:
    """The functions among the calls that can become the same kinds of nodes, sorted.

    Args:
        function: The function that is searched for.
        calls: All calls of the module.
    """
    kinds = _NODES_OF.get(function, ())
    rivals = set(map(function_of, calls)) - {function}
    return sorted(rival for rival in rivals if _may_leave(rival, kinds))


def _may_leave(function: str, kinds: Iterable[str]) -> bool:
    """Whether a function can become nodes of these kinds.

    Args:
        function: Its name; a function that is not in the tables may become any node.
        kinds: ONNX operators.
    """
    if function not in _NODES_OF and function not in ONNX_BESIDES:
        return True
    leaves = {*_NODES_OF.get(function, ()), *ONNX_BESIDES.get(function, ())}
    return not leaves.isdisjoint(kinds)


def _operator_of(node: ir.Node) -> str:
    """The operator of torch that a node was made for, such as "aten.add.Tensor".

    "" if the file does not have it, or has something else in its place.
    """
    try:
        hierarchy = ast.literal_eval(node.metadata_props.get(_HIERARCHY, "[]"))
    except METADATA_ERRORS:
        return ""
    if not isinstance(hierarchy, list) or not hierarchy:
        return ""
    return str(hierarchy[-1])


def _is_integer(node: ir.Node) -> bool:
    """Whether a node computes sizes or indices."""
    dtype = node.outputs[0].dtype
    return dtype is not None and dtype.is_integer()


def _is_before(first: ir.Node, second: ir.Node) -> bool:
    """Whether the first node was surely called earlier than the second.

    It was if the numbers of the names show it (`Add`, `Add_1`), or if the second needs the first.
    """
    first_stem, first_number = _split_name(first)
    second_stem, second_number = _split_name(second)
    if first_stem == second_stem and first_number < second_number:
        return True
    return first in _ancestors(second)


def _split_name(node: ir.Node) -> tuple[str, int]:
    """The name of a node without its number, and the number; 0 for a name without one.

    Args:
        node: A node; `Add_1` gives ("Add", 1).
    """
    match = re.fullmatch(r"(.*?)(?:_(\d+))?", node.name or "", re.DOTALL)
    assert match is not None  # noqa: S101  # both parts may be empty
    return match[1], int(match[2] or 0)


def _ancestors(node: ir.Node) -> Iterator[ir.Node]:
    """The nodes that a node needs, directly or through other nodes.

    Args:
        node: A node of the graph.

    Yields:
        Each node once.
    """
    visited: set[ir.Node] = set()
    pending = [node]
    while pending:
        for value in pending.pop().inputs:
            producer = None if value is None else value.producer()
            if producer is not None and producer not in visited:
                visited.add(producer)
                pending.append(producer)
                yield producer

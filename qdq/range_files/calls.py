"""Which node of an ONNX graph is which function call of a torch module, where that is certain.

ONNX takes operators apart: the tanh GELU, `F.linear` with bias, `F.group_norm` and `torch.addcmul` all leave an Add. So
the n-th Add of a module is its n-th `add` only if nothing else can have left one there, none is missing, and the nodes
stand in the order of the calls. Where one of these is in doubt, no node is given: a wrong range is worse than none.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

import onnx_ir as ir

from qdq.functions import FUNCTIONS
from qdq.graph.pairs import is_op

_HIERARCHY = "pkg.torch.onnx.class_hierarchy"  # written by torch.onnx: the classes around a node, then its operator
_NODES_OF = {name: function.onnx for name, function in FUNCTIONS.items() if function.onnx}
# What else those leave, and what others leave that are known not to be taken apart; any other may leave anything.
_LEAVES_ALSO: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        (
            *(
                "abs",
                "chunk",
                "clamp",
                "clone",
                "contiguous",
                "detach",
                "dropout",
                "exp",
                "float",
                "getitem",
            ),
            *(
                "hardtanh",
                "leaky_relu",
                "max_pool1d",
                "max_pool2d",
                "max_pool3d",
                "neg",
                "permute",
                "relu",
                "relu6",
            ),
            *(
                "sigmoid",
                "softmax",
                "split",
                "sqrt",
                "squeeze",
                "tanh",
                "to",
                "transpose",
                "unsqueeze",
            ),
        ),
        (),
    ),
    **dict.fromkeys(("flatten", "reshape", "view", "interpolate"), ("Concat",)),
    **dict.fromkeys(("add", "sub", "isub", "rsub", "imul", "rmul"), ("Mul",)),
    **dict.fromkeys(("linear", "addmm", "baddbmm"), ("Add", "Mul")),
    "einsum": ("Concat", "Gemm", "Mul"),
}
_OPERATORS = {"interpolate": r"upsample_\w+"}  # of torch's exporter, where they have another name


def function_of(site: str) -> str:
    """`matmul_2` is a call of `matmul`, its third."""
    return site if site in _NODES_OF or site in _LEAVES_ALSO else re.sub(r"_\d+$", "", site)


def find_calls(
    function: str, calls: Sequence[str], nodes: Sequence[ir.Node]
) -> tuple[list[tuple[str, ir.Node]], str]:
    """The nodes of the calls of a function.

    Args:
        function: Its name.
        calls: All calls that the module makes, in order ("relu", "add", "add_1").
        nodes: Its nodes, in the order of the graph.

    Returns:
        Calls with their nodes, and why there are none.
    """
    kinds = _NODES_OF.get(function, ())
    sites = [site for site in calls if function_of(site) == function]
    alike = [node for node in nodes if is_op(node, *kinds) and not _is_integer(node)]
    operators = [_operator_of(node) for node in alike]
    if all(operators):
        pattern = _OPERATORS.get(function, re.escape(function))
        alike = [
            n
            for n, name in zip(alike, operators, strict=True)
            if re.fullmatch(rf"aten\.{pattern}\.\w+", name)
        ]
    elif others := sorted(
        {one for one in map(function_of, calls) if one != function and _may_leave(one, kinds)}
    ):
        return (
            [],
            f"not matched: {', '.join(others)} of the same forward may leave {' or '.join(kinds)} too",
        )
    if len(alike) != len(sites):
        found = f"{len(alike)} {' or '.join(kinds)} in the ONNX file"
        return [], f"not matched: {found} for {len(sites)} calls of {function} in its forward"
    if not all(_is_before(*pair) for pair in pairwise(alike)):
        return (
            [],
            f"not matched: nothing says in which order the {len(alike)} {' or '.join(kinds)} were called",
        )
    return list(zip(sites, alike, strict=True)), ""


def _may_leave(function: str, kinds: Iterable[str]) -> bool:
    """Whether a function can leave nodes of these kinds."""
    if function not in _NODES_OF and function not in _LEAVES_ALSO:
        return True
    return not set(kinds).isdisjoint(
        (*_NODES_OF.get(function, ()), *_LEAVES_ALSO.get(function, ()))
    )


def _operator_of(node: ir.Node) -> str:
    """The operator of torch that a node was made for, "aten.add.Tensor"; "" where the file does not say so."""
    try:
        hierarchy = ast.literal_eval(node.metadata_props.get(_HIERARCHY, "[]"))
    except (
        ValueError,
        SyntaxError,
        TypeError,
        MemoryError,
        RecursionError,
    ):  # the metadata of others
        return ""
    return str(hierarchy[-1]) if isinstance(hierarchy, list) and hierarchy else ""


def _is_integer(node: ir.Node) -> bool:
    """Whether a node computes sizes or indices."""
    dtype = node.outputs[0].dtype
    return dtype is not None and dtype.is_integer()


def _is_before(first: ir.Node, second: ir.Node) -> bool:
    """Whether the first was surely called before: their names are numbered so (`Add`, `Add_1`), or it is needed."""
    (stem, number), (other_stem, other_number) = _split_name(first), _split_name(second)
    return (stem == other_stem and number < other_number) or first in _ancestors(second)


def _split_name(node: ir.Node) -> tuple[str, int]:
    match = re.fullmatch(r"(.*?)(?:_(\d+))?", node.name or "", re.DOTALL)
    assert match is not None  # noqa: S101  # both parts may be empty
    return match[1], int(match[2] or 0)


def _ancestors(node: ir.Node) -> Iterator[ir.Node]:
    seen, ahead = set[ir.Node](), [node]
    while ahead:
        for value in ahead.pop().inputs:
            producer = None if value is None else value.producer()
            if producer is not None and producer not in seen:
                seen.add(producer)
                ahead.append(producer)
                yield producer

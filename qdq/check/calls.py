"""Calls of a file's functions: which never end, and how many nodes they become when they are written out."""

from __future__ import annotations

from collections import Counter
from graphlib import CycleError, TopologicalSorter

import onnx_ir as ir

LARGEST_EXPANSION = 1_000_000
"""Nodes that the calls of a file may become; each function that calls another one twice doubles them."""

_Key = tuple[str, str, str]  # domain, name and overload of a function


def list_recursive_functions(model: ir.Model) -> list[str]:
    """Names of the functions from which calls lead back to themselves."""
    calls = _count_calls(model)
    if _sort(calls) is not None:
        return []
    names = []
    for start, callees in calls.items():
        reached, waiting = set(), set(callees)
        while waiting:
            key = waiting.pop()
            reached.add(key)
            waiting |= calls[key].keys() - reached
        if start in reached:
            names.append(start[1])
    return names


def is_expansion_too_large(model: ir.Model) -> bool:
    """Whether the calls of the graph become more than `LARGEST_EXPANSION` nodes; False where a call never ends."""
    calls = _count_calls(model)
    order = _sort(calls)
    if order is None:
        return False
    sizes: dict[_Key, int] = {}
    for key in order:
        nodes = sum(1 for _ in model.functions[key].all_nodes())
        size = 1 + nodes + sum(times * sizes[callee] for callee, times in calls[key].items())
        sizes[key] = min(
            size, LARGEST_EXPANSION + 1
        )  # the true numbers can have thousands of digits
    return (
        sum(sizes.get(node.op_identifier(), 0) for node in model.graph.all_nodes())
        > LARGEST_EXPANSION
    )


def _count_calls(model: ir.Model) -> dict[_Key, Counter[_Key]]:
    """For each function, how often it calls which other one."""
    calls = {}
    for key, function in model.functions.items():
        operators = (node.op_identifier() for node in function.all_nodes())
        calls[key] = Counter(operator for operator in operators if operator in model.functions)
    return calls


def _sort(calls: dict[_Key, Counter[_Key]]) -> list[_Key] | None:
    """Every function behind those that it calls; None where one calls itself."""
    try:
        return list(TopologicalSorter(calls).static_order())
    except CycleError:
        return None

"""Calls of a file's functions: whether they end, and how many nodes they become when they are expanded."""

from __future__ import annotations

from collections import Counter
from graphlib import CycleError, TopologicalSorter

import onnx_ir as ir

LARGEST_EXPANSION = 1_000_000
"""Largest number of nodes after expanding all calls; each function that calls another one twice doubles it."""

_Key = tuple[str, str, str]  # domain, name and overload of a function
_Calls = dict[_Key, Counter[_Key]]  # for each function, how often it calls which function


def list_recursive_functions(model: ir.Model) -> list[str]:
    """Find the functions from which calls lead back to themselves.

    Args:
        model: Its functions are looked at, whether or not the graph calls them.

    Returns:
        Their names.
    """
    calls = _count_calls(model)
    if _sort_functions(calls) is not None:
        return []
    return [key[1] for key in calls if key in _reachable_functions(calls, key)]


def _reachable_functions(calls: _Calls, start: _Key) -> set[_Key]:
    """The functions that a function calls, directly or through other functions."""
    reachable: set[_Key] = set()
    waiting = set(calls[start])
    while waiting:
        key = waiting.pop()
        reachable.add(key)
        waiting |= calls[key].keys() - reachable
    return reachable


def is_expansion_too_large(model: ir.Model) -> bool:
    """Whether the calls of the graph become more than `LARGEST_EXPANSION` nodes when they are expanded.

    Args:
        model: The calls are only counted, not expanded.

    Returns:
        True if they do; False also if a call never ends, see `list_recursive_functions`.
    """
    calls = _count_calls(model)
    order = _sort_functions(calls)
    if order is None:
        return False

    sizes: Counter[_Key] = Counter()
    for key in order:
        size = 1 + len(list(model.functions[key].all_nodes()))
        for callee, times in calls[key].items():
            size += times * sizes[callee]
        # The exact numbers can have thousands of digits.
        sizes[key] = min(size, LARGEST_EXPANSION + 1)

    total = 0
    for node in model.graph.all_nodes():
        total += sizes[node.op_identifier()]
    return total > LARGEST_EXPANSION


def _count_calls(model: ir.Model) -> _Calls:
    """For each function, how often it calls which function."""
    calls = {}
    for key, function in model.functions.items():
        operators = Counter(node.op_identifier() for node in function.all_nodes())
        callees = operators.keys() & model.functions.keys()
        calls[key] = Counter({callee: operators[callee] for callee in callees})
    return calls


def _sort_functions(calls: _Calls) -> list[_Key] | None:
    """Every function after those that it calls; None if a function calls itself."""
    try:
        return list(TopologicalSorter(calls).static_order())
    except CycleError:
        return None

"""Whether a Sequential runs its children in order and does nothing else with them: then one can be put between two."""

from __future__ import annotations

import ast
import inspect
import textwrap
from typing import Any

from torch import nn


def runs_children_in_order(container: nn.Sequential) -> bool:
    """Whether a forward runs every child, also one that is put between two others, on the output of the one before.

    A forward of a subclass does if it calls that of its base class, or if its loops over itself do only `x = child(x)`.
    It must not use its children in any other way: by name or number, by their count, or in another method.

    Args:
        container: A Sequential or an object of a subclass.
    """
    kind = type(container)
    is_changed = (
        kind.__iter__ is not nn.Sequential.__iter__ or kind.__call__ is not nn.Module.__call__
    )
    if is_changed or "forward" in vars(container):
        return False
    for base in kind.__mro__:
        if base is nn.Sequential:
            return True
        if "forward" not in vars(base):
            continue
        forward = _Forward.read(vars(base)["forward"], container)
        if forward is None or not forward.uses_children_in_order():
            return False
        if not forward.calls_base:
            return True
    return False


class _Forward:
    """The source of a forward.

    Args:
        function: Its definition.
        container: The object that it belongs to.

    Attributes:
        calls_base: Whether it calls `super().forward`.
    """

    def __init__(self, function: ast.FunctionDef, container: nn.Sequential) -> None:
        self._nodes = list(ast.walk(function))
        self._self = function.args.args[0].arg
        self._container = container
        self._loops = [node for node in self._nodes if self._is_loop(node)]
        self.calls_base = any(_is_base_call(node) for node in self._nodes)

    @classmethod
    def read(cls, forward: Any, container: nn.Sequential) -> _Forward | None:
        """The forward of a class; None if its source is unknown, or does not say everything."""
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
        except (OSError, TypeError, SyntaxError):
            return None
        function = tree.body[0]
        is_plain = isinstance(function, ast.FunctionDef) and not function.decorator_list
        if not is_plain or hasattr(forward, "__wrapped__"):
            return None
        assert isinstance(function, ast.FunctionDef)  # noqa: S101  # is_plain
        return cls(function, container) if function.args.args else None

    def uses_children_in_order(self) -> bool:
        """Whether it runs all children, and touches them nowhere else."""
        if not self._loops and not self.calls_base:
            return False
        allowed = {id(loop.iter) for loop in self._loops if isinstance(loop, ast.For)}
        for node in self._nodes:
            if isinstance(node, ast.Attribute) and self._is_own_state(node):
                allowed.add(id(node.value))
        uses = [node for node in self._nodes if self._is_self(node)]
        return all(id(node) in allowed for node in uses) and self._has_plain_supers()

    def _is_self(self, node: ast.AST) -> bool:
        return isinstance(node, ast.Name) and node.id == self._self

    def _is_loop(self, node: ast.AST) -> bool:
        """Whether code is `for child in self: x = child(x)`."""
        if not isinstance(node, ast.For) or not self._is_self(node.iter) or node.orelse:
            return False
        if len(node.body) != 1 or not isinstance(node.target, ast.Name):
            return False
        statement = ast.unparse(node.body[0])
        name, _, _ = statement.partition(" = ")
        is_other = name.isidentifier() and name != node.target.id
        return is_other and statement == f"{name} = {node.target.id}({name})"

    def _is_own_state(self, node: ast.Attribute) -> bool:
        """Whether code reads `self.k` for a value that is no child, no method and no property."""
        if not self._is_self(node.value):
            return False
        if node.attr == "training":
            return True
        is_child = node.attr in self._container._modules
        of_class = inspect.getattr_static(type(self._container), node.attr, None)
        value = vars(self._container).get(node.attr)
        does_more = callable(of_class) or hasattr(of_class, "__get__") or callable(value)
        is_inner = node.attr.startswith("_") and node.attr in vars(nn.Module())
        return not (is_child or does_more or is_inner)

    def _has_plain_supers(self) -> bool:
        """Whether every `super()` is that of `super().forward(...)`."""
        num_supers = sum(isinstance(node, ast.Name) and node.id == "super" for node in self._nodes)
        return num_supers == sum(_is_base_call(node) for node in self._nodes)


def _is_base_call(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func) == "super().forward"

"""Rules, their results, and the table of all rules."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from qdq.check.rules.view import GraphView
from qdq.errors import ArgumentError

Severity = Literal["error", "warning", "info"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")


@dataclass(frozen=True)
class Finding:
    """One violation.

    Args:
        rule: Id of the rule, e.g. "QDQ103".
        node: Name of the ONNX node.
        message: What was found.
        fix: What to do.
        severity: "error": wrong numbers, no engine or a float layer; "warning": slow; "info": worth knowing.
    """

    rule: str
    node: str
    message: str
    fix: str
    severity: Severity = "error"


class Flaw(NamedTuple):
    """One result of a rule; the registry adds the rule's id and severity.

    Args:
        node: Name of the ONNX node.
        message: What was found.
        fix: What to do, a sentence.
        severity: Of this flaw; None for the severity of the rule.
    """

    node: str
    message: str
    fix: str
    severity: Severity | None = None


Find = Callable[[GraphView], Iterable[Flaw]]


@dataclass(frozen=True)
class Rule:
    """One rule of the linter.

    Args:
        id: "QDQ101" ...
        severity: Of its findings.
        title: The fault that it looks for.
        why: The consequence of the fault.
        evidence: The source of that statement.
        find: Yields the flaws of a graph.
    """

    id: str
    severity: Severity
    title: str
    why: str
    evidence: str
    find: Find

    def explain(self) -> str:
        """A few lines for a person."""
        return f"{self.id} ({self.severity}): {self.title}\n\n  Why:      {self.why}\n  Evidence: {self.evidence}"


RULES: dict[str, Rule] = {}
"""Every rule by its id."""


def register_rule(
    id: str, severity: Severity, title: str, why: str, evidence: str
) -> Callable[[Find], Find]:
    """Add a rule to `check_onnx` and `qdq check`; the decorated function yields a `Flaw` for each violation.

    Args:
        id: Capital letters and three digits or more, e.g. "MINE101".
        severity: "error", "warning" or "info".
        title: The fault that the rule looks for.
        why: The consequence of the fault.
        evidence: The source of that statement.

    Raises:
        ArgumentError: The id has another form or is taken, or the severity is unknown.
    """
    if not re.fullmatch(r"[A-Z]+\d{3,}", id):
        raise ArgumentError(
            f"{id!r} is not a rule id; expected capital letters and digits.",
            "choose one like MINE101.",
        )
    if id in RULES:
        raise ArgumentError(
            f"there is a rule {id} already: {RULES[id].title}.",
            "choose another id.",
        )
    if severity not in SEVERITIES:
        raise ArgumentError(
            f"severity is {severity!r}; expected one of {', '.join(SEVERITIES)}.",
            "use 'warning'.",
        )

    def register(find: Find) -> Find:
        RULES[id] = Rule(id, severity, title, why, evidence, find)
        return find

    return register


def get_rule(id: str) -> Rule:
    """The rule of that id, in upper or lower case.

    Raises:
        ArgumentError: There is none.
    """
    normalized = id.strip().upper()
    rule = RULES.get(normalized)
    if rule is not None:
        return rule

    similar = difflib.get_close_matches(normalized, RULES, n=1, cutoff=0.5)
    hint = f"did you mean {similar[0]}?" if similar else "docs/rules.md lists all of them."
    raise ArgumentError(f"there is no rule {id!r}; the ids are {min(RULES)} to {max(RULES)}.", hint)


def choose_rules(select: Iterable[str] = (), ignore: Iterable[str] = ()) -> list[Rule]:
    """The rules to apply, in the order of their ids.

    Args:
        select: Ids of the only rules to apply; all if empty.
        ignore: Ids of rules to leave out.

    Raises:
        ArgumentError: An id that no rule has.
    """
    selected = {get_rule(id).id for id in select}
    ignored = {get_rule(id).id for id in ignore}
    ids = selected if selected else set(RULES)
    return [RULES[id] for id in sorted(ids - ignored)]

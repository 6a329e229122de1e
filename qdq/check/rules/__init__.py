"""What every Q/DQ of a graph must fulfil before TensorRT sees it; one file a family.

Ids are those of the lint table: L01 is QDQ101.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from qdq.check.facts import FileFacts
from qdq.check.rules import attention, history, layers, numerics, pairs, placement, sharing, types  # noqa: F401
from qdq.check.rules.file import FILE_RULES as FILE_RULES
from qdq.check.rules.history import UNCALIBRATED as UNCALIBRATED
from qdq.check.rules.registry import RULES as RULES
from qdq.check.rules.registry import SEVERITIES as SEVERITIES
from qdq.check.rules.registry import Finding as Finding
from qdq.check.rules.registry import Flaw as Flaw
from qdq.check.rules.registry import Rule as Rule
from qdq.check.rules.registry import Severity as Severity
from qdq.check.rules.registry import choose_rules as choose_rules
from qdq.check.rules.registry import get_rule as get_rule
from qdq.check.rules.registry import register_rule as register_rule
from qdq.check.rules.view import GraphView as GraphView


def find_violations(
    model: ir.Model, rules: Iterable[Rule] | None = None, file: FileFacts | None = None
) -> list[Finding]:
    """All violations of a model, by rule and in graph order.

    A rule that fails on the graph says so as a finding of its own: a linter goes on.

    Args:
        model: Not changed. Rules that need shapes say nothing where it has none.
        rules: Those to apply, all if None.
        file: What is known of the file; rules about files say nothing without it.
    """
    view = GraphView(model, file)
    findings = []
    for rule in choose_rules() if rules is None else rules:
        try:
            for flaw in rule.find(view):
                findings.append(
                    Finding(
                        rule.id, flaw.node, flaw.message, flaw.fix, flaw.severity or rule.severity
                    )
                )
        except (
            Exception
        ) as error:  # whatever a damaged graph makes of a rule, or of one that a user registered
            message = f"this rule cannot be applied to the graph ({type(error).__name__}: {error})"
            fix = "mend what the other rules name; if it stays, report it with the file."
            findings.append(Finding(rule.id, model.graph.name or "graph", message, fix, "warning"))
    return findings

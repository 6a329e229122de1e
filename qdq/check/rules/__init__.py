"""What every Q/DQ of a graph must fulfil before TensorRT sees it; one file a family.

Ids are those of the lint table: L01 is QDQ101.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from qdq.check.rules import attention, history, layers, numerics, pairs, placement, sharing, types  # noqa: F401
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


def find_violations(model: ir.Model, rules: Iterable[Rule] | None = None) -> list[Finding]:
    """All violations of a model, by rule and in graph order.

    Args:
        model: Not changed. Rules that need shapes say nothing where it has none.
        rules: Those to apply, all if None.
    """
    view = GraphView(model)
    return [
        Finding(rule.id, flaw.node, flaw.message, flaw.fix, flaw.severity or rule.severity)
        for rule in (choose_rules() if rules is None else rules)
        for flaw in rule.find(view)
    ]

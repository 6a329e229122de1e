"""Findings as SARIF 2.1.0, for code hosts and editors."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import quote

import qdq
from qdq.check.rules import RULES, Finding, Rule

_LEVELS = {"error": "error", "warning": "warning", "info": "note"}
_SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"


def format_sarif(path: Path, findings: tuple[Finding, ...]) -> dict[str, Any]:
    """The log of one run over one file, as plain data.

    Args:
        path: The file that was checked.
        findings: What was found.
    """
    ids = sorted(RULES)
    uri = quote(path.as_posix())
    driver = {
        "name": "qdq",
        "version": qdq.__version__,
        "rules": [_format_rule(RULES[id]) for id in ids],
    }
    run = {
        "tool": {"driver": driver},
        "artifacts": [{"location": {"uri": uri}}],
        "results": [_format_result(finding, ids.index(finding.rule), uri) for finding in findings],
    }
    return {"$schema": _SCHEMA, "version": "2.1.0", "runs": [run]}


def _format_rule(rule: Rule) -> dict[str, Any]:
    return {
        "id": rule.id,
        "shortDescription": {"text": rule.title},
        "fullDescription": {"text": rule.why},
        "help": {"text": f"{rule.why} Evidence: {rule.evidence}."},
        "defaultConfiguration": {"level": _LEVELS[rule.severity]},
    }


def _format_result(finding: Finding, rule_index: int, uri: str) -> dict[str, Any]:
    return {
        "ruleId": finding.rule,
        "ruleIndex": rule_index,
        "level": _LEVELS[finding.severity],
        "message": {"text": f"{finding.node}: {finding.message}. Fix: {finding.fix}"},
        "locations": [
            {
                "physicalLocation": {"artifactLocation": {"uri": uri, "index": 0}},
                "logicalLocations": [{"name": finding.node, "kind": "element"}],
            }
        ],
    }

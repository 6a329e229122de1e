"""The pages of rules say what the rules say."""

import re
from pathlib import Path

import pytest

from qdq.check.rules import RULES

DOCS = Path(__file__).parents[2] / "docs"
SECTIONS = {
    match[1]: " ".join(match[2].split())
    for page in DOCS.glob("rules-*.md")
    for match in re.finditer(
        r"^## (QDQ\d+)\n(.*?)(?=^## |\Z)", page.read_text(), re.MULTILINE | re.DOTALL
    )
}


def test_every_rule_has_a_section():
    assert set(SECTIONS) == set(RULES)


@pytest.mark.parametrize("id", sorted(RULES))
def test_section_says_what_the_rule_says(id):
    rule, text = RULES[id], SECTIONS[id]
    assert f"**{rule.severity}.** {rule.title}" in text
    assert rule.why in text
    assert rule.evidence in text
    assert "- Fix: " in text and "```text" in text


def test_index_names_page_and_severity():
    index = (DOCS / "rules.md").read_text()
    for id, rule in RULES.items():
        (row,) = re.findall(
            rf"^\| {id} \| (\w+) \| (.*) \| \[\w+\]\((.*)#(\w+)\) \|$", index, re.MULTILINE
        )
        assert (row[0], row[1], row[3]) == (rule.severity, rule.title.rstrip("."), id.lower())
        assert f"## {id}\n" in (DOCS / row[2]).read_text()

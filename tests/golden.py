"""Golden values of public implementations, see tests/data/golden."""

import json
from pathlib import Path

FOLDER = Path(__file__).parent / "data" / "golden"


def read_golden(name):
    """A file: its cases, and what they share."""
    return json.loads((FOLDER / f"{name}.json").read_text())


def read_cases(name):
    """The cases of a file."""
    return read_golden(name)["cases"]

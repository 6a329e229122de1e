"""Golden values of public implementations, see tests/data/golden."""

import json
from pathlib import Path

FOLDER = Path(__file__).parent / "data" / "golden"


def read_cases(name):
    """The cases of a file."""
    return json.loads((FOLDER / f"{name}.json").read_text())["cases"]

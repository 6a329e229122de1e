"""Run verify.sh of a bundle with a stand-in for every trtexec: clean, and with each fault that the tests know.

python tools/verify_bundles.py                      # a small network, about 8 minutes
python tools/verify_bundles.py --clean 4 --json bundles.json
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "bundle"))

from small_bundle import (  # type: ignore[import-not-found]  # a module of the tests
    FAULTS,
    VERSIONS,
    damage,
    is_named,
    make_run,
    read_checks,
    verify,
    write_tools,
    write_trtexec,
)
from tqdm import tqdm

from qdq.bundle import make_bundle


def main() -> int:
    """Print what passed, what was caught and named, and every false alarm."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clean", type=int, default=4, help="seeds of clean runs a version")
    parser.add_argument("--versions", nargs="*", default=list(VERSIONS))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="bundles of qdq ") as folder:
        rows = _run_all(Path(folder), arguments.versions, arguments.clean)
    for version in arguments.versions:
        print(
            f"TensorRT {version}: {_summarize([row for row in rows if row['version'] == version])}"
        )
    wrong = [row for row in rows if not row["is_right"]]
    for row in wrong:
        print(f"WRONG {row}")
    print(f"{len(rows)} runs, {len(wrong)} wrong, {time.perf_counter() - began:.0f} s")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 1 if wrong else 0


def _run_all(folder: Path, versions: list[str], clean: int) -> list[dict[str, Any]]:
    (folder / "run").mkdir()
    (folder / "tools").mkdir()
    made = make_bundle(make_run(folder / "run"), folder / "made", count=2, with_float=True).folder
    tools = write_tools(folder / "tools")
    rows = []
    for version in versions:
        trtexec = write_trtexec(folder, version)
        for seed in tqdm(range(clean), desc=f"{version} clean", disable=None):
            shell = ("dash", "bash")[seed % 2]
            code = verify(_copy(made), trtexec, shell=shell, seed=seed).returncode
            rows.append(_describe(version, f"clean {shell} {seed}", code, code == 0))
        bundle = _copy(made)
        code = verify(bundle, trtexec, path=tools).returncode
        skipped = []
        for name, (status, _) in read_checks(bundle).items():
            if status == "not checked":
                skipped.append(name)
        case = f"no python, not checked: {', '.join(skipped)}"
        rows.append(_describe(version, case, code, code == 0))
        for name, fault in tqdm(FAULTS.items(), desc=f"{version} faults", disable=None):
            bundle = _copy(made)
            if fault.file:
                damage(bundle, name)
            code = verify(bundle, trtexec, fault="" if fault.file else name).returncode
            rows.append(_describe(version, name, code, code == 1 and is_named(bundle, name)))
    return rows


def _copy(bundle: Path) -> Path:
    copy = bundle.with_name("a copy")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(bundle, copy)
    return copy


def _describe(version: str, case: str, code: int, is_right: bool) -> dict[str, Any]:
    return {"version": version, "case": case, "exit": code, "is_right": is_right}


def _summarize(rows: list[dict[str, Any]]) -> str:
    faults = [row for row in rows if row["case"] in FAULTS]
    clean = [row for row in rows if row["case"] not in FAULTS]
    caught = sum(row["is_right"] for row in faults)
    alarms = sum(not row["is_right"] for row in clean)
    return f"{caught} of {len(faults)} faults caught and named, {alarms} false alarms in {len(clean)} clean runs"


if __name__ == "__main__":
    sys.exit(main())

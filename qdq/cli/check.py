"""`qdq check`: the linter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

_RuleIds = Annotated[tuple[str, ...], Parameter(consume_multiple=False)]


def check(
    onnx: Path | None = None,
    /,
    *,
    select: _RuleIds = (),
    ignore: _RuleIds = (),
    sm: int | None = None,
    explain: str | None = None,
    fix: Path | None = None,
    gpu: str | None = None,
    json: Path | None = None,
    sarif: Path | None = None,
) -> int:
    """Check that a QDQ ONNX file is valid and that TensorRT can use its Q/DQ. Needs no torch.

    Prints what the file contains and which tools accept it, then each broken rule (QDQ101 ...) with the node and the
    fix. A file without Q/DQ may be valid; the report then says that nothing is quantized. The exit code is 1 for errors
    and warnings, and 2 when the file cannot be read as ONNX; infos do not count.

    For example:

        qdq check runs/ptq/model.onnx --ignore QDQ114,QDQ121 --sarif check.sarif
        qdq check model.onnx --fix fixed.onnx
        qdq check model.onnx --gpu l4
        qdq check --explain QDQ112

    Args:
        onnx: The ONNX file.
        select: Apply only these rules: ids, separated by commas, or one flag per id.
        ignore: Skip these rules, written the same way.
        sm: Compute capability of the GPU that the file is for; 89 is 8.9. By default that of --gpu.
            Types that the GPU does not have are errors.
        explain: Print what a rule looks for, why, and the evidence for it.
        fix: Write a copy to this file with all flaws fixed that can be fixed without changing a number, and check the
            copy. The file itself may be named; it stays untouched when there is nothing to fix.
        gpu: Also predict whether int8 or FP8 pays on this GPU: a10, a100, h100, l4, l40s, orin, orinnano, rtx3090,
            rtx4090, rtxpro6000 or t4.
        json: Also write the report to this file.
        sarif: Also write the findings to this file, as SARIF 2.1.0.
    """
    from qdq.errors import ArgumentError

    if explain is not None:
        if fix or json or sarif:
            raise ArgumentError(
                "--explain only prints and writes no file.", "leave out --fix, --json and --sarif."
            )
        return _explain_rule(explain)
    if onnx is None:
        raise ArgumentError("ONNX requires an argument.", "see qdq check --help")
    return _check_file(onnx, _split_ids(select), _split_ids(ignore), sm, fix, gpu, json, sarif)


def _explain_rule(rule: str) -> int:
    from qdq.check.rules import get_rule

    print(get_rule(rule).explain())
    return 0


def _split_ids(arguments: tuple[str, ...]) -> list[str]:
    """The ids of rules in arguments such as `QDQ101,QDQ102`."""
    ids: list[str] = []
    for argument in arguments:
        ids += [id for id in argument.split(",") if id.strip()]
    return ids


def _check_file(
    onnx: Path,
    select: list[str],
    ignore: list[str],
    sm: int | None,
    fix: Path | None,
    gpu: str | None,
    json: Path | None,
    sarif: Path | None,
) -> int:
    from qdq.graph.validate import start_helper

    start_helper()  # it loads its libraries while this process loads its own

    from qdq.check import check_onnx
    from qdq.check.rules import choose_rules
    from qdq.check.sarif import format_sarif
    from qdq.files import write_json
    from qdq.graph.tensors import list_data_files
    from qdq.roofline import choose_sm
    from qdq.run import guard_command
    from qdq.text import make_printable

    choose_rules(select, ignore)  # refuses unknown rules before anything is written
    choose_sm(gpu, sm)  # refuses a contradiction before anything is written
    guard_command(
        inputs=[onnx, *list_data_files(onnx)], outputs=[fix, json, sarif], in_place=[(fix, onnx)]
    )
    checked = onnx
    if fix is not None:
        _mend(onnx, fix)
        checked = fix
    report = check_onnx(checked, gpu=gpu, sm=sm, select=select, ignore=ignore)
    print(make_printable(report).format_table())
    if gpu is not None and report.payoff is None:
        print(
            f"no times are predicted for {gpu}: the file has no Q/DQ, is damaged, does not show its sizes, or "
            "has types that this GPU lacks"
        )
    if json is not None:
        write_json(json, report)
    if sarif is not None:
        write_json(sarif, format_sarif(report.path, report.findings))
    return 1 if report.problems else 0


def _mend(onnx: Path, copy: Path) -> None:
    """Write the fixed copy, and print what was fixed.

    Raises:
        ArgumentError: The copy would go into a device, and could not be checked there.
    """
    from qdq.check.fix import fix_onnx
    from qdq.errors import ArgumentError
    from qdq.files import is_replaceable
    from qdq.text import printable

    if not is_replaceable(copy):
        raise ArgumentError(
            f"{printable(copy)} is not a regular file, so the copy could not be checked.",
            "choose another file to write.",
        )
    num_mended = fix_onnx(onnx, copy)
    mended = ", ".join(f"{count} nodes of {rule}" for rule, count in num_mended.items())
    print(f"{printable(copy)}: {mended or 'nothing'} fixed")

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
    explain: str | None = None,
    fix: Path | None = None,
    json: Path | None = None,
    sarif: Path | None = None,
) -> int:
    """Is a QDQ ONNX file valid, and its Q/DQ as TensorRT wants it? Needs no torch.

    Prints what the file holds and who accepts it, then each broken rule (QDQ101 ...) with the node and the fix. A file
    without Q/DQ may be valid; that nothing in it is quantized is said. Exit code 1 when there are errors or warnings, 2
    when the file cannot be read as ONNX; infos do not count.

    Such as:

        qdq check runs/ptq/model.onnx --ignore QDQ114,QDQ121 --sarif check.sarif
        qdq check model.onnx --fix mended.onnx
        qdq check --explain QDQ112

    Args:
        onnx: The ONNX file.
        select: Apply only these rules: ids, with commas or one by one.
        ignore: Leave these rules out, likewise.
        explain: Print what a rule looks for, why, and how that is known.
        fix: Write a copy to this file in which what can be mended with every number kept is mended, and check that
            copy. May be the file itself, which stays untouched where there is nothing to mend.
        json: Also write the report to this file.
        sarif: Also write the findings to this file, as SARIF 2.1.0.
    """
    from qdq.graph.validate import start_helper

    if onnx is not None and explain is None:
        start_helper()  # it loads its libraries while this process loads its own

    from qdq.check import check_onnx
    from qdq.check.fix import fix_onnx
    from qdq.check.rules import choose_rules, get_rule
    from qdq.check.sarif import format_sarif
    from qdq.errors import ArgumentError
    from qdq.files import is_replaceable, write_json
    from qdq.graph.tensors import list_data_files
    from qdq.run import guard_command
    from qdq.text import make_printable, printable

    if explain is not None:
        if fix or json or sarif:
            raise ArgumentError(
                "--explain prints, and writes no file.", "leave out --fix, --json and --sarif."
            )
        print(get_rule(explain).explain())
        return 0
    if onnx is None:
        raise ArgumentError("ONNX requires an argument.", "see qdq check --help")
    selected, ignored = _split(select), _split(ignore)
    choose_rules(selected, ignored)  # before anything is written
    guard_command(
        inputs=[onnx, *list_data_files(onnx)], outputs=[fix, json, sarif], in_place=[(fix, onnx)]
    )
    if fix is not None:
        if not is_replaceable(fix):
            raise ArgumentError(
                f"{printable(fix)} is no regular file, and the copy is checked there.",
                "choose another file to write.",
            )
        mended = fix_onnx(onnx, fix)
        print(
            f"{printable(fix)}: "
            + (", ".join(f"{n} nodes of {rule}" for rule, n in mended.items()) or "nothing")
            + " mended"
        )
    report = check_onnx(onnx if fix is None else fix, select=selected, ignore=ignored)
    print(make_printable(report).format_table())
    if json is not None:
        write_json(json, report)
    if sarif is not None:
        write_json(sarif, format_sarif(report.path, report.findings))
    return 1 if report.problems else 0


def _split(ids: tuple[str, ...]) -> list[str]:
    return [id for text in ids for id in text.split(",") if id.strip()]

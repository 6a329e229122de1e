"""`qdq explain`: why one layer runs in int8, FP8 or float."""

from __future__ import annotations

from pathlib import Path


def explain(run: Path, layer: str, /, *, json: Path | None = None) -> int:
    """Show why a layer runs in int8, FP8 or float, with its ranges, errors, kernel and neighbours. Needs no torch.

    For example:

        qdq explain runs/ptq _conv_stem

    Args:
        run: The folder of a run.
        layer: Dotted name of a layer or of a function call, as in report.html.
        json: Also write the record to this file.
    """
    from qdq.files import write_json
    from qdq.report.explain import explain_layer
    from qdq.run import guard_command, list_run_files

    guard_command(inputs=list_run_files(run), outputs=[json])
    explanation = explain_layer(run, layer)
    print(explanation.text)
    if json is not None:
        write_json(json, {"layer": explanation.layer, "neighbours": explanation.neighbours})
    return 0

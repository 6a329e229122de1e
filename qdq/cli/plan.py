"""`qdq plan`: what runs in int8, FP8 and float."""

from __future__ import annotations

from pathlib import Path

import cyclopts

plan = cyclopts.App(
    name="plan", help="Plans: which layer runs in int8, FP8 or float (plan.yaml of a run)."
)


@plan.command
def diff(first: Path, second: Path, /) -> int:
    """List the layers that differ between two plans. The exit code is 1 if there are any. Needs no torch.

    For example:

        qdq plan diff runs/a/plan.yaml runs/b/plan.yaml

    Args:
        first: The first plan.
        second: The second plan.
    """
    from qdq.plan import diff_plans, load_plan
    from qdq.run import guard_command
    from qdq.text import printable

    guard_command(inputs=[first, second])
    changes = diff_plans(load_plan(first), load_plan(second))
    names = [printable(change.name) for change in changes]
    width = max(map(len, names), default=0)
    for name, change in zip(names, changes, strict=True):
        print(f"{name:{width}}  {change.before or 'not named'} -> {change.after or 'not named'}")
    print(f"{len(changes)} layers differ")
    return 1 if changes else 0

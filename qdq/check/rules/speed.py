"""A file that is no faster than its float network: QDQ150."""

from __future__ import annotations

from collections.abc import Iterator

from qdq.check.payoff import Payoff
from qdq.check.rules.registry import Flaw, register_rule
from qdq.check.rules.view import GraphView

_SHOWN_LOSSES = 2


@register_rule(
    "QDQ150",
    "warning",
    "On the chosen GPU, int8 is expected to be no faster than the same network in fp16.",
    "int8 costs accuracy and pays with time. Kernels that only convert, a float part in fp32, attention in several "
    "kernels and layers too small for the GPU take back what the int8 products win.",
    "predicted by check_onnx where a GPU is given, from data sheets; docs/check.md compares it with published times",
)
def _int8_does_not_pay(view: GraphView) -> Iterator[Flaw]:
    """Name the graph, if a GPU was given."""
    payoff = view.payoff
    if payoff is None or payoff.pays:
        return
    yield Flaw(
        node=view.model.graph.name or "graph",
        message=f"on {payoff.gpu} it is expected to be {payoff.ratio:.2f} times as fast as fp16"
        f"{_describe_losses(payoff)}",
        fix=_choose_fix(payoff),
    )


def _describe_losses(payoff: Payoff) -> str:
    """Where the time goes, as the end of a sentence; empty if nothing stands out."""
    causes = [
        f"{loss.microseconds / payoff.int8:.0%} of its time is {loss.cause}"
        for loss in payoff.losses[:_SHOWN_LOSSES]
    ]
    return f"; {', '.join(causes)}" if causes else ""


def _choose_fix(payoff: Payoff) -> str:
    """What to do about the largest losses."""
    fixes = [loss.fix.rstrip(".") for loss in payoff.losses[:_SHOWN_LOSSES]]
    if not fixes:
        return "stay in fp16 on this GPU."
    return f"{'; '.join(fixes)}."

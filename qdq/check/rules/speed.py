"""A file that is hardly faster than its float network, or slower: QDQ150."""

from __future__ import annotations

from collections.abc import Iterator

from qdq.check.payoff import WORTHWHILE_RATIO, Payoff
from qdq.check.rules.registry import Flaw, register_rule
from qdq.check.rules.view import GraphView

_SHOWN_LOSSES = 2


@register_rule(
    "QDQ150",
    "warning",
    f"On the chosen GPU, the file is expected to be less than {WORTHWHILE_RATIO} times as fast as the same network in "
    "fp16.",
    "int8 and FP8 cost accuracy and pay with time. Kernels that only convert, a float part in fp32, attention in "
    "several kernels and layers too small for the GPU take back what the quantized products win.",
    "predicted by check_onnx where a GPU is given, from data sheets; docs/check.md compares it with published times",
)
def _quantization_does_not_pay(view: GraphView) -> Iterator[Flaw]:
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

import pytest
from graph_text import apply, ops, read

from qdq.graph.remove_identities import RemoveIdentities


@pytest.mark.parametrize(
    ("body", "expected_ops"),
    [
        (
            "a = Neg (x) b = Identity (a) c = Identity (b) y = Neg (c) z = Abs (b)",
            ["Neg", "Neg", "Abs"],
        ),
        ("a = Neg (x) y = Identity (a) z = Abs (a)", ["Neg", "Abs"]),
        ("y = Neg (x) z = Identity (y)", ["Neg", "Identity"]),  # two outputs of one value
        ("y = Identity (x) z = Neg (x)", ["Identity", "Neg"]),  # the input is the output
        ("a = Identity (w) y = Add (a, x) z = Identity (w)", ["Add", "Identity"]),
    ],
)
def test_identities(body, expected_ops):
    model = apply(
        read(f"g (float[3] x) => (y, z) <float[3] w = {{1, 2, 3}}> {{ {body} }}"),
        RemoveIdentities(),
    )
    assert ops(model) == expected_ops
    assert [value.name for value in model.graph.outputs] == ["y", "z"]

import pytest
from graph_text import apply, read

from qdq.graph.lower_einsum import LowerEinsum

GRAPH = 'g (float[2,3] x, float[3,4] z) => (y) {{ y = Einsum <equation = "{}"> (x, z) }}'


@pytest.mark.parametrize(
    ("equation", "expected"),
    [
        ("I J, J K -> I K", "ij,jk->ik"),
        ("iI,IJ->Ji", "ia,aj->ji"),  # i is taken
        ("ij,jk->ki", "ij,jk->ki"),
    ],
)
def test_equations(equation, expected):
    model = apply(read(GRAPH.format(equation)), LowerEinsum())
    assert next(iter(model.graph)).attributes["equation"].as_string() == expected


def test_without_an_arrow_the_order_of_the_letters_counts():
    assert not LowerEinsum()(read(GRAPH.format("Ab,bC"))).modified

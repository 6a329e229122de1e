"""Words and order of the types of products."""

import pytest

from qdq.product_types import list_low_types, word_of


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("Int8", "int8"),
        ("FP8", "FP8"),
        ("Int4 weights", "int4 weights"),
        ("FP8 weights", "FP8 weights"),
        ("Int16", "int16"),
        ("Half", "float"),
        ("", "float"),
    ],
)
def test_words(name, word):
    assert word_of(name) == word


@pytest.mark.parametrize(
    ("names", "low_types"),
    [
        ([], ["Int8"]),
        (["Float", "", "Int8 weights"], ["Int8"]),
        (["FP8", "Half", "Int8", "FP8"], ["Int8", "FP8"]),
        (["Int4 weights", "FP4"], ["FP4", "Int4 weights"]),
        (["Int16", "Half"], ["Int16"]),
    ],
)
def test_low_types_in_order(names, low_types):
    assert list_low_types(names) == low_types

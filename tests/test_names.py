"""Names as messages and tables have them."""

from qdq.names import group_names, list_names


def test_groups_and_names_keep_their_order():
    groups = group_names([(("b", 1), "z"), (("a", 2), "y"), (("b", 1), "a"), (("b", 1), "z")])
    assert list(groups.items()) == [(("b", 1), ["z", "a", "z"]), (("a", 2), ["y"])]
    assert group_names([]) == {}


def test_of_many_names_the_first():
    assert list_names([], 2) == ""
    assert list_names(["a", "b"], 2) == "a, b"
    assert list_names(["a", "b", "c", "d", "e"], 2) == "a, b and 3 more"

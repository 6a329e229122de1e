"""The tree of errors: what scripts may catch, and what each error says."""

import inspect
import re

import pytest

from qdq import errors
from qdq.errors import QdqError, is_out_of_memory

CLASSES = [
    value
    for _, value in inspect.getmembers(errors, inspect.isclass)
    if issubclass(value, QdqError) and value is not QdqError
]


@pytest.mark.parametrize("error_class", CLASSES, ids=lambda error_class: error_class.__name__)
def test_the_tree_in_the_docstring_is_the_tree(error_class):
    branch = re.search(rf"── {error_class.__name__} +(?:\((\w+)\))?", errors.__doc__)
    assert branch, f"{error_class.__name__} is missing in the docstring"
    if branch[1]:
        assert branch[1] in {base.__name__ for base in error_class.__mro__}


@pytest.mark.parametrize(
    ("error_class", "bases"),
    [
        (errors.ShapeError, (ValueError, RuntimeError)),
        (errors.NumberTypeError, (TypeError, ValueError)),
        (errors.MissingRangeError, (RuntimeError, AttributeError)),
    ],
)
def test_scripts_may_catch_either_type(error_class, bases):
    for base in (*bases, QdqError):
        with pytest.raises(base, match="bits is"):
            raise error_class("bits is 1.5, a float.", "give an integer.")


@pytest.mark.parametrize("error_class", CLASSES, ids=lambda error_class: error_class.__name__)
def test_an_error_says_what_was_found_and_what_to_do(error_class):
    error = error_class("width is 0; expected 1 or more.", "pass a positive width.")
    assert error.message == "width is 0; expected 1 or more."
    assert error.fix == "pass a positive width."
    assert str(error) == "width is 0; expected 1 or more. Fix: pass a positive width."


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("Failed to allocate memory for requested buffer of size 9"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to ..."), True),
        (RuntimeError("shapes do not match"), False),
        (ValueError("memory format is channels_last"), False),
    ],
)
def test_lack_of_memory_is_recognised_by_type_and_by_message(error, expected):
    assert is_out_of_memory(error) is expected

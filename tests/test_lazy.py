"""Public names that load their module on first use."""

import sys

import pytest

from qdq.lazy import list_homes, load_name

HOME_OF = list_homes({"colors": ("red", "blue"), "shapes.round": ("circle",)})


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of two modules, one of them in a package of its own."""
    folder = tmp_path / "sample_package"
    (folder / "shapes").mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "colors.py").write_text("red, blue = object(), object()")
    (folder / "shapes" / "__init__.py").write_text("")
    (folder / "shapes" / "round.py").write_text("circle = 'o'")
    monkeypatch.syspath_prepend(tmp_path)
    import sample_package

    yield sample_package
    for name in list(sys.modules):
        if name.partition(".")[0] == "sample_package":
            del sys.modules[name]


def test_each_name_has_its_module():
    assert HOME_OF == {"red": "colors", "blue": "colors", "circle": "shapes.round"}


def test_only_the_module_of_a_name_is_loaded_and_the_package_keeps_the_name(package):
    circle = load_name("sample_package", HOME_OF, "circle")
    assert circle == "o" and package.circle is circle
    assert "sample_package.colors" not in sys.modules
    assert load_name("sample_package", HOME_OF, "red") is sys.modules["sample_package.colors"].red


def test_an_unknown_name_is_an_attribute_error_of_the_package(package):
    with pytest.raises(AttributeError, match="module 'sample_package' has no attribute 'green'"):
        load_name("sample_package", HOME_OF, "green")

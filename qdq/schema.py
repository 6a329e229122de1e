"""JSON, YAML and binary files of qdq, read within bounds and held against declared types; damage is one `DataError`.

`parse_json` and `parse_yaml` give plain values: no key with two values, no number that is not finite, nothing nested
without end. `validate` holds such a value against a type, a dataclass or a `TypedDict`, as strictly as JSON's own types
are: no text for a number, no `true` for 1. An error says which file, where in it, what is there and what should be.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml

from qdq.errors import DataError
from qdq.files import read_mode
from qdq.text import printable

_Kind = TypeVar("_Kind")
_MOST_BYTES = 2**30  # of JSON: a report of 10,000 layers has 2**26
_MOST_YAML_BYTES = 2**22  # PyYAML reads a megabyte in ten seconds
_MOST_DEPTH = 64
_MOST_INTEGER = 2**63
_UNKNOWN = (
    "extra_forbidden",
    "unexpected_keyword_argument",
)  # a key that the type has not, in pydantic's words
_SHOWN = 40  # characters of a foreign text in a message


def read_text(path: Path, fix: str, most_bytes: int = _MOST_BYTES) -> str:
    """The text of a file.

    Args:
        path: The file.
        fix: What to do if it cannot be read.
        most_bytes: Larger ones are refused.

    Raises:
        DataError: It cannot be read, is too large or no UTF-8.
    """
    try:
        read_mode(path)
        with path.open("rb") as file:
            content = file.read(most_bytes + 1)
        if len(content) > most_bytes:
            raise DataError(f"{path} is larger than {most_bytes / 2**20:.0f} MiB.", fix)
        return content.decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}.", fix) from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} cannot be read: byte {error.start} is no UTF-8 text.", fix
        ) from error


def read_json(path: Path, fix: str) -> Any:
    """The value of a JSON file; see `parse_json`.

    Raises:
        DataError: It cannot be read, or is damaged.
    """
    return parse_json(read_text(path, fix), str(path), fix)


def read_yaml(path: Path, fix: str) -> Any:
    """The value of a YAML file; see `parse_yaml`.

    Raises:
        DataError: It cannot be read, or is damaged.
    """
    return parse_yaml(read_text(path, fix, _MOST_YAML_BYTES), str(path), fix)


def parse_json(text: str, source: str, fix: str, *, finite: bool = True) -> Any:
    """A value of JSON, all of whose texts can be written as UTF-8.

    Args:
        text: The JSON.
        source: What it was read from, for messages.
        fix: What to do if it is damaged.
        finite: Refuse NaN and Infinity, which other tools write; else numbers that are too large become Infinity.

    Raises:
        DataError: No JSON, two values of one key, a number that is not finite, or nested too deeply.
    """
    try:
        return _clean(
            json.loads(text, object_pairs_hook=_join_pairs, parse_int=_read_integer), finite=finite
        )
    except json.JSONDecodeError as error:
        message = f"line {error.lineno}, column {error.colno}: {error.msg}"
        raise DataError(
            f"{source} cannot be read: it is no JSON, or cut off, {message}.", fix
        ) from error
    except RecursionError as error:
        raise DataError(f"{source} cannot be read: it is nested too deeply.", fix) from error
    except ValueError as error:  # of `_join_pairs` and `_clean`
        raise DataError(f"{source} cannot be read: {error}.", fix) from error


def parse_yaml(text: str, source: str, fix: str) -> Any:
    """A value of YAML, whose keys are texts as they are written: `1.10` and `yes` are names. No aliases, no tags.

    Args:
        text: The YAML.
        source: What it was read from, for messages.
        fix: What to do if it is damaged.

    Raises:
        DataError: No such YAML, a key twice, a number that is not finite, or nested too deeply.
    """
    try:
        return _clean(yaml.load(text, _PlainLoader), finite=True)  # noqa: S506  # a SafeLoader
    except RecursionError as error:
        raise DataError(f"{source} is no YAML: it is nested too deeply.", fix) from error
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError) as error:
        # PyYAML's own constructors end in any of these: `!!int abc`, `!!float [1]`
        message = " ".join(str(error).replace('in "<unicode string>",', "at").split())
        raise DataError(f"{source} is no YAML: {printable(message, 300)}.", fix) from error


class _PlainLoader(yaml.SafeLoader):
    """YAML of texts, numbers, truth values, lists and mappings; a few lines of aliases would expand to gigabytes."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """A node, or the error that it is an alias."""
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(
                None, None, "an alias stands here; write out what it means", mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping with the text of each key, none twice."""
        result: dict[Any, Any] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key is no name", key.start_mark
                )
            if key.value in result:
                what = f"'{printable(key.value, _SHOWN)}' stands here twice"
                raise yaml.constructor.ConstructorError(None, None, what, key.start_mark)
            result[key.value] = self.construct_object(value, deep=deep)
        return result


_CONSTRUCTORS: dict[str, Callable[[Any, Any], Any]] = {
    **dict.fromkeys(("binary", "omap", "pairs", "set"), _PlainLoader.construct_undefined),
    "timestamp": _PlainLoader.construct_yaml_str,
}
for _tag, _constructor in _CONSTRUCTORS.items():
    _PlainLoader.add_constructor(f"tag:yaml.org,2002:{_tag}", _constructor)


def _join_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; the same value twice does no harm."""
    result = dict(pairs)
    if len(result) < len(pairs):
        for key, value in pairs:
            if result[key] != value:
                raise ValueError(f"'{printable(key, _SHOWN)}' has two values in one object")
    return result


def _read_integer(digits: str) -> float:
    """One of hundreds of digits is infinite; `int` would refuse thousands, and take long for fewer."""
    return int(digits) if len(digits) < 20 else float(digits)


def _clean(value: Any, *, finite: bool, depth: int = 0) -> Any:
    """The value with texts that UTF-8 can write: of half a surrogate pair, as in the name of a file, becomes "?".

    Raises:
        ValueError: A number is too large or not finite, or values are nested too deeply.
    """
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, dict | list) and depth == _MOST_DEPTH:
        raise ValueError(f"it is nested more than {_MOST_DEPTH} deep")
    if isinstance(value, dict):
        return {
            _clean(key, finite=finite, depth=depth): _clean(item, finite=finite, depth=depth + 1)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [_clean(item, finite=finite, depth=depth + 1) for item in value]
    if finite and isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value:.4g} is no number")
    if finite and isinstance(value, int) and abs(value) > _MOST_INTEGER:
        raise ValueError("a number is too large")
    return value


def validate(kind: type[_Kind], value: Any, source: str, fix: str) -> _Kind:
    """A value as the type that it should be.

    Args:
        kind: A dataclass, a `TypedDict`, or any type that pydantic knows.
        value: From `parse_json` or `parse_yaml`.
        source: What it was read from, for messages.
        fix: What to do if it is damaged.

    Returns:
        Of a dataclass an instance, with tuples where it declares them.

    Raises:
        DataError: Something is missing, or of another type.
    """
    from pydantic import ValidationError  # 0.1 s, which only reading files needs

    try:
        adapter = _adapter(
            cast(Any, kind)
        )  # a type is hashable, of which the annotations of `cache` know nothing
        valid: _Kind = adapter.validate_json(json.dumps(value), strict=True)
        return valid
    except ValidationError as error:
        raise DataError(f"{source} is damaged: {_describe_errors(error.errors())}.", fix) from error


@functools.cache
def _adapter(kind: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def _describe_errors(errors: list[Any]) -> str:
    first, *others = sorted(
        errors, key=lambda error: error["type"] not in _UNKNOWN
    )  # of a typo rather than what lacks
    place = "".join(
        f"[{part}]" if isinstance(part, int) else f".{printable(part, _SHOWN)}"
        for part in first["loc"]
    )
    place = place.removeprefix(".") or "the whole"
    if first["type"] == "missing":
        text = f"{place} is missing"
    elif first["type"] in _UNKNOWN:
        text = f"{place} is unknown"
    else:
        expected = first["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
        text = (
            f"{place} is {describe(first['input'])}, expected: {expected[:1].lower()}{expected[1:]}"
        )
    return text + (f"; {len(others)} more places are wrong" if others else "")


def describe(value: Any) -> str:
    """What a foreign value is, in a few characters whatever is in it."""
    if isinstance(value, str):
        return f"'{printable(value, _SHOWN)}'"
    if isinstance(value, Mapping):
        return f"an object of {len(value)} entries"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    return "null" if value is None else printable(json.dumps(value), _SHOWN)


def digest_parts(facts: Mapping[str, Any], parts: Mapping[str, memoryview]) -> str:
    """What changes with any bit of what a file holds, in 16 hexadecimal digits.

    Args:
        facts: Plain JSON values.
        parts: Name, type and shape of each array in one text -> its bytes.
    """
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name in sorted(parts):
        digest.update(f"\n{name}\n".encode())
        digest.update(parts[name])
    return digest.hexdigest()[:16]

"""Reading JSON, YAML and binary files of qdq: within limits, and checked against declared types.

`parse_json` and `parse_yaml` give plain values: they refuse a key with two values, numbers that are not finite, and
deep nesting. `validate` checks such a value against a type, a dataclass or a `TypedDict`, as strictly as JSON's own
types: a string is not a number, and `true` is not 1. Damage raises `DataError`, which says in which file and where the
problem is, what was found there and what was expected.
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
_MOST_VALUES = 2**17  # of a configuration with its aliases written out
_MERGE = "tag:yaml.org,2002:merge"
_MOST_INTEGER = 2**63
# A key that the type does not have, in pydantic's words.
_UNKNOWN_KEY = ("extra_forbidden", "unexpected_keyword_argument")
_SHOWN = 40  # characters of external text in a message


def read_text(path: Path, fix: str, most_bytes: int = _MOST_BYTES) -> str:
    """The text of a file.

    Args:
        path: The file.
        fix: Advice for the error if it cannot be read.
        most_bytes: Largest size that is read.

    Raises:
        DataError: It cannot be read, is too large or is not UTF-8.
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
            f"{path} cannot be read: byte {error.start} is not UTF-8 text.", fix
        ) from error


def read_json(path: Path, fix: str) -> Any:
    """The value of a JSON file; see `parse_json`.

    Raises:
        DataError: It cannot be read, or is damaged.
    """
    return parse_json(read_text(path, fix), str(path), fix)


def read_yaml(path: Path, fix: str, *, aliases: bool = False) -> Any:
    """The value of a YAML file; see `parse_yaml`.

    Raises:
        DataError: It cannot be read, or is damaged.
    """
    return parse_yaml(read_text(path, fix, _MOST_YAML_BYTES), str(path), fix, aliases=aliases)


def parse_json(text: str, source: str, fix: str, *, finite: bool = True) -> Any:
    """Parse JSON to plain values, with strings that can be written as UTF-8.

    Args:
        text: The JSON.
        source: Name of its source for messages.
        fix: Advice for the error if it is damaged.
        finite: Refuse NaN and Infinity, which other tools write; otherwise numbers that are too large become Infinity.

    Raises:
        DataError: It is not JSON, a key has two values, a number is not finite, or it is nested too deeply.
    """
    try:
        value = json.loads(text, object_pairs_hook=_join_pairs, parse_int=_read_integer)
        return _clean(value, finite=finite)
    except json.JSONDecodeError as error:
        message = f"line {error.lineno}, column {error.colno}: {error.msg}"
        raise DataError(
            f"{source} cannot be read: it is not JSON, or cut off, {message}.", fix
        ) from error
    except RecursionError as error:
        raise DataError(f"{source} cannot be read: it is nested too deeply.", fix) from error
    except ValueError as error:  # from `_join_pairs` or `_clean`
        raise DataError(f"{source} cannot be read: {error}.", fix) from error


def parse_yaml(text: str, source: str, fix: str, *, aliases: bool = False) -> Any:
    """Parse YAML to plain values. Keys are strings, as written: `1.10` and `yes` are names.

    Args:
        text: The YAML, without tags.
        source: Name of its source for messages.
        fix: Advice for the error if it is damaged.
        aliases: Read `*name` and the key `<<` as YAML 1.1 has them; otherwise aliases are refused, and `<<` is a name.

    Raises:
        DataError: It is not such YAML, has a key twice or a number that is not finite, or is nested too deeply.
    """
    loader = _AliasLoader if aliases else _PlainLoader
    try:
        return _clean(yaml.load(text, loader), finite=True)  # noqa: S506  # a SafeLoader
    except RecursionError as error:
        raise DataError(f"{source} is not YAML: it is nested too deeply.", fix) from error
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError) as error:
        # PyYAML's own constructors raise any of these: `!!int abc`, `!!float [1]`
        message = " ".join(str(error).replace('in "<unicode string>",', "at").split())
        raise DataError(f"{source} is not YAML: {printable(message, 300)}.", fix) from error


class _MappingLoader(yaml.SafeLoader):
    """Loads strings, numbers, booleans, lists and mappings."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Construct a mapping with the text of each key, and refuse a key that occurs twice."""
        result: dict[Any, Any] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key is not a name", key.start_mark
                )
            if key.value in result:
                problem = f"the key '{printable(key.value, _SHOWN)}' occurs twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            result[key.value] = self.construct_object(value, deep=deep)
        return result


class _PlainLoader(_MappingLoader):
    """Refuses aliases: a few lines of them could expand to gigabytes."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Compose a node, and refuse an alias."""
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(
                None, None, "aliases are not supported; write out the value", mark
            )
        return super().compose_node(parent, index)


class _AliasLoader(_MappingLoader):
    """Reads aliases and merge keys, as long as they do not make a small file large."""

    def get_single_node(self) -> yaml.Node | None:
        """Compose the document, and refuse aliases that contain themselves, or expand too far."""
        node: yaml.Node | None = super().get_single_node()
        if node is not None:
            _count_nodes(node, {})
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Construct a mapping. Its own keys win over merged ones, and of these the first mapping wins."""
        bases: list[yaml.Node] = []
        pairs = []
        for key, value in node.value:
            if key.tag == _MERGE:
                bases += value.value if isinstance(value, yaml.SequenceNode) else [value]
            else:
                pairs.append((key, value))
        result: dict[Any, Any] = {}
        for base in reversed(bases):
            if not isinstance(base, yaml.MappingNode):
                problem = "<< takes a mapping, or a list of mappings"
                raise yaml.constructor.ConstructorError(None, None, problem, base.start_mark)
            result |= self.construct_mapping(base, deep=True)
        plain = yaml.MappingNode(node.tag, pairs, node.start_mark, node.end_mark)
        return result | super().construct_mapping(plain, deep)


def _count_nodes(node: yaml.Node, counts: dict[yaml.Node, int]) -> int:
    """The number of values that a node is written out.

    Args:
        node: The node.
        counts: The numbers of the nodes that were counted; 0 for those that are being counted.

    Raises:
        yaml.composer.ComposerError: It contains itself, or there are too many.
    """
    if node not in counts:
        counts[node] = 0
        parts = node.value if isinstance(node, yaml.CollectionNode) else []
        if isinstance(node, yaml.MappingNode):
            parts = [part for pair in parts for part in pair]
        counts[node] = 1 + sum(_count_nodes(part, counts) for part in parts)
    elif counts[node] == 0:
        problem = "an alias stands inside of its own value"
        raise yaml.composer.ComposerError(None, None, problem, node.start_mark)
    if counts[node] > _MOST_VALUES:
        problem = f"its aliases stand for more than {_MOST_VALUES} values"
        raise yaml.composer.ComposerError(None, None, problem, node.start_mark)
    return counts[node]


_CONSTRUCTORS: dict[str, Callable[[Any, Any], Any]] = {
    "binary": _MappingLoader.construct_undefined,
    "omap": _MappingLoader.construct_undefined,
    "pairs": _MappingLoader.construct_undefined,
    "set": _MappingLoader.construct_undefined,
    "timestamp": _MappingLoader.construct_yaml_str,
}
for _tag, _constructor in _CONSTRUCTORS.items():
    for _loader in (_PlainLoader, _AliasLoader):
        _loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _constructor)


def _join_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a JSON object, and refuse a key with two different values; the same value twice does no harm."""
    result = dict(pairs)
    if len(result) < len(pairs):
        for key, value in pairs:
            if result[key] != value:
                raise ValueError(f"'{printable(key, _SHOWN)}' has two values in one object")
    return result


def _read_integer(digits: str) -> float:
    """Read a number of up to 19 digits; one of hundreds is infinite.

    `int` would refuse thousands of digits, and is slow for hundreds.
    """
    return int(digits) if len(digits) < 20 else float(digits)


def _clean(value: Any, *, finite: bool, depth: int = 0) -> Any:
    """Copy a value with strings that UTF-8 can write: half of a surrogate pair, as in names of files, becomes "?".

    Args:
        value: The plain value.
        finite: Refuse numbers that are not finite or too large.
        depth: Number of lists and mappings around the value.

    Raises:
        ValueError: A number is too large or not finite, or values are nested too deeply.
    """
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, dict | list) and depth == _MOST_DEPTH:
        raise ValueError(f"it is nested more than {_MOST_DEPTH} deep")
    if isinstance(value, dict):
        cleaned = {}
        for key, item in value.items():
            name = _clean(key, finite=finite, depth=depth)
            cleaned[name] = _clean(item, finite=finite, depth=depth + 1)
        return cleaned
    if isinstance(value, list):
        return [_clean(item, finite=finite, depth=depth + 1) for item in value]
    if finite:
        _require_finite(value)
    return value


def _require_finite(value: Any) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value:.4g} is not a number")
    if isinstance(value, int) and abs(value) > _MOST_INTEGER:
        raise ValueError("a number is too large")


def validate(kind: type[_Kind], value: Any, source: str, fix: str) -> _Kind:
    """Convert a plain value to its declared type.

    Args:
        kind: A dataclass, a `TypedDict`, or any type that pydantic supports.
        value: A value from `parse_json` or `parse_yaml`.
        source: Name of its source for messages.
        fix: Advice for the error if it is damaged.

    Returns:
        The value; for a dataclass, an instance, with tuples for fields that are declared as tuples.

    Raises:
        DataError: Something is missing, or has another type.
    """
    from pydantic import ValidationError  # takes 0.1 s, and only reading files needs it

    try:
        # A type is hashable, but the annotations of `cache` do not say so.
        adapter = _adapter(cast(Any, kind))
        valid: _Kind = adapter.validate_json(json.dumps(value), strict=True)
        return valid
    except ValidationError as error:
        raise DataError(f"{source} is damaged: {_describe_errors(error.errors())}.", fix) from error


@functools.cache
def _adapter(kind: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def _describe_errors(errors: list[Any]) -> str:
    """The first of pydantic's errors, and the number of the others."""
    text = _describe_error(min(errors, key=_rank_error))
    if len(errors) > 1:
        text += f"; {len(errors) - 1} more places are wrong"
    return text


def _rank_error(error: Any) -> bool:
    """Unknown keys come first: a typo explains why a key is missing."""
    return error["type"] not in _UNKNOWN_KEY


def _describe_error(error: Any) -> str:
    place = _describe_place(error["loc"])
    if error["type"] == "missing":
        return f"{place} is missing"
    if error["type"] in _UNKNOWN_KEY:
        return f"{place} is unknown"
    expected = error["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    expected = expected[:1].lower() + expected[1:]
    return f"{place} is {describe(error['input'])}, expected: {expected}"


def _describe_place(keys: tuple[str | int, ...]) -> str:
    """A place in a value, such as `layers.conv1.names[1]`."""
    place = ""
    for key in keys:
        if isinstance(key, int):
            place += f"[{key}]"
        else:
            place += f".{printable(key, _SHOWN)}"
    return place.removeprefix(".") or "the whole"


def describe(value: Any) -> str:
    """Describe an external value in a few characters, however long it is."""
    if isinstance(value, str):
        return f"'{printable(value, _SHOWN)}'"
    if isinstance(value, Mapping):
        return f"an object of {len(value)} entries"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    if value is None:
        return "null"
    return printable(json.dumps(value), _SHOWN)


def digest_parts(facts: Mapping[str, Any], parts: Mapping[str, memoryview]) -> str:
    """A digest of the contents of a file, in 16 hexadecimal digits; every bit changes it.

    Args:
        facts: Plain JSON values.
        parts: Bytes of each array, by a text with its name, type and shape.
    """
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name in sorted(parts):
        digest.update(f"\n{name}\n".encode())
        digest.update(parts[name])
    return digest.hexdigest()[:16]

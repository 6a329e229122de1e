"""Text from elsewhere becomes plain values within bounds, or one line that says what is wrong and where."""

import json
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import pytest

from qdq import DataError
from qdq.schema import (
    describe,
    digest_parts,
    parse_json,
    parse_yaml,
    read_json,
    read_yaml,
    validate,
)

# Nine lines of nine aliases each: 9^9 texts
BOMB = "a0: &a0 x\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10)
)


@dataclass(frozen=True)
class Inner:
    __pydantic_config__: ClassVar = {"extra": "forbid"}
    count: int
    kind: Literal["int8", "float"] = "int8"
    gain: float | None = None
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outer:
    layers: dict[str, Inner]
    flag: bool = False


class TestJson:
    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "not JSON, or cut off, line 1, column 1"),
            ('{"a": ', "not JSON, or cut off"),
            ('{"a": NaN}', "nan is not a number"),
            ('{"a": [-Infinity]}', "-inf is not a number"),
            ('{"a": 1e999}', "inf is not a number"),
            ('{"a": ' + "9" * 19 + "}", "a number is too large"),
            ('{"a": ' + "9" * 100_000 + "}", "inf is not a number"),
            ('{"a": 1, "b": 2, "a": 2}', "'a' has two values"),
            ("[" * 100_000, "nested too deeply"),
            ("[" * 70 + "]" * 70, "nested more than"),
        ],
    )
    def test_damage_is_named(self, text, message):
        with pytest.raises(DataError, match=rf"^a\.json cannot be read: .*{message}") as caught:
            parse_json(text, "a.json", "mend it.")
        assert caught.value.fix == "mend it." and len(caught.value.message) < 200

    def test_what_other_tools_write(self):
        value = parse_json(
            '{"a": NaN, "b": -Infinity, "c": 1' + "0" * 400 + "}", "a.json", "", finite=False
        )
        assert np.isnan(value["a"]) and value["b"] == -np.inf and value["c"] == np.inf

    def test_texts_can_be_written(self):
        assert parse_json('{"\\ud800": ["x\\udfff", "\\ud83d\\ude00"]}', "a.json", "") == {
            "?": ["x?", "\U0001f600"]
        }

    def test_files(self, tmp_path):
        path = tmp_path / "a.json"
        path.write_bytes(b'\xef\xbb\xbf{"a": 1}')
        assert read_json(path, "") == {"a": 1}
        path.write_bytes(b'{"a": "\xff"}')
        with pytest.raises(DataError, match="byte 7 is not UTF-8"):
            read_json(path, "")
        for absent in (tmp_path, tmp_path / "absent"):
            with pytest.raises(DataError, match=r"^cannot read .*director"):
                read_json(absent, "")


class TestYaml:
    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (BOMB, "aliases are not supported"),
            ("a: &x [*x]", "aliases are not supported"),
            ("a: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
            ("a: !!set {x, y}", "could not determine a constructor"),
            ("a: [" * 2000, "nested too deeply"),
            ("a: " + "[" * 70 + "]" * 70, "nested more than"),
            ("a: .inf", "inf is not a number"),
            ("a: 1:" + "59:" * 100 + "59", "a number is too large"),
            ("a: " + "7" * 5000, "4300 digits"),
            ("a: 1\na: 1", "occurs twice"),
            ("? [a]\n: 1", "a key is not a name"),
            ("a: \x07", "unacceptable character"),
            ("--- 1\n--- 2", "a single document"),
        ],
    )
    def test_damage_is_named(self, text, message):
        with pytest.raises(DataError, match=rf"^a\.yaml is not YAML: .*{message}") as caught:
            parse_yaml(text, "a.yaml", "")
        assert len(caught.value.message) < 400 and "\n" not in caught.value.message

    def test_keys_are_what_is_written(self):
        text = "1.10: 1\nyes: true\n~: null\n2001-01-01: 2001-01-01\n<<: {a: 1}\n"
        expected = {"1.10": 1, "yes": True, "~": None, "2001-01-01": "2001-01-01", "<<": {"a": 1}}
        assert parse_yaml(text, "a.yaml", "") == expected

    def test_large_files_are_refused_before_they_are_read(self, tmp_path):
        (tmp_path / "a.yaml").write_text("# " + "x" * 5_000_000)
        with pytest.raises(DataError, match="larger than 4 MiB"):
            read_yaml(tmp_path / "a.yaml", "")


class TestValidate:
    def test_the_type_itself(self):
        value = {"layers": {"a": {"count": 1, "names": ["x"]}, "b": {"count": 2, "gain": 1}}}
        assert validate(Outer, value, "f", "") == Outer(
            {"a": Inner(1, names=("x",)), "b": Inner(2, gain=1.0)}
        )

    @pytest.mark.parametrize(
        ("inner", "message"),
        [
            ({}, "layers.a.count is missing"),
            ({"count": "1"}, "layers.a.count is '1', expected: a valid integer"),
            ({"count": True}, "layers.a.count is true, expected: a valid integer"),
            ({"count": 1.0}, "layers.a.count is 1.0, expected: a valid integer"),
            ({"count": None}, "layers.a.count is null, expected: a valid integer"),
            ({"count": 1, "gain": {"x": 1}}, "layers.a.gain is an object of 1 entries"),
            ({"count": 1, "kind": "fp16"}, "layers.a.kind is 'fp16', expected: 'int8' or 'float'"),
            (
                {"count": 1, "names": ["x", 3]},
                r"layers.a.names\[1\] is 3, expected: a valid string",
            ),
            ({"coumt": 1}, "layers.a.coumt is unknown; 1 more places are wrong"),
            ([1], "layers.a is a list of 1, expected: an object"),
        ],
    )
    def test_what_is_wrong_is_named(self, inner, message):
        with pytest.raises(DataError, match=rf"^f is damaged: {message}\.?"):
            validate(Outer, {"layers": {"a": inner}}, "f", "")

    def test_foreign_texts_are_short_and_on_one_line(self):
        name = "x\x1b[2J\n" * 1000
        with pytest.raises(DataError) as caught:
            validate(Outer, {"layers": {name: {"count": name}}}, "f", "")
        assert caught.value.message.isprintable() and len(caught.value.message) < 200


def test_values_are_described_in_a_few_characters():
    deep = json.loads("[" * 500 + "]" * 500)
    for value in (deep, {"a": deep}, "x" * 10**6, 10**30, 1.5, None, True, "\x1b"):
        assert len(describe(value)) < 60 and describe(value).isprintable()


def test_a_digest_changes_with_every_bit():
    facts = {"a": 1}
    zeros, nothing = memoryview(bytes(8)), memoryview(b"")
    parts = {"x f4 (2,)": zeros, "y f4 (0,)": nothing}
    digest = digest_parts(facts, parts)
    assert digest == digest_parts(facts, {"y f4 (0,)": nothing, "x f4 (2,)": zeros})
    digests = {
        digest,
        digest_parts({"a": 2}, parts),
        digest_parts(facts, {**parts, "x f4 (2,)": memoryview(b"\1" + bytes(7))}),
        digest_parts(facts, {"x f8 (2,)": zeros, "y f4 (0,)": nothing}),
    }
    assert len(digests) == 4

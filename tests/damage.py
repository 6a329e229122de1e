"""Damaged copies of files, the same for the same seed: bytes, places in JSON and YAML, headers of safetensors."""

import copy
import json
import random
from collections.abc import Iterator

import yaml

VALUES = (
    None,
    True,
    False,
    0,
    -1,
    3.5,
    -1e300,
    2**62,
    10**40,
    "",
    "x",
    "float",
    "\x1b[2J\n",
    "x" * 5000,
    "\udcff",
    [],
    {},
    [None],
    [[[]]],
    {"": {}},
    {"x": None},
    [1, "2", 3.0],
)
LITERALS = (
    "NaN",
    "Infinity",
    "-Infinity",
    "1e999",
    "-0.0",
    "1" * 5000,
    "nul",
    "'x'",
    "[" * 5000,
    '{"a":' * 200,
    "\x00",
)
BOMB = "\n".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9 if n else ['x'] * 9)}]" for n in range(9)
)
YAML_TEXTS = (
    "layers: &x {a: *x}\n",
    "layers:\n  a: &b {precision: int8}\n  c: *b\n",
    f"{BOMB}\nlayers: *a8\n",
    "layers: {a: {precision: &p [*p]}}\n",
    "layers: !!python/object/apply:os.getcwd []\n",
    "layers: !!binary aGk=\n",
    "layers: {a: !!set {int8}}\n",
    "layers: {? [a, b] : int8}\n",
    "layers:\n\ta: int8\n",
    "--- {}\n--- {}\n",
    "%TAG ! x\n---\n{}",
    "layers: {a: int8}\nlayers: {a: float}\n",
    "layers: {<<: {a: int8}}\n",
    "layers: {a: {gain: .nan, precision: int8}}\n",
    "layers: {a: 1:30}\n",
    "layers: {a: 0o7777777777777777777777777777777}\n",
    "layers: {a: {precision: int8, reason: 2001-01-01}}\n",
    "layers: {a: !<tag:yaml.org,2002:int> x}\n",
    "layers: " + "[" * 2000,
    "- " * 1000,
    "? " * 300,
    ">\n" * 50,
    "&a *a",
)
PATTERNS = (  # of eight bytes: 2.0, infinity, NaN, -1, -1.8e308, the least denormal number
    "0000000000000040",
    "000000000000f07f",
    "000000000000f8ff",
    "ffffffffffffffff",
    "ffffffffffffefff",
    "0100000000000080",
)


def damage_bytes(content: bytes, source: random.Random) -> bytes:
    """A copy with bits flipped, cut off, joined, or in another encoding."""
    place = source.randrange(len(content))
    kind = source.randrange(9)
    if kind <= 2:
        damaged = bytearray(content)
        for _ in range(source.choice((1, 1, 3, 50))):
            damaged[source.randrange(len(damaged))] ^= 1 << source.randrange(8)
        return bytes(damaged)
    return (
        content[:place],
        content[place:],
        content[:place] + content,
        content[:place] + b"\xff\xfe" + content[place:],
        content.decode("latin-1").encode("utf-16"),
        b"",
        b"\x00" * source.choice((1, 8, 4096)),
    )[kind % 7]


def list_places(value: object, path: tuple = ()) -> Iterator[tuple]:
    """Every place in a tree of plain values."""
    yield path
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, item in items:
        yield from list_places(item, (*path, key))


def damage_tree(value: object, source: random.Random, places: list[tuple]) -> object:
    """A copy in which one place has another value, is not there, stands elsewhere, or has a neighbour too many."""
    path = source.choice(places)
    if not path:
        return source.choice(VALUES)
    copied = copy.deepcopy(value)
    parent = copied
    for key in path[:-1]:
        parent = parent[key]
    kind = source.randrange(6)
    if kind == 0:
        del parent[path[-1]]
    elif kind == 1 and isinstance(parent, dict):
        parent[source.choice(("more", "", "\x1b[31m", "x" * 5000))] = parent[path[-1]]
    elif kind == 2 and isinstance(parent, dict):
        parent[path[-1] + "_"] = parent.pop(path[-1])
    elif kind == 3:
        parent[path[-1]] = copied_at(value, source.choice(places))
    else:
        parent[path[-1]] = source.choice(VALUES)
    return copied


def copied_at(value: object, path: tuple) -> object:
    """A copy of what stands at a place."""
    for key in path:
        value = value[key]
    return copy.deepcopy(value)


def damage_json(content: bytes, source: random.Random) -> bytes:
    """JSON with one damage."""
    kind = source.randrange(10)
    if kind <= 2:
        return damage_bytes(content, source)
    value = json.loads(content)
    if kind == 3:
        generator = random.Random(source.random())  # noqa: S311
        text = json.dumps(damage_tree(value, generator, list(list_places(value))))
        place = source.choice([n for n, character in enumerate(text) if character in ":[,"] or [0])
        return f"{text[: place + 1]}{source.choice(LITERALS)}{text[place + 1 :]}".encode(
            "utf-8", "surrogatepass"
        )
    return json.dumps(damage_tree(value, source, list(list_places(value)))).encode()


def damage_yaml(content: bytes, source: random.Random) -> bytes:
    """YAML with one damage."""
    kind = source.randrange(10)
    if kind <= 2:
        return damage_bytes(content, source)
    if kind <= 5:
        return source.choice(YAML_TEXTS).encode()
    value = yaml.safe_load(content)
    damaged = damage_tree(value, source, list(list_places(value)))
    return yaml.safe_dump(damaged, allow_unicode=source.random() < 0.5).encode(
        "utf-8", "surrogatepass"
    )


def split_safetensors(content: bytes) -> tuple[dict, bytes]:
    """Header and data."""
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def join_safetensors(header: object, data: bytes) -> bytes:
    """The inverse of `split_safetensors`."""
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def damage_statistics(content: bytes, source: random.Random) -> bytes:
    """Statistics with one damage: of the file, its header, the facts in it, or its numbers; often without a digest."""
    header, data = split_safetensors(content)
    (key,) = header["__metadata__"]
    facts = json.loads(header["__metadata__"][key])
    if source.random() < 0.8:
        del facts["digest"]
    kind = source.randrange(10)
    if kind <= 1:
        return damage_bytes(content, source)
    if kind == 2:
        header["__metadata__"][key] = json.dumps(facts)
        return join_safetensors(damage_tree(header, source, list(list_places(header))), data)
    if kind <= 5:
        damaged = damage_tree(facts, source, list(list_places(facts)))
        header["__metadata__"][key] = source.choice((json.dumps(damaged), source.choice(LITERALS)))
        return join_safetensors(header, data)
    numbers = bytearray(data)
    name = source.choice([name for name in header if name != "__metadata__"])
    first, last = header[name]["data_offsets"]
    place = first + 8 * source.randrange(max((last - first) // 8, 1))
    numbers[place : place + 8] = bytes.fromhex(source.choice(PATTERNS))
    header["__metadata__"][key] = json.dumps(facts)
    return join_safetensors(header, bytes(numbers[: len(data)]))

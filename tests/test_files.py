import json
import os
import signal
import subprocess

import numpy as np
import pytest

from qdq import ArgumentError
from qdq.files import to_jsonable, write_atomic, write_json


def test_write_replaces_whole(tmp_path):
    path = tmp_path / "new" / "file.txt"
    write_atomic(path, "first")
    write_atomic(path, b"second")
    assert path.read_text() == "second"
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]


@pytest.mark.skipif(not hasattr(os, "O_TMPFILE"), reason="needs Linux")
def test_content_gets_its_name_only_when_whole(tmp_path, monkeypatch):
    seen = []
    link = os.link

    def spy(source, target, **kwargs):
        seen.append([p.name for p in tmp_path.iterdir()])
        link(source, target, **kwargs)

    monkeypatch.setattr(os, "link", spy)
    write_atomic(tmp_path / "file.txt", "content")
    assert seen == [[]]
    assert (tmp_path / "file.txt").read_text() == "content"


def test_write_without_nameless_files(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "O_TMPFILE")
    write_atomic(tmp_path / "file.txt", "content")
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(ArgumentError, match="No space left"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_kill_while_writing_leaves_nothing_half_written(tmp_path, processes):
    script = (
        "import sys; from pathlib import Path; from qdq.files import write_atomic\n"
        "print('go', flush=True)\n"
        "while True: write_atomic(Path(sys.argv[1]), b'x' * 20_000_000)\n"
    )
    path = tmp_path / "file.bin"
    for delay in (0.05, 0.1, 0.15, 0.2):
        process = processes.start("-c", script, path, stdout=subprocess.PIPE)
        process.stdout.readline()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert {p.stat().st_size for p in tmp_path.iterdir()} <= {20_000_000}


def test_json_of_everything(tmp_path):
    value = {"a": np.float32(1.5), "b": (1, tmp_path), "c": float("inf"), "d": {"e": np.arange(2)}}
    assert json.loads(write_json(tmp_path / "x.json", value).read_text()) == {
        "a": 1.5,
        "b": [1, str(tmp_path)],
        "c": None,
        "d": {"e": [0, 1]},
    }
    assert to_jsonable(3) == 3
    assert to_jsonable(frozenset({"e"})) == ["e"]


def test_a_text_that_utf_8_cannot_write(tmp_path):
    name = os.fsdecode(b"run\xff")
    assert (
        write_atomic(tmp_path / "file", f"{name} \u00e4").read_text("utf-8") == "run\\udcff \u00e4"
    )


def test_a_large_file_in_parts(tmp_path, monkeypatch):
    path = write_atomic(tmp_path / "file", lambda: iter([b"one ", b"two"]))
    assert path.read_bytes() == b"one two"

    def no_nameless_files(_, parts):
        next(iter(parts))
        raise OSError

    monkeypatch.setattr("qdq.files._write_nameless", no_nameless_files)
    write_atomic(path, lambda: iter([b"three ", b"four"]))
    assert path.read_bytes() == b"three four"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]

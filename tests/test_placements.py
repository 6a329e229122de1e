"""Where output files may go: nothing that is read, and nothing that is somebody else's, is lost."""

import json
import os
import shlex
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest

import qdq
from qdq import ArgumentError, DataError
from qdq.cli.main import main
from qdq.files import guard_files, write_atomic
from qdq.graph.tensors import list_data_files
from qdq.run import guard_command

FLOAT = """
<ir_version: 9, opset_import: ["": 19]>
g (float[N,3,8,8] x) => (float[N,4,8,8] y)
<float[4,3,1,1] w = {1,2,3,4,5,6,7,8,9,10,11,12}>
{
    y = Conv(x, w)
}
"""


@pytest.fixture
def model(tmp_path):
    ir.save(ir.from_onnx_text(FLOAT), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def external(name, location):
    """A constant of four bytes in another file."""
    tensor = onnx.TensorProto(name=name, data_type=onnx.TensorProto.FLOAT, dims=[1])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    return tensor


def test_data_of_every_constant_are_what_is_read(tmp_path):
    """Of initializers and of attributes, in the graph, in bodies and in functions; also where onnx-ir refuses them."""

    def constant(location):
        return onnx.helper.make_node("Constant", [], [location], value=external("", location))

    body = onnx.helper.make_graph(
        [constant("in a body")], "b", [], [], [external("w", "of a body")]
    )
    node = onnx.helper.make_node("If", ["x"], ["y"], then_branch=body, else_branch=body)
    inner = onnx.helper.make_graph([constant("in a body of a function")], "i", [], [])
    nested = onnx.helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner)
    opsets = [onnx.helper.make_opsetid("", 19)]
    function = onnx.helper.make_function(
        "mine", "f", [], ["y"], [constant("in a function"), nested], opsets
    )
    weights = [
        external("w", "weights"),
        external("v", "weights"),
        external("u", ""),
        external("t", "a\0b"),
    ]
    graph = onnx.helper.make_graph([constant("in the graph"), node], "g", [], [], weights)
    path = tmp_path / "model.onnx"
    path.write_bytes(onnx.helper.make_model(graph, functions=[function]).SerializeToString())
    names = [
        "weights",
        "in the graph",
        "of a body",
        "in a body",
        "in a function",
        "in a body of a function",
    ]
    assert sorted(file.name for file in list_data_files(path)) == sorted(names)
    assert {file.parent for file in list_data_files(path)} == {tmp_path}
    path.write_text("no ONNX")
    assert (
        list_data_files(path)
        == list_data_files(tmp_path)
        == list_data_files(tmp_path / "missing")
        == []
    )


class TestGuard:
    @pytest.fixture
    def old(self, tmp_path):
        path = tmp_path / "old"
        path.write_text("precious")
        return path

    @pytest.fixture(
        params=["itself", "relative", "link", "hard link", "through a linked folder", "dots"]
    )
    def alias(self, request, old, tmp_path, monkeypatch):
        """Another name of the same file."""
        other = tmp_path / "other"
        if request.param == "relative":
            monkeypatch.chdir(tmp_path)
            return Path("old")
        if request.param == "link":
            other.symlink_to(old)
            return other
        if request.param == "hard link":
            other.hardlink_to(old)
            return other
        if request.param == "through a linked folder":
            other.symlink_to(tmp_path)
            return other / "old"
        return tmp_path / "new" / ".." / "old" if request.param == "dots" else old

    def test_what_is_read_is_not_written(self, old, alias, tmp_path):
        (tmp_path / "new").mkdir()
        with pytest.raises(
            ArgumentError, match="is also an input of this command and would be overwritten"
        ):
            guard_files(inputs=[old], outputs=[alias])

    def test_nothing_is_written_twice(self, old, alias, tmp_path):
        (tmp_path / "new").mkdir()
        with pytest.raises(ArgumentError, match="is the target of two outputs"):
            guard_files(outputs=[old, alias])

    def test_two_new_files_that_are_one(self, tmp_path):
        (tmp_path / "link").symlink_to(tmp_path)
        with pytest.raises(ArgumentError, match="is the target of two outputs"):
            guard_files(outputs=[tmp_path / "new", tmp_path / "link" / "new"])

    def test_in_place_is_for_that_pair_alone(self, old, tmp_path):
        guard_files(inputs=[old], outputs=[old, None], in_place=[(old, old)])
        with pytest.raises(ArgumentError, match="is also an input of this command"):
            guard_files(
                inputs=[old], outputs=[tmp_path / "new", old], in_place=[(tmp_path / "new", old)]
            )

    def test_nothing_is_made(self, tmp_path):
        guard_files(inputs=[tmp_path / "missing"], outputs=[tmp_path / "new" / "folder" / "file"])
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        ("name", "reason"),
        [
            (".", "Is a directory"),
            ("old/file", "Not a directory"),
            ("loop", "Too many levels of symbolic links"),
            ("loop/file", "Too many levels of symbolic links"),
            ("x" * 256, "File name too long"),
            ("new/" + "x" * 256, "File name too long"),
            ("x/" * 2500, "File name too long"),
            ("a\0b", "null"),
            ("socket", "it is a socket"),
        ],
        ids=lambda text: text[:20].replace("\0", "0"),
    )
    def test_what_cannot_be_written(self, tmp_path, old, name, reason):
        (tmp_path / "loop").symlink_to(tmp_path / "loop")
        listening = socket.socket(socket.AF_UNIX)
        listening.bind(str(tmp_path / "socket"))
        with pytest.raises(ArgumentError, match=reason) as caught:
            guard_files(outputs=[tmp_path / name])
        listening.close()
        assert caught.value.message.startswith("cannot write ")
        assert len(caught.value.message) < 300
        assert old.read_text() == "precious"

    def test_names_up_to_the_longest_can_be_written(self, tmp_path):
        path = tmp_path / ("x" * 255)
        guard_files(outputs=[path])
        write_atomic(path, "new")
        assert path.read_text() == "new"

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
    def test_a_file_that_is_protected(self, old):
        old.chmod(0o444)
        with pytest.raises(ArgumentError, match="Permission denied"):
            guard_files(outputs=[old])

    @pytest.mark.parametrize("kind", ["FIFO", "device"])
    def test_what_has_no_end_is_not_read(self, tmp_path, kind):
        path = Path("/dev/zero")
        if kind == "FIFO":
            path = tmp_path / "fifo"
            os.mkfifo(path)
        with pytest.raises(DataError, match=f"it is a {kind}, not a file"):
            guard_files(inputs=[path])

    def test_the_file_that_the_output_is_redirected_to(self, tmp_path):
        script = "import sys; from pathlib import Path; from qdq.files import guard_files\n"
        script += "guard_files(outputs=[Path(sys.argv[1])])"
        for stream in ("stdout", "stderr"):
            with (tmp_path / "out").open("w") as file:
                code = subprocess.run(
                    [sys.executable, "-c", script, tmp_path / "out"],
                    **{"stderr": subprocess.PIPE, stream: file},
                ).returncode
            assert code == 1


class TestWritingInto:
    def test_a_link_is_followed_and_stays(self, tmp_path):
        (tmp_path / "folder").mkdir()
        target, link = tmp_path / "folder" / "file", tmp_path / "link"
        link.symlink_to(Path("folder", "file"))
        for content in ("first", "second"):  # dangling, then not
            write_atomic(link, content)
            assert link.is_symlink()
            assert target.read_text() == content
        assert [path.name for path in target.parent.iterdir()] == ["file"]

    def test_the_mode_stays(self, tmp_path):
        path = tmp_path / "file"
        path.write_text("old")
        path.chmod(0o640)
        write_atomic(path, "new")
        assert stat.S_IMODE(path.stat().st_mode) == 0o640

    def test_a_new_file_has_the_mode_of_the_user(self, tmp_path):
        before = os.umask(0o027)
        try:
            path = write_atomic(tmp_path / "file", "new")
        finally:
            os.umask(before)
        assert stat.S_IMODE(path.stat().st_mode) == 0o640

    def test_a_fifo_stays_one(self, tmp_path):
        path = tmp_path / "fifo"
        os.mkfifo(path)
        received = []
        reader = threading.Thread(target=lambda: received.append(path.read_text()))
        reader.start()
        write_atomic(path, "content")
        reader.join(60)
        assert received == ["content"]
        assert stat.S_ISFIFO(path.stat().st_mode)

    def test_a_fifo_that_nobody_reads(self, tmp_path, monkeypatch):
        monkeypatch.setattr("qdq.files._READER_SECONDS", 0)
        os.mkfifo(tmp_path / "fifo")
        with pytest.raises(ArgumentError, match="it has no reader"):
            write_atomic(tmp_path / "fifo", "content")

    @pytest.mark.parametrize(("number", "error"), [(3, None), (7, "No space left on device")])
    def test_a_device_stays_one(self, tmp_path, number, error):
        """A copy of /dev/null and one of /dev/full."""
        path = tmp_path / "device"
        try:
            os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, number))
            path.open("wb").close()
        except OSError:
            pytest.skip("devices cannot be made here")
        guard_files(outputs=[path, path])
        if error is None:
            write_atomic(path, "content")
        else:
            with pytest.raises(ArgumentError, match=error):
                write_atomic(path, "content")
        assert stat.S_ISCHR(path.stat().st_mode)

    def test_the_standard_output_goes_on_behind_what_was_printed(self, tmp_path):
        script = "import qdq.files as f; from pathlib import Path; print('table')\n"
        script += "f.guard_files(outputs=[Path('/dev/stdout')]); f.write_atomic(Path('/dev/stdout'), 'json\\n')\n"
        script += "print('end')"
        for mode in ("wb", "ab"):
            with (tmp_path / "out").open(mode) as file:
                subprocess.run([sys.executable, "-c", script], stdout=file, check=True)
        assert (tmp_path / "out").read_text() == "table\njson\nend\n" * 2
        piped = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, check=True)
        assert piped.stdout == b"table\njson\nend\n"

    @pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux")
    def test_an_open_file_of_another_process_is_not_ours(self, tmp_path, processes):
        script = "import sys; file = open(sys.argv[1], 'a'); print(file.fileno(), flush=True); sys.stdin.read()"
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        process = processes.start("-c", script, tmp_path / "theirs", **pipes)
        theirs = int(process.stdout.readline())
        write_atomic(Path(f"/proc/{process.pid}/fd/{theirs}"), "content")
        process.communicate()
        assert (tmp_path / "theirs").read_text() == "content"

    @pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux")
    @pytest.mark.parametrize(
        "folder", ["/dev/fd", "/proc/self/fd", "/proc/thread-self/fd", "/proc/PID/fd"]
    )
    def test_an_open_file_goes_on(self, tmp_path, folder):
        folder = folder.replace("PID", str(os.getpid()))
        with (tmp_path / "file").open("w") as file:
            file.write("first ")
            file.flush()
            write_atomic(Path(folder, str(file.fileno())), "second ")
            file.write("third")
        assert (tmp_path / "file").read_text() == "first second third"


def call(capsys, *arguments):
    with pytest.raises(SystemExit) as exit:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return exit.value.code, captured.out, captured.err


def snapshot(folder):
    """Every entry below a folder: kind, and content or what it leads to."""
    entries = {}
    for path in folder.rglob("*"):
        mode = path.lstat().st_mode
        content = (
            path.read_bytes()
            if stat.S_ISREG(mode)
            else os.readlink(path)
            if stat.S_ISLNK(mode)
            else b""
        )
        entries[path.relative_to(folder).as_posix()] = (stat.S_IFMT(mode), content)
    return entries


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """One of every kind of file that a command reads."""
    folder = tmp_path_factory.mktemp("inputs")
    ir.save(ir.from_onnx_text(FLOAT), folder / "model.onnx")
    ir.save(
        ir.from_onnx_text(FLOAT),
        folder / "split.onnx",
        external_data="weights.bin",
        size_threshold_bytes=0,
    )
    constant = onnx.helper.make_node("Constant", [], ["y"], value=external("", "constant.bin"))
    output = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([constant], "g", [], [output])
    (folder / "constant.onnx").write_bytes(onnx.helper.make_model(graph).SerializeToString())
    (folder / "constant.bin").write_bytes(bytes(4))
    (folder / "calibration.safetensors").write_text("statistics")
    for name in ("run", "base"):
        (folder / name).mkdir()
        (folder / name / "run.json").write_text(json.dumps({"format": "qdq run 1", "stage": ""}))
        (folder / name / "report.json").write_text("{}")
        (folder / name / "model.onnx").write_text("of the run")
        (folder / name / "tuning").mkdir()
        (folder / name / "tuning" / "best.safetensors").write_text("of the run")
    (folder / "data" / "0").mkdir(parents=True)
    (folder / "data" / "0" / "a.png").write_text("image")
    (folder / "folder").mkdir()
    os.mkfifo(folder / "fifo")
    (folder / "loop").symlink_to("loop")
    (folder / "link.onnx").symlink_to("model.onnx")
    (folder / "hard.onnx").hardlink_to(folder / "model.onnx")
    (folder / "report link").symlink_to("run/report.json")
    return folder


READ, TWICE = (
    "is also an input of this command and would be overwritten",
    "is the target of two outputs",
)
OF_A_RUN = "is a file of a run and would be overwritten"
REFUSED = [
    # check
    ("check model.onnx --json model.onnx", READ),
    ("check model.onnx --sarif ./folder/../model.onnx", READ),
    ("check model.onnx --json link.onnx", READ),
    ("check model.onnx --json hard.onnx", READ),
    ("check link.onnx --json model.onnx", READ),
    ("check split.onnx --json weights.bin", READ),
    ("check split.onnx --fix weights.bin", READ),
    ("check constant.onnx --json constant.bin", READ),
    ("check model.onnx --json new --sarif new", TWICE),
    ("check model.onnx --fix new --sarif folder/../new", TWICE),
    ("check model.onnx --fix model.onnx --json model.onnx", "model.onnx"),
    ("check model.onnx --json folder", "Is a directory"),
    ("check model.onnx --sarif loop", "Too many levels"),
    ("check model.onnx --json model.onnx/new", "Not a directory"),
    ("check model.onnx --json model.onnx/", "model.onnx is not a folder"),
    ("check model.onnx --json link.onnx//", "link.onnx is not a folder"),
    ("check model.onnx/", "model.onnx is not a folder"),
    ("check model.onnx --json READ_ONLY", "it is open for reading only"),
    ("check model.onnx --fix /dev/null", "is not a regular file"),
    ("check model.onnx --fix fifo", "is not a regular file"),
    ("check --explain QDQ101 --json new", "writes no file"),
    ("check model.onnx --explain QDQ101 --fix new", "writes no file"),
    ("check fifo --json new", "it is a FIFO"),
    ("check /dev/zero", "it is a device"),
    # build
    ("build model.onnx --json model.onnx", READ),
    ("build model.onnx -o hard.onnx", READ),
    ("build model.onnx -o new --json new", TWICE),
    ("build model.onnx --json model.rtx.engine", TWICE),
    ("build split.onnx -o weights.bin", READ),
    ("build fifo", "it is a FIFO"),
    # bundle
    ("bundle run -o new --json run/model.onnx", READ),
    ("bundle model.onnx -o new --json model.onnx", READ),
    ("bundle model.onnx -o new --inputs hard.onnx --json model.onnx", READ),
    ("bundle split.onnx -o new --json weights.bin", READ),
    ("bundle model.onnx -o new --json run/report.json", OF_A_RUN),
    ("bundle run -o run", "holds files and is not a bundle"),
    ("bundle model.onnx -o model.onnx", "is not a folder"),
    ("bundle fifo -o new", "it is a FIFO"),
    # calibrate
    ("calibrate show calibration.safetensors --json calibration.safetensors", READ),
    ("calibrate show calibration.safetensors --plots new --json new", TWICE),
    ("calibrate solve calibration.safetensors --json calibration.safetensors", READ),
    ("calibrate solve calibration.safetensors --onnx model.onnx -o calibration.safetensors", READ),
    ("calibrate solve calibration.safetensors --onnx model.onnx -o new --json model.onnx", READ),
    (
        "calibrate solve calibration.safetensors --onnx model.onnx -o model.onnx --json model.onnx",
        "model.onnx",
    ),
    ("calibrate solve calibration.safetensors --onnx split.onnx -o weights.bin", READ),
    ("calibrate merge calibration.safetensors calibration.safetensors -o folder", "Is a directory"),
    # report, explain, gate
    ("report run -o run/report.json", READ),
    ("report run --json run/report.json", READ),
    ("report run/report.json -o run/model.onnx", READ),
    ("report run --json run/report.html", TWICE),
    ("report run base -o base/report.json", READ),
    ("report run --json run/tuning/best.safetensors", READ),
    ("explain run layer --json run/report.json", READ),
    ("explain run layer --json run/run.json", READ),
    ("gate run --max-drop 1 --junit run/report.json", READ),
    ("gate run --max-drop 1 --json report\\ link", READ),
    ("gate run --max-drop 1 --baseline base --json base/report.json", READ),
    ("gate run --max-drop 1 --junit new --json new", TWICE),
    ("gate fifo --max-drop 1", "it is a FIFO"),
    # what a run wrote
    ("check run/model.onnx --json run/report.json", OF_A_RUN),
    ("check model.onnx --json report\\ link", OF_A_RUN),
    ("check model.onnx --json run/analysis.jsonl", OF_A_RUN),
    ("check model.onnx --sarif run/tuning/best.safetensors", OF_A_RUN),
    ("check model.onnx --fix run/plan.yaml", OF_A_RUN),
    ("check model.onnx --fix run/model.onnx", OF_A_RUN),
    ("build run/model.onnx -o run/run.log", OF_A_RUN),
    ("build run/model.onnx --json run/report.json", OF_A_RUN),
    ("build model.onnx -o run/model.rtx.engine", OF_A_RUN),
    ("build run/model.onnx -o new --json run/model.rtx.engine", OF_A_RUN),
    ("calibrate show calibration.safetensors --plots run/calibration.json", OF_A_RUN),
    (
        "calibrate merge calibration.safetensors calibration.safetensors -o run/calibration.safetensors",
        OF_A_RUN,
    ),
    ("calibrate solve calibration.safetensors --onnx model.onnx -o run/model.onnx", OF_A_RUN),
    ("report run -o base/report.html", OF_A_RUN),
    ("report run base -o run/report.html", OF_A_RUN),
    ("report run -o new --json run/report.html", OF_A_RUN),
    ("explain run layer --json base/report.json", OF_A_RUN),
    ("gate run --max-drop 1 --junit base/report.txt", OF_A_RUN),
    ("env --json run/run.json", OF_A_RUN),
    ("eval model.onnx --json run/report.json", OF_A_RUN),
    # plan, env, eval
    ("plan diff fifo fifo", "it is a FIFO"),
    ("env --json folder", "Is a directory"),
    ("env --json model.onnx/", "model.onnx is not a folder"),
    ("eval model.onnx --json model.onnx", READ),
    ("eval split.onnx --json weights.bin", READ),
    ("eval --data-dir data --json data/0/a.png", READ),
    ("eval --weights model.onnx --json hard.onnx", READ),
    ("eval --data-dir fifo", "it is a FIFO"),
    # recipes
    ("ptq --output folder/../model.onnx", "as a run folder: Not a directory"),
    ("ptq --output data", "is not a run folder"),
    ("ptq --output loop", "Too many levels"),
    ("ptq --output new --plan fifo", "it is a FIFO"),
    ("ptq --output new --profile fifo", "it is a FIFO"),
    ("ptq --output new --weights fifo", "it is a FIFO"),
    ("ptq --output new --data-dir fifo", "it is a FIFO"),
    ("qat --output data", "is not a run folder"),
    ("qat --output new --plan fifo", "it is a FIFO"),
]


@pytest.mark.parametrize(("line", "reason"), REFUSED)
def test_commands_refuse_what_would_be_lost(inputs, capsys, monkeypatch, line, reason):
    arguments = shlex.split(line)
    if arguments[0] in ("eval", "ptq", "qat"):
        pytest.importorskip("torchvision", reason="needs the extra 'demo'")
    monkeypatch.chdir(inputs)
    before = snapshot(inputs)
    with (inputs / "model.onnx").open() as file:
        read_only = f"/dev/fd/{file.fileno()}"
        code, out, err = call(
            capsys, *(read_only if word == "READ_ONLY" else word for word in arguments)
        )
    error, fix = err.splitlines()
    assert (code, out) == (2, "")
    assert error.startswith("error: ") and reason in error
    assert fix.startswith("  fix: ")
    assert snapshot(inputs) == before


@pytest.mark.parametrize(
    "line", ["check model.onnx --json OUT", "env --json OUT", "check model.onnx --sarif OUT"]
)
def test_commands_write_into_what_is_no_file(model, capsys, monkeypatch, tmp_path, line):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("fifo")
    received = []
    reader = threading.Thread(target=lambda: received.append(Path(tmp_path, "fifo").read_text()))
    reader.start()
    assert call(capsys, *line.replace("OUT", "fifo").split())[0] == 0
    reader.join(60)
    assert json.loads(received[0])
    assert stat.S_ISFIFO(os.stat("fifo").st_mode)
    Path("link.json").symlink_to("target.json")
    assert call(capsys, *line.replace("OUT", "link.json").split())[0] == 0
    assert Path("link.json").is_symlink() and json.loads(Path("target.json").read_text())
    assert call(capsys, *line.replace("OUT", "/dev/null").split())[0] == 0
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_commands_say_what_a_full_device_does_not_take(model, capsys):
    code, _, err = call(capsys, "check", model, "--json", "/dev/full")
    assert code == 2
    assert err.splitlines()[0] == "error: cannot write /dev/full: No space left on device."


def test_two_results_may_go_nowhere(model, capsys):
    assert call(capsys, "check", model, "--json", "/dev/null", "--sarif", "/dev/null")[0] == 0


def test_in_place(model, capsys):
    before = model.read_bytes()
    assert call(capsys, "check", model, "--fix", model)[0] == 0
    assert ir.load(model).graph.name == ir.from_onnx_text(FLOAT).graph.name
    assert len(model.read_bytes()) > len(before) // 2


def test_what_a_command_makes_of_a_run_may_stand_in_its_folder(model, tmp_path):
    run = qdq.start_run(tmp_path / "run")
    run.finish()
    mine, engine, page = (
        run.folder / name for name in ("check.json", "model.rtx.engine", "report.html")
    )
    onnx_file = model.rename(run.folder / "model.onnx")
    guard_command(inputs=[onnx_file], outputs=[onnx_file, mine], in_place=[(onnx_file, onnx_file)])
    for path in (engine, page):
        path.write_text("old")
        guard_command(inputs=[onnx_file], outputs=[path], in_place=[(path, path)])
    (run.folder / "run.json").write_text("of another program")
    guard_command(outputs=[run.folder / "report.json"])


def test_the_engine_beside_the_model_and_the_page_are_made_again(tmp_path, capsys):
    qdq.start_run(tmp_path).finish()
    for name in ("model.onnx", "model.rtx.engine", "report.json", "report.html"):
        (tmp_path / name).write_text("of the run")
    for line in (
        "build model.onnx",
        "build model.onnx -o model.rtx.engine",
        "report .",
        "report . -o report.html",
    ):
        words = [
            str(tmp_path / word) if word[0] == "." or "." in word else word for word in line.split()
        ]
        code, _, err = call(capsys, *words)
        assert code == 2 and ("model.onnx is no" in err or "report.json cannot be read" in err), err


def test_functions_refuse_before_their_work(quantized, images, tmp_path, monkeypatch):
    path = qdq.export_onnx(quantized, images, tmp_path / "model.onnx").path
    content = path.read_bytes()

    def capture(*_, **__):
        raise AssertionError("the work has begun")

    monkeypatch.setattr("qdq.export.capture_graph", capture)
    for output in (tmp_path, tmp_path / ("x" * 256), path / "file"):
        with pytest.raises(ArgumentError, match="cannot write"):
            qdq.export_onnx(quantized, images, output)
    with pytest.raises(ArgumentError, match="is also an input of this command"):
        qdq.export_ranges(quantized, path, format="onnxruntime", onnx=path)
    assert path.read_bytes() == content
    qdq.export_ranges(quantized, path, format="qdq", onnx=path)
    assert ir.load(path).graph.name == ir.from_proto(onnx.load_from_string(content)).graph.name

"""Files of results: what is refused before the work, what is kept whatever happens after."""

import errno
import io
import json
import os
import resource
import signal
import sys

import pytest

from core.config import UserError
from core.storage import output, rows_file, streams
from core.storage.output import File
from core.storage.rows_file import RowsFile

FIELD = "decode.output"


def written(path) -> list:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("notes.txt", "its last line is no JSON object: rows are appended to JSON lines alone"),
        ("list.jsonl", "its last line is no JSON object"),
        ("cut.jsonl", "its last line is cut off (no newline ends it)"),
        ("there", "there is a folder: name a file, as "),
        ("not-there/", "not-there/ is a folder"),
        ("notes.txt/x.jsonl", "cannot be written: File exists"),
        ("dangling", "but /nowhere is not there: is its disk mounted?"),
        ("loop", "Too many levels of symbolic links"),
        ("long" * 99, "File name too long"),
        ("a\0b", "holds a NUL"),
        ("/dev/full", "/dev/full cannot be written: No space left on device"),
        ("/proc/x", "/proc/x cannot be written: No such file"),
        ("in.jsonl", "is the file of decode.prompts="),
        ("link", "is the file of decode.prompts="),
        ("hard", "is the file of decode.prompts="),
        ("bundle/7/x", "is the file of decode.checkpoint="),
    ],
)
def test_refused_before_the_work(tmp_path, name, message):
    mine = {"notes.txt": "mine\n", "list.jsonl": "[1]\n", "cut.jsonl": '{}\n{"a": ', "in.jsonl": ""}
    for file, content in mine.items():
        (tmp_path / file).write_text(content)
    (tmp_path / "there").mkdir()
    (tmp_path / "hard").hardlink_to(tmp_path / "in.jsonl")
    for link, to in (("link", "in.jsonl"), ("dangling", "/nowhere/x"), ("loop", "loop")):
        (tmp_path / link).symlink_to(to)
    inputs = [("decode.prompts", tmp_path / "in.jsonl"), ("decode.checkpoint", tmp_path / "bundle")]
    with pytest.raises(UserError) as error:
        RowsFile(f"{tmp_path}/{name}" if name[0] != "/" else name, FIELD, inputs)
    assert message in str(error.value) and f"{FIELD}=" in str(error.value)
    for file, content in mine.items():
        assert (tmp_path / file).read_text() == content


def test_rows_are_appended_through_links_by_several_runs(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk/out.jsonl")
    long = "x" * 3 * rows_file.BLOCK
    with (
        RowsFile(str(tmp_path / "out"), FIELD) as one,
        RowsFile(str(tmp_path / "out"), FIELD) as two,
    ):
        one.append([{"a": 1}])
        two.append([{"b": [float("nan"), (1.5, float("inf"))]}])
        one.append([{"a": 2}, {"a": long}])
        assert one.told() == f"3 rows in {tmp_path}/out"
    with RowsFile(str(tmp_path / "out"), FIELD) as three:
        three.append([{"c": 1}])
        assert three.told() == f"1 row in {tmp_path}/out, after those that it had"
    assert (tmp_path / "out").is_symlink()
    expected = [{"a": 1}, {"b": [None, [1.5, None]]}, {"a": 2}, {"a": long}, {"c": 1}]
    assert written(tmp_path / "disk" / "out.jsonl") == expected


def test_a_full_disk_keeps_whole_rows_and_says_how_many(tmp_path):
    path = tmp_path / "out.jsonl"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        with RowsFile(str(path), FIELD) as rows, pytest.raises(SystemExit) as error:
            rows.append({"text": "x" * 20, "row": i} for i in range(9))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert written(path) == [{"text": "x" * 20, "row": i} for i in range(2)]
    assert error.value.code == (
        f"error: {FIELD}={path} cannot be written: File too large; 2 rows are in it from this run, "
        "each of them whole"
    )


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
)
def test_a_signal_waits_until_a_row_is_written_and_counted(tmp_path, monkeypatch, number, error):
    append = rows_file._append

    def interrupted(file, line):
        os.kill(os.getpid(), number)
        append(file, line)

    monkeypatch.setattr(rows_file, "_append", interrupted)
    with RowsFile(str(tmp_path / "out.jsonl"), FIELD) as rows:
        with pytest.raises(error):
            rows.append([{"a": 1}, {"a": 2}])
        assert rows.count == 1
    assert written(tmp_path / "out.jsonl") == [{"a": 1}]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_fifo_gets_rows_and_a_pipe_is_named_when_its_reader_leaves(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    reader = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    with RowsFile(str(tmp_path / "fifo"), FIELD) as rows:
        rows.append([{"a": 1}])
        assert os.read(reader, 100) == b'{"a": 1}\n'
        os.close(reader)
        with pytest.raises(SystemExit, match="its reader left; 1 row is in it"):
            rows.append([{"a": 2}])


def test_stdout_by_any_name_gets_the_rows(tmp_path, monkeypatch):
    with open(tmp_path / "sent", "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        for name in ("-", str(tmp_path / "sent")):
            with RowsFile(name, FIELD) as rows:
                assert rows.is_stdout and not rows.kept
                rows.append([{"a": 1}])
    assert written(tmp_path / "sent") == [{"a": 1}] * 2


def test_a_whole_file_replaces_its_own_kind_alone(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out.json").symlink_to("disk/out.json")
    path, ours = str(tmp_path / "out.json"), output.is_json("rows")
    for rows in (1, 2):
        File(path, FIELD, ours).write(json.dumps({"rows": rows}))
    assert (tmp_path / "out.json").is_symlink()
    assert json.loads((tmp_path / "disk" / "out.json").read_text()) == {"rows": 2}
    late = File(path, FIELD, ours)
    for content in ("notes", '{"row": 1}', "[" * 100_000):
        (tmp_path / "disk" / "out.json").write_text(content)
        with pytest.raises(UserError, match=f"{FIELD}=.*out.json is there already, and this comm"):
            File(path, FIELD, ours)
        late.write('{"rows": 3}')  # it came while we worked
        assert (tmp_path / "disk" / "out.json").read_text() == content
    assert json.loads((tmp_path / "disk" / f"out.json.{os.getpid()}").read_text()) == {"rows": 3}
    assert len(list((tmp_path / "disk").iterdir())) == 2, "nothing temporary is left"
    (tmp_path / "d").mkdir()
    for name, message in (("d", "is a folder"), ("d/x/", "is a folder"), ("/dev/full", "No space")):
        with pytest.raises(UserError, match=message):
            File(tmp_path / name if name[0] == "/" else f"{tmp_path}/{name}", FIELD, ours)


def test_a_page_that_was_edited_is_not_ours():
    page, is_ours = output.signed("# Report\n\nText.\n"), output.is_page("# Report")
    assert is_ours(page.encode()) and is_ours(b"# Report\nof an earlier version")
    for other in (page.replace("Text", "Notes"), page + "Notes\n", "Notes\n"):
        assert not is_ours(other.encode())


def closed_pipe() -> io.TextIOWrapper:
    reader, writer = os.pipe()
    os.close(reader)
    return open(writer, "w")


def test_work_with_a_file_goes_on_when_the_reader_of_stdout_leaves(monkeypatch):
    for stdout in (closed_pipe(), None):
        monkeypatch.setattr(sys, "stdout", stdout)
        with streams.guarded(kept="out.jsonl"):
            for _ in range(3):
                print("text", flush=True)
                sys.stdout.write("text")
    monkeypatch.setattr(sys, "stdout", closed_pipe())
    with streams.guarded(kept=""), pytest.raises(BrokenPipeError):
        print("text", flush=True)
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the end of Python


def test_a_full_stdout_is_told_at_the_end(monkeypatch):
    monkeypatch.setattr(sys, "stdout", open("/dev/full", "w"))  # noqa: SIM115
    with pytest.raises(SystemExit) as error, streams.guarded(kept="out.jsonl"):
        print("text")
    assert os.strerror(errno.ENOSPC) in error.value.code
    assert "all results are in out.jsonl" in error.value.code


def test_a_character_that_stdout_lacks_is_escaped(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    with streams.guarded(kept="out.jsonl"):
        print("a \u2603")
    assert raw.getvalue() == b"a \\u2603\n"

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from compress import files
from compress.errors import CompressError, ConfigError, IntegrityError, LockedError, ResourceError

ROOT = Path(__file__).parents[1]


def leftovers(folder: Path) -> list[str]:
    return [
        name for _parent, folders, names in os.walk(folder) for name in folders + names if "part-" in name
    ]


def write_half(target: Path, error: BaseException) -> None:
    with files.whole(target) as temporary:
        temporary.write_text("half")
        raise error


def python(code: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)


# --- whole


def test_a_file_appears_with_its_content(tmp_path: Path) -> None:
    target = tmp_path / "new" / "deep" / "a.safetensors"
    with files.whole(target) as temporary:
        assert temporary.name == target.name  # writers look at the suffix
        temporary.write_bytes(b"data")
        assert not target.exists()
    assert target.read_bytes() == b"data"
    assert os.listdir(target.parent) == ["a.safetensors"]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    for error in (ValueError("mine"), KeyboardInterrupt(), FileNotFoundError(2, "x", "/else/where")):
        with pytest.raises(type(error)):
            write_half(target, error)
        assert target.read_text() == "old"
        assert os.listdir(tmp_path) == ["a.txt"]


def test_a_writer_that_writes_nothing_is_a_bug_and_not_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with pytest.raises(FileNotFoundError, match="nothing was written"), files.whole(tmp_path / "a"):
        pass
    assert (tmp_path / "a").read_text() == "old"


def test_the_mode_follows_the_umask_whatever_the_writer_did(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with files.whole(tmp_path / "a") as temporary:
            temporary.write_text("x")
            temporary.chmod(0o600)  # as safetensors does
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_side_files_of_a_writer_do_not_stay(tmp_path: Path) -> None:
    with files.whole(tmp_path / "a") as temporary:
        temporary.with_suffix(".tmp").write_text("scratch")
        temporary.write_text("x")
    assert os.listdir(tmp_path) == ["a"]


def test_the_file_is_flushed_before_it_is_renamed_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    fsync, replace = os.fsync, os.replace

    def spy_fsync(descriptor: int) -> None:
        calls.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")
        fsync(descriptor)

    def spy_replace(source: Path, target: Path) -> None:
        calls.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "replace", spy_replace)
    files.write_text(tmp_path / "a", "x")
    assert calls == ["file", "rename", "folder"]


@pytest.mark.parametrize("name", ["mkdir", "fchmod", "fsync", "replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EACCES])
def test_every_failing_call_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, number: int
) -> None:
    target = tmp_path / "a.txt"
    files.write_text(target, "old")

    def fail(*_arguments: object, **_options: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, name, fail)
    with pytest.raises(CompressError) as caught:
        files.write_text(target, "new")
    monkeypatch.undo()
    assert caught.value.exit_code == (3 if number == errno.EACCES else 7)
    assert str(target) in str(caught.value)
    if number in (errno.ENOSPC, errno.EDQUOT):
        assert "bytes free" in str(caught.value)
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_full_disk_told_in_a_native_writers_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ResourceError, match="no space left"), files.whole(tmp_path / "a"):
        raise Exception("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(RuntimeError, match="unexpected pos"), files.whole(tmp_path / "a"):
        raise RuntimeError("unexpected pos 64 vs 32")  # with room on the disk it is another fault
    monkeypatch.setattr(files, "_free_bytes", lambda folder: 0)
    with pytest.raises(ResourceError, match=r"0 bytes free"), files.whole(tmp_path / "a"):
        raise RuntimeError("unexpected pos 64 vs 32")
    with pytest.raises(IntegrityError, match="mine"), files.whole(tmp_path / "a"):
        raise IntegrityError("mine: no space left")  # our own errors pass as they are


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    options = ["-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(["mount", *options], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("a small file system cannot be mounted here (needs root)")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_really_full_disk(small_disk: Path) -> None:
    target = small_disk / "a.bin"
    files.write_text(target, "old" * 10_000)
    with pytest.raises(ResourceError, match=r"a\.bin: no space left .*bytes free\); make room") as caught:
        files.write_text(target, "n" * 300_000)
    assert caught.value.exit_code == 7
    assert target.read_text() == "old" * 10_000
    assert os.listdir(small_disk) == ["a.bin"]
    files.write_text(target, "works again")
    assert target.read_text() == "works again"


def test_safetensors_on_a_really_full_disk(small_disk: Path) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    target = small_disk / "a.safetensors"
    with pytest.raises(ResourceError, match="no space left"), files.whole(target) as temporary:
        save_file({"a": np.zeros(100_000)}, temporary)
    assert os.listdir(small_disk) == []


@pytest.mark.parametrize(
    ("name", "content"), [("folder", "folder"), ("file/a", "a file in the way"), ("x" * 300, "a long name")]
)
def test_places_that_cannot_be_written(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text(content)
    with pytest.raises(ConfigError, match=r"cannot be written: .*; choose a folder"):
        files.write_text(tmp_path / name, "x")
    assert leftovers(tmp_path) == []


KILLED_AT = """
import os, signal, sys
from compress import files
target, call, nth = sys.argv[1], sys.argv[2], int(sys.argv[3])
original, count = getattr(os, call), 0
def kill(*arguments, **options):
    global count
    count += 1
    if count == nth:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments, **options)
setattr(os, call, kill)
files.write_text(target, "new" * 100_000)
"""


@pytest.mark.parametrize(
    ("call", "nth", "expected"),
    [("mkdir", 1, "old"), ("fsync", 1, "old"), ("replace", 1, "old"), ("fsync", 2, "new" * 100_000)],
)
def test_killed_at_each_step(tmp_path: Path, call: str, nth: int, expected: str) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    process = python(KILLED_AT, str(target), call, str(nth))
    assert process.wait(60) == -signal.SIGKILL
    assert target.read_text() == expected
    files.clean(tmp_path)
    assert os.listdir(tmp_path) == ["a.txt"]


REWRITES = """
import hashlib, itertools, sys
from compress import files
print("ready", flush=True)
for n in itertools.count(int(sys.argv[2])):
    body = str(n) * 60_000
    files.write_text(sys.argv[1], hashlib.sha256(body.encode()).hexdigest() + body)
"""


@pytest.mark.slow
def test_a_file_is_whole_after_every_sigkill(tmp_path: Path) -> None:
    target, chance = tmp_path / "a.txt", random.Random(0)
    for round_ in range(30):
        process = python(REWRITES, str(target), str(1000 * (round_ + 1)))
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        while round_ == 0 and not target.exists():
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.03))
        process.kill()
        assert process.wait(60) == -signal.SIGKILL
        digest, body = target.read_text()[:64], target.read_text()[64:]
        assert hashlib.sha256(body.encode()).hexdigest() == digest
    with files.lock(tmp_path):
        assert leftovers(tmp_path) == []
    assert sorted(os.listdir(tmp_path)) == [".lock", "a.txt"]


def test_clean_spares_what_others_are_writing(tmp_path: Path) -> None:
    dead = tmp_path / "deep" / ".part-999999999-0123abcd"
    alive = tmp_path / f".part-{os.getppid()}-0123abcd"
    mine = tmp_path / f".part-{os.getpid()}-0123abcd"  # a former process of the same number, as in containers
    named = tmp_path / ".part-notes"
    for folder in (dead, alive, mine, named):
        folder.mkdir(parents=True)
        (folder / "x").write_text("x")
    with files.whole(tmp_path / "a") as temporary:
        temporary.write_text("x")
        assert sorted(files.clean(tmp_path)) == sorted([dead, mine])
    assert sorted(os.listdir(tmp_path)) == sorted([alive.name, named.name, "a", "deep"])


# --- text, JSON, hashes


def test_text_with_an_undecodable_file_name(tmp_path: Path) -> None:
    files.write_text(tmp_path / "a", "größe \udc80\r\n")
    assert (tmp_path / "a").read_bytes() == "größe ".encode() + b"\\udc80\r\n"


def test_json_goes_round(tmp_path: Path) -> None:
    value = {"b": 1, "a": [1.5, None, True, "é\udc80\n"], "c": {}}
    files.write_json(tmp_path / "a.json", value)
    text = (tmp_path / "a.json").read_text()
    assert text.endswith("}\n")
    assert text.startswith('{\n "b": 1,\n')  # keys in their order
    assert files.read_json(tmp_path / "a.json") == value


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_json_refuses_what_is_not_a_number_and_says_where(tmp_path: Path, bad: float) -> None:
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(ValueError, match=r"latency\[1\]\.cv is not a finite number"):
        files.write_json(tmp_path / "a.json", {"latency": [{"cv": 1.0}, {"cv": bad}]})
    assert (tmp_path / "a.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "not whole JSON"),
        (b'{"a": 1', "not whole JSON .*line 1, column 8"),
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b'{"a": -Infinity}', "not a JSON number"),
        (b'{"a": 1e999}', "1e999 is too large"),
        (b'{"a": 1, "a": 2}', "a key is given twice"),
        (b'{"a": "\xff"}', r"not UTF-8 text \(byte 7\)"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[" + b"9" * 5000 + b"]", "not valid JSON"),
        (b"1" * 2_000_000, "larger than 1000000 bytes"),
    ],
)
def test_broken_json_is_refused(tmp_path: Path, data: bytes, words: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match=words) as caught:
        files.read_json(path, 1_000_000)
    assert str(caught.value).startswith(str(path))
    assert str(caught.value).isprintable()


def test_json_of_a_missing_file_a_folder_and_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # must not wait for a writer
    for name, words in (
        ("none", "No such file"),
        (".", "Is a directory|not a regular file"),
        ("pipe", "not a regular file"),
    ):
        with pytest.raises(IntegrityError, match=words):
            files.read_json(tmp_path / name)


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc" * 100_000)
    assert files.sha256(tmp_path / "a") == hashlib.sha256(b"abc" * 100_000).hexdigest()
    with pytest.raises(IntegrityError, match="none: cannot be read: No such file"):
        files.sha256(tmp_path / "none")


# --- lock

HOLD = """
import sys, time
from compress import files
with files.lock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_run_is_refused_and_told_who_holds_it(tmp_path: Path) -> None:
    process = python(HOLD, str(tmp_path / "run"))
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        begin = time.monotonic()
        with pytest.raises(LockedError) as caught, files.lock(tmp_path / "run"):
            pytest.fail("two holders")
        assert time.monotonic() - begin < 1  # it never waits
        words = f"{tmp_path / 'run'}: another run holds this folder (process {process.pid} on "
        assert str(caught.value).startswith(words)
        assert str(caught.value).endswith("; wait for it to end, or choose another folder with --out")
    finally:
        process.kill()
        process.wait(60)
    assert (tmp_path / "run" / files.HOLDER_NAME).exists()  # only advice: it outlives the killed holder
    with files.lock(tmp_path / "run"):
        holder = json.loads((tmp_path / "run" / files.HOLDER_NAME).read_text())
        assert holder["pid"] == os.getpid()


def test_the_lock_is_free_after_the_block_and_after_an_error(tmp_path: Path) -> None:
    for _ in range(2):
        with files.lock(tmp_path) as folder:
            assert folder == tmp_path
        with pytest.raises(ValueError, match="mine"), files.lock(tmp_path):
            raise ValueError("mine")
    assert os.listdir(tmp_path) == [".lock"]


@pytest.mark.parametrize("holder", ["", "[]", '{"pid": "x"}', '{"pid": 1}', "\0"])
def test_a_broken_side_file_only_shortens_the_message(tmp_path: Path, holder: str) -> None:
    with files.lock(tmp_path):
        (tmp_path / files.HOLDER_NAME).write_text(holder)
        with pytest.raises(LockedError, match="another run holds this folder; wait"), files.lock(tmp_path):
            pytest.fail("two holders")


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"), files.lock(tmp_path / "file" / "run"):
        pytest.fail("not a folder")


RACE = """
import os, sys, time
from compress import files
from compress.errors import LockedError
folder, start = sys.argv[1], float(sys.argv[2])
for n in range(10):
    time.sleep(max(0, start + 0.05 * n - time.time()))
    try:
        with files.lock(folder):
            os.mkdir(folder + "/only-one")  # fails if another is inside
            time.sleep(0.005)
            os.rmdir(folder + "/only-one")
        print("won")
    except LockedError:
        print("lost")
"""


def test_many_processes_never_hold_it_together(tmp_path: Path) -> None:
    start = str(time.time() + 1.5)
    processes = [python(RACE, str(tmp_path), start) for _ in range(4)]
    results = [process.communicate(timeout=60)[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0] * 4
    assert all(len(result) == 10 for result in results)
    assert sum(result.count("won") for result in results) >= 10


def test_no_torch() -> None:
    code = "import sys, compress.files, compress.manifest; print('torch' in sys.modules)"
    assert python(code).communicate(timeout=60)[0] == "False\n"

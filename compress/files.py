"""Crash safety: the one place of a run that writes files, hashes them and locks its folder.

A file becomes visible under its name only when it is whole and on the disk (`deploy.files` says how); what
goes wrong is said with what to do about it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
import socket
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

from filelock import FileLock, Timeout

from compress.errors import CompressError, ConfigError, IntegrityError, LockedError, ResourceError
from deploy.files import SCRATCH, flush_folder, live, publish, scratch

JSON_BYTES = 256 * 2**20  # the largest JSON file read back; ours are far smaller
LOCK_NAME = ".lock"
HOLDER_NAME = ".holder.json"

_FULL = {errno.ENOSPC, errno.EDQUOT}
_EXHAUSTED = _FULL | {errno.EFBIG, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM}
# Native writers report a full disk in words of their own, not as an OSError.
_FULL_TEXT = re.compile(r"no space left|os error 28\b|os error 122\b|quota exceeded", re.IGNORECASE)
_NEARLY_NOTHING = 64 * 2**10  # bytes free below which a native writer's RuntimeError is blamed on the disk


@contextmanager
def whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Write ``path`` all or nothing: yields where to write, and publishes it when the block ends well.

    The yielded path has the same file name, in a scratch folder beside ``path`` (missing folders are made).
    An error in the block leaves ``path`` as it was and removes the scratch folder. A full disk or quota is a
    ResourceError that names ``path`` and the free bytes; a place that cannot be written to is a ConfigError.
    """
    target = Path(path)
    with _scratch(target) as beside:
        temporary = beside / target.name
        try:
            yield temporary
        except OSError as error:
            if error.errno in _EXHAUSTED or _is_within(error.filename, beside):
                _refuse(error, target)
            raise
        except CompressError:
            raise
        except Exception as error:
            if _looks_full(error, target.parent):
                _refuse(OSError(errno.ENOSPC, str(error)), target)
            raise
        if not temporary.exists():
            raise FileNotFoundError(errno.ENOENT, "nothing was written to the path that whole() gave", path)
        try:
            publish(temporary, target)
        except OSError as error:
            _refuse(error, target)


@contextmanager
def whole_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """`whole` for a folder of files: yields an empty folder, and publishes it with all that is in it.

    ``path`` may not be there yet, or is an empty folder; anything else is a ConfigError.
    """
    target = Path(os.path.abspath(path))
    if os.path.lexists(target) and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError("is there already", os.fspath(path), "give the name of a new folder")
    with _scratch(target) as beside:
        temporary = beside / target.name
        try:
            temporary.mkdir()
            yield temporary
            for parent, _folders, names in os.walk(temporary):
                for name in names:
                    _flush(Path(parent, name))
            os.replace(temporary, target)
            flush_folder(target.parent)
        except OSError as error:
            if error.errno in _EXHAUSTED or _is_within(error.filename, beside):
                _refuse(error, target)
            raise


def _flush(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


@contextmanager
def _scratch(target: Path) -> Iterator[Path]:
    """An empty folder beside ``target``, removed at the end; its name tells whose it is (see `clean`)."""
    with ExitStack() as opened:
        try:
            folder = opened.enter_context(scratch(target))
        except OSError as error:
            _refuse(error, target)
        yield folder


def _refuse(error: OSError, path: Path) -> NoReturn:
    """Raise ``error`` as what the user can act on."""
    reason = os.strerror(error.errno) if error.errno else str(error)
    if error.errno in _FULL:
        what = f"no space left to write this file ({_free_bytes(path.parent)} bytes free)"
        raise ResourceError(what, str(path), "make room, then run the same command again") from error
    if error.errno in _EXHAUSTED:
        fix = "the file was left as it was; check the disk and the limits (ulimit -a), then try again"
        raise ResourceError(f"writing failed: {reason}", str(path), fix) from error
    what = f"cannot be written: {reason}"
    raise ConfigError(what, str(path), "choose a folder that can be written to") from error


def _free_bytes(folder: Path) -> int:
    for place in (folder, *folder.parents):  # the folder itself may not have been made yet
        with suppress(OSError):
            return shutil.disk_usage(place).free
    return 0


def _looks_full(error: Exception, folder: Path) -> bool:
    if _FULL_TEXT.search(str(error)):
        return True
    return isinstance(error, RuntimeError) and _free_bytes(folder) < _NEARLY_NOTHING


def _is_within(name: object, folder: Path) -> bool:
    return isinstance(name, str | os.PathLike) and Path(name).is_relative_to(folder)


def clean(folder: str | os.PathLike[str]) -> list[Path]:
    """Remove the scratch folders that killed processes left under ``folder``; returns them.

    A scratch folder whose process still lives is left alone. Links are not followed.
    """
    removed = []
    for parent, folders, _files in os.walk(folder):
        for name in list(folders):
            match = SCRATCH.fullmatch(name)
            if match:
                folders.remove(name)
                if name not in live and not _is_other_process(int(match[1])):
                    shutil.rmtree(Path(parent, name), ignore_errors=True)
                    removed.append(Path(parent, name))
    return removed


def _is_other_process(pid: int) -> bool:
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` as UTF-8, all or nothing. Lone surrogates (odd file names) become ``\\udcXX``."""
    data = text.encode("utf-8", errors="backslashreplace")
    with whole(path) as temporary:
        temporary.write_bytes(data)


def dump_json(value: Any) -> str:
    """``value`` as JSON text: indent 1, keys in their order, newline at the end.

    Raises ValueError, naming the place, for NaN and infinities: JSON has no such numbers.
    """
    try:
        return json.dumps(value, allow_nan=False, indent=1, ensure_ascii=False) + "\n"
    except ValueError:
        place = _not_finite(value, "")
        if place is None:
            raise
        raise ValueError(f"cannot be written as JSON: {place} is not a finite number") from None


def _not_finite(value: Any, place: str) -> str | None:
    if isinstance(value, float):
        return None if math.isfinite(value) else place or "the value"
    inside: list[tuple[str, Any]] = []
    if isinstance(value, dict):
        inside = [(f"{place}.{key}".lstrip("."), item) for key, item in value.items()]
    elif isinstance(value, list | tuple):
        inside = [(f"{place}[{index}]", item) for index, item in enumerate(value)]
    return next((found for name, item in inside if (found := _not_finite(item, name))), None)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write ``value`` as JSON (see `dump_json`), all or nothing."""
    write_text(path, dump_json(value))


def read_bytes(path: str | os.PathLike[str], limit: int) -> bytes:
    """At most ``limit + 1`` bytes of a regular file, so that ``len(...) > limit`` tells that it is too big.

    Raises OSError; a folder, pipe or device is refused without waiting on it.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(limit + 1)
    finally:
        os.close(descriptor)


def read_json(path: str | os.PathLike[str], limit: int = JSON_BYTES) -> Any:
    """Read a JSON file that `write_json` wrote.

    Raises IntegrityError when it is missing, over ``limit`` bytes, not UTF-8, not JSON, or holds what JSON
    does not allow or `write_json` never writes (NaN, numbers beyond a float, a key given twice).
    """
    try:
        data = read_bytes(path, limit)
    except OSError as error:
        raise IntegrityError(f"cannot be read: {error.strerror}", str(path)) from error
    if len(data) > limit:
        raise IntegrityError(f"is larger than {limit} bytes, the most that is read", str(path))
    return parse_json(data, str(path))


def parse_json(data: bytes, where: str) -> Any:
    """The value of JSON bytes, strictly (see `read_json`); ``where`` names the file in errors."""
    try:
        return json.loads(
            data.decode("utf-8"),
            parse_constant=_no_constant,
            parse_float=_finite,
            object_pairs_hook=_unique,
        )
    except UnicodeDecodeError as error:
        raise IntegrityError(f"is not UTF-8 text (byte {error.start})", where) from error
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise IntegrityError(f"is not whole JSON ({error.msg}, {place})", where) from error
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise IntegrityError(f"is not valid JSON ({reason})", where) from error


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:30]} is too large a number")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is given twice")
    return found


def sha256(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal. Raises IntegrityError when it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise IntegrityError(f"cannot be read: {error.strerror}", os.fspath(path)) from error


@contextmanager
def lock(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Hold ``folder`` (made if missing) for this process; never waits. Yields the folder.

    It is a lock of the operating system, so it is free again the moment the process ends, even by SIGKILL.
    What killed runs left half-written is removed first. Raises LockedError naming the holder if there is one.
    """
    home = Path(folder)
    holder = home / HOLDER_NAME
    try:
        home.mkdir(parents=True, exist_ok=True)
        held = FileLock(home / LOCK_NAME)
        held.acquire(timeout=0)
    except Timeout:
        fix = "wait for it to end, or choose another folder with --out"
        raise LockedError(f"another run holds this folder{_who(holder)}", str(home), fix) from None
    except OSError as error:
        _refuse(error, home / LOCK_NAME)
    try:
        clean(home)
        started = datetime.now(UTC).isoformat(timespec="seconds")
        write_json(holder, {"pid": os.getpid(), "host": socket.gethostname(), "started": started})
        yield home
    finally:
        with suppress(OSError):
            holder.unlink(missing_ok=True)
        held.release()


def _who(holder: Path) -> str:
    """Who holds the lock, from the side file; nothing when that cannot be told (it is only advice)."""
    try:
        data = read_json(holder, 4096)
        return f" (process {int(data['pid'])} on {data['host']}, since {data['started']})"
    except (IntegrityError, KeyError, TypeError, ValueError):
        return ""

"""Files that appear whole or not at all.

What is written goes into a scratch folder beside its place, is flushed (fsync) and renamed (``os.replace``,
atomic within one file system), and the folder's entry is flushed too: whatever stops the process in between,
the old file stays as it was. Failures are OSErrors; `compress.files` says what to do about them.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SCRATCH = re.compile(r"\.part-(\d+)-[0-9a-f]{8}")
"""The name of a scratch folder, with the process that writes in it: killed ones leave theirs behind."""
live: set[str] = set()
"""Names of the scratch folders that this process is writing in now."""


@contextmanager
def scratch(target: Path) -> Iterator[Path]:
    """An empty folder beside ``target`` (missing folders are made), removed at the end."""
    folder = target.parent / f".part-{os.getpid()}-{secrets.token_hex(4)}"
    live.add(folder.name)
    try:
        if target.parent.exists() and not target.parent.is_dir():  # mkdir says of it that it exists
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(target.parent))
        target.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        live.discard(folder.name)


def publish(temporary: Path, target: Path) -> None:
    """Move a file from its scratch folder to its place. Raises OSError that names the place."""
    try:
        # Some writers (safetensors) create files for their owner only: use the mode that the umask asks for.
        mode = stat.S_IMODE(temporary.parent.stat().st_mode) & 0o666
        descriptor = os.open(temporary, os.O_RDONLY)
        try:
            os.fchmod(descriptor, mode)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, target)
        flush_folder(target.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(target)) from error


def flush_folder(folder: Path) -> None:
    """Put a folder's entries on the disk, where its file system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.ENOTSUP}:  # file systems that cannot flush a folder
            raise
    finally:
        os.close(descriptor)


def write(path: Path, content: bytes) -> None:
    """Write a file, all or nothing."""
    with scratch(path) as folder:
        temporary = folder / path.name
        temporary.write_bytes(content)
        publish(temporary, path)

"""Writing files so that under their name there is always a whole one, the old or the new."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """Write a file beside its place and move it there when it is whole.

    Arguments
    ---------
    path : str | Path
        Its folder is made if it is not there.
    content : str | bytes
        Text is written as UTF-8.

    Raises
    ------
    OSError
        The disk is full, or the folder cannot be written; nothing half-written stays behind.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = content.encode() if isinstance(content, str) else content
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(name, 0o644)  # mkstemp's is for the owner alone
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def open_atomically(path: str | Path) -> Iterator[TextIO]:
    """Open a text file (UTF-8) that appears under its name when the block ends without an error.

    Arguments
    ---------
    path : str | Path
        Its folder is made if it is not there.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            yield file
        os.chmod(name, 0o644)  # mkstemp's is for the owner alone
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise

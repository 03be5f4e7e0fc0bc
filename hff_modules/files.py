"""A file is under its name whole, the old or the new; what cannot be read is named; locks."""

import contextlib
import errno
import fcntl
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import ruamel.yaml

logger = logging.getLogger(__name__)

_NOT_INHERITED: set[IO] = set()  # files of locks

NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  # some network file systems


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
    with open_atomically(path, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def open_atomically(path: str | Path, mode: str = "w") -> Iterator[IO]:
    """Open a file that appears under its name when the block ends without an error.

    Arguments
    ---------
    path : str | Path
        Its folder is made if it is not there.
    mode : str
        "w" for text (UTF-8, lines end as they are written), "wb" for bytes.

    Raises
    ------
    OSError
        As :func:`write_atomically`, which names the file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # else a machine that stops may leave an empty file
        os.chmod(name, 0o644)  # mkstemp's is for the owner alone
        os.replace(name, path)
    except BaseException as error:
        Path(name).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and error.filename is None:
            raise OSError(error.errno, error.strerror, str(path)) from error  # no space left, say
        raise


def read_text(path: str | Path) -> str:
    """Read a text, without the mark that some editors put in front of it.

    Raises
    ------
    ValueError
        It is not UTF-8; names the file.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text ({error})") from None


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises
    ------
    ValueError
        It is none; names the file.
    """
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON, or damaged ({error})") from None


def parse_yaml(text: str, path: str | Path) -> ruamel.yaml.CommentedMap:
    """Take `key: value` lines apart; tags such as ``!new:`` stay on their nodes.

    Raises
    ------
    ValueError
        They are none; names the file that they came from.
    """
    try:
        found = ruamel.yaml.YAML().load(text)
    except ruamel.yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict):
        kind = "nothing" if found is None else type(found).__name__
        raise ValueError(f"{path}: expected `key: value` lines, found {kind}")
    return found


@contextlib.contextmanager
def locked(path: str | Path, wait: bool = True) -> Iterator[IO]:
    """Hold a lock as long as the block lasts; it falls with the process, however that ends.

    Arguments
    ---------
    path : str | Path
        The lock's file, which stays; its folder is made if it is not there.
    wait : bool
        Until another process that holds it is done.

    Raises
    ------
    BlockingIOError
        Without `wait`, if another process holds it; names the folder.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file, _of_this_process_alone(file):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            busy = f"{path.parent}: another process is at work here"
            if not wait:
                raise BlockingIOError(busy) from None
            logger.warning("%s; waiting for its end", busy)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            logger.warning("%s: this file system has no locks; let one job work here", path)
        yield file


@contextlib.contextmanager
def _of_this_process_alone(file: IO) -> Iterator[None]:
    """Close a file in processes that are forked: loaders' workers outlive a kill for seconds."""
    _NOT_INHERITED.add(file)
    try:
        yield
    finally:
        _NOT_INHERITED.discard(file)


def _close_inherited() -> None:
    for file in _NOT_INHERITED:
        file.close()


os.register_at_fork(after_in_child=_close_inherited)


def sync(folder: Path) -> None:
    """Have the files of a folder written to the disk: a machine that stops loses none of them."""
    for path in (*folder.iterdir(), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        except OSError:
            if not path.is_dir():  # some file systems cannot sync a folder
                raise
        finally:
            os.close(handle)

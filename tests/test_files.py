import errno
import os
import signal
import time

import pytest

from hff_modules import files
from hff_modules.files import parse_yaml, read_json, read_text


def test_texts_are_read_with_and_without_a_mark_in_front(tmp_path):
    for encoding in ("utf-8", "utf-8-sig"):
        (tmp_path / "a.json").write_text('{"é": 1}', encoding=encoding)
        assert read_json(tmp_path / "a.json") == {"é": 1}


@pytest.mark.parametrize("content", [b"", b"{", "{}".encode("utf-16"), b"\xe9"])
def test_a_damaged_file_is_named(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=str(path)):
        read_json(path)


def test_a_file_system_without_locks_is_worked_on_with_a_warning(tmp_path, monkeypatch, caplog):
    def refused(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", refused)
    with files.locked(tmp_path / ".lock", wait=False):
        assert "this file system has no locks" in caplog.text


def test_a_lock_falls_with_its_process_though_those_that_it_forked_live_on(tmp_path):
    said, say = os.pipe()
    with files.locked(tmp_path / ".lock"):
        child = os.fork()
        if child == 0:  # as a loader's worker, which notices late that its parent was killed
            os.write(say, b"!")
            time.sleep(60)
            os._exit(0)
        os.read(said, 1)
        with pytest.raises(BlockingIOError), files.locked(tmp_path / ".lock", wait=False):
            pass
    try:
        with files.locked(tmp_path / ".lock", wait=False):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_text_of_another_encoding_is_named(tmp_path):
    (tmp_path / "lm.txt").write_text("wie geht es", encoding="utf-16")
    with pytest.raises(ValueError, match="lm.txt: expected UTF-8 text"):
        read_text(tmp_path / "lm.txt")


@pytest.mark.parametrize("text", ["", "- 1", "a: {", "word"])
def test_what_is_no_mapping_is_refused(text):
    with pytest.raises(ValueError, match="here.yaml"):
        parse_yaml(text, "here.yaml")

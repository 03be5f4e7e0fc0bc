"""What was recognised, as text, JSON lines or subtitles, in one file or a folder of them."""

import contextlib
import itertools
import json
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from hff_modules.data.audio import AudioError
from hff_modules.export_format import ExportError
from hff_modules.files import open_atomically
from hff_modules.recordings import Recording

SUFFIXES = {"text": ".txt", "jsonl": ".jsonl", "srt": ".srt"}
PAUSE, CUE_SECONDS, CUE_LETTERS = 1.0, 6.0, 84  # where a subtitle ends


@dataclass(frozen=True)
class TimedWord:
    """A word, and from when to when it lasts in seconds; ``joined``: it needs no space before."""

    text: str
    start: float
    end: float
    joined: bool = False


def write_text(name: str, found: Iterable[TimedWord], file: TextIO) -> None:
    """Write all words in one line, after the name and a tab where there is a name."""
    file.write(f"{name}\t" if name else "")
    for number, word in enumerate(found):
        file.write(_space(word) * (number > 0) + word.text)
    file.write("\n")


def write_jsonl(name: str, found: Iterable[TimedWord], file: TextIO) -> None:
    """Write one line of JSON: ``file``, ``words`` with times in seconds, ``text``."""
    with _spool() as text:
        write_text("", _noting(found, name, file), text)
        text.seek(0)
        file.write('], "text": "')
        while piece := text.read(1 << 16):
            file.write(json.dumps(piece.rstrip("\n"), ensure_ascii=False)[1:-1])
        file.write('"}\n')


def _noting(found: Iterable[TimedWord], name: str, file: TextIO) -> Iterator[TimedWord]:
    file.write(f'{{"file": {json.dumps(name, ensure_ascii=False)}, "words": [')
    for number, word in enumerate(found):
        entry = {"word": word.text, "start": word.start, "end": word.end}
        entry |= {"joined": True} if word.joined and number else {}
        file.write(", " * (number > 0) + json.dumps(entry, ensure_ascii=False))
        yield word


def write_srt(name: str, found: Iterable[TimedWord], file: TextIO) -> None:
    """Write subtitles: a cue ends at a pause, or when it has become long."""
    cue: list[TimedWord] = []
    number = 1
    for word in itertools.chain(found, [None]):
        if cue and (word is None or _is_full(cue, word)):
            times = f"{_clock(cue[0].start)} --> {_clock(cue[-1].end)}"
            text = "".join(_space(one) + one.text for one in cue).strip()
            file.write(f"{number}\n{times}\n{text}\n\n")
            cue, number = [], number + 1
        cue.append(word)


def _is_full(cue: Sequence[TimedWord], word: TimedWord) -> bool:
    letters = sum(len(one.text + _space(one)) for one in (*cue, word))
    paused = word.start - cue[-1].end > PAUSE
    return paused or letters > CUE_LETTERS or word.end - cue[0].start > CUE_SECONDS


def _space(word: TimedWord) -> str:
    return "" if word.joined else " "


def _clock(seconds: float) -> str:
    whole, thousandths = divmod(round(1000 * seconds), 1000)
    return f"{whole // 3600:02}:{whole // 60 % 60:02}:{whole % 60:02},{thousandths:03}"


WRITERS = {"text": write_text, "jsonl": write_jsonl, "srt": write_srt}


def _spool() -> TextIO:
    """A file in memory while it is small, on disk when it grows."""
    return tempfile.SpooledTemporaryFile(1 << 20, "w+", encoding="utf-8", newline="\n")


class Sink:
    """Where results go: standard output, one file, or a file for each recording in a folder.

    A file appears under its name when it is whole.

    Arguments
    ---------
    output : str, optional
        A file, if it ends like one; a folder otherwise; standard output by default.
    kind : str
        "text", "jsonl" or "srt".
    """

    def __init__(self, output: str | None, kind: str):
        self.kind, self.path = kind, Path(output) if output else None
        self.is_folder = output is not None and (self.path.is_dir() or not self.path.suffix)
        self.file: TextIO = sys.stdout
        self.expected: set[Path] = set()  # files, or the recordings of one file

    def __enter__(self) -> "Sink":
        self._open = contextlib.ExitStack()
        if self.path is not None and not self.is_folder:
            self.file = self._open.enter_context(open_atomically(self.path))
        return self

    def __exit__(self, *error) -> None:
        self._open.__exit__(*error)

    def expect(self, recording: Recording) -> None:
        """Say, before it is heard, that a recording's words will be written.

        Raises
        ------
        ExportError
            They would be the second subtitles in one file.
        AudioError
            Their file is another recording's, or lies beside the recording already: a corpus keeps
            its transcripts there.
        """
        if not self.is_folder:
            if self.kind == "srt" and self.expected:
                raise ExportError("subtitles of several recordings: give a folder as --output")
            self.expected.add(recording.place)
            return
        target = self._target(recording)
        if target in self.expected:
            raise AudioError(f"{recording.name}: {target} is there of another recording")
        if target.exists() and target.parent.resolve() == recording.path.parent.resolve():
            raise AudioError(
                f"{recording.name}: {target} lies beside it and may be its transcript; choose "
                "another --output, or delete it"
            )
        self.expected.add(target)

    def _target(self, recording: Recording) -> Path:
        place = self.path / recording.place
        return place.with_name(place.name + SUFFIXES[self.kind])

    def write(self, recording: Recording, found: Iterable[TimedWord]) -> None:
        """Write one recording's words, or nothing of it if they cannot be had."""
        own_text = self.is_folder and self.kind == "text"
        with _spool() as whole:
            WRITERS[self.kind]("" if own_text else recording.name, found, whole)
            whole.seek(0)
            if not self.is_folder:
                shutil.copyfileobj(whole, self.file)
                self.file.flush()
                return
            with open_atomically(self._target(recording)) as file:
                shutil.copyfileobj(whole, file)

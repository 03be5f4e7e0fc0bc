"""Transcribe recordings of any length with an exported model.

    python -m hff_modules.transcribe my_model speech.wav
    python -m hff_modules.transcribe my_model calls/ "*.mp3" --format jsonl --output calls.jsonl
    python -m hff_modules.transcribe my_model speech.wav --lm      # the language model of training
    cat speech.flac | python -m hff_modules.transcribe my_model - --format srt

A recording that is longer than a window is read in overlapping windows, which are joined at the
frame where both hear a pause, so memory does not grow with its length. One line on standard error
for each recording that failed; the exit code is then 1, and all others are done.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from speechbrain.decoders.ctc import CTCPrefixBeamSearcher
from tqdm import tqdm

from hff_modules.alignment import Word, aligned, best_path, words, written
from hff_modules.cli import default_device, run, usable_device
from hff_modules.data.audio import AudioError, read_audio
from hff_modules.data.batches import by_length, padded
from hff_modules.data.loading import needed_frames
from hff_modules.data.text import Units
from hff_modules.export_format import ExportError
from hff_modules.exported import Exported, load_exported
from hff_modules.recordings import (
    SAMPLE_RATE,
    Failure,
    Recording,
    find_recordings,
    read_pieces,
    windows,
)
from hff_modules.transcripts import SUFFIXES, Sink, TimedWord

AT_ONCE = 256  # recordings; results come in the order of the recordings
BEAM = 50
Search = Callable[[torch.Tensor, torch.Tensor], list[str]]


class Decoder:
    """From log probabilities to words, in scripts without spaces letters, and their frames.

    Arguments
    ---------
    units : CharUnits | SentencePieceUnits
    search : callable, optional
        From log probabilities (1, frames, units) and relative lengths (1,) to a list of one text;
        the best path by default.
    """

    def __init__(self, units: Units, search: Search | None = None):
        self.units, self.written, self.search = units, written(units), search

    def best_words(self, log_probs: torch.Tensor) -> list[Word]:
        """Words of the best path through (frames, units)."""
        labels = log_probs.argmax(-1).tolist()
        return words(best_path(labels, self.units.blank_index), self.written)

    def words(self, log_probs: torch.Tensor) -> list[Word]:
        """Words of the best path, or of the beam search, aligned to the frames."""
        if self.search is None or len(log_probs) == 0:
            spans = best_path(log_probs.argmax(-1).tolist(), self.units.blank_index)
            return words(spans, self.written, by_letter=True)
        text = self.search(log_probs[None], torch.ones(1))[0]
        ids = self.units.encode(text)
        if needed_frames(ids) > len(log_probs):  # spelt otherwise than the search did
            return [Word(word, 0, len(log_probs)) for word in text.split()]
        spans = aligned(log_probs, ids, self.units.blank_index)
        return words(spans, self.written, by_letter=True)


def beam_search(units: Units, width: int) -> Search:
    """SpeechBrain's prefix beam search, for :class:`Decoder`."""
    searcher = CTCPrefixBeamSearcher(
        blank_index=units.blank_index, vocab_list=units.vocab_list, beam_size=width
    )
    return lambda log_probs, wav_lens: [found[0].text for found in searcher(log_probs, wav_lens)]


class Transcriber:
    """An exported recogniser for recordings of any length.

    Arguments
    ---------
    model : Exported
        Of the task "asr".
    window : float
        Seconds that are heard at once; what is no longer than this is heard as a whole.
    overlap : float
        Seconds that two windows share.
    batch_seconds : float
        Of speech in a batch.
    beam : int, optional
        Width of a beam search; the best path by default.
    lm : bool
        Search with the language model that the recogniser was exported with. Each stretch between
        two joints of windows is a sentence to it.

    Example
    -------
    >>> transcriber = Transcriber(load_exported("my_model"))                # doctest: +SKIP
    >>> [word.text for word in transcriber.stream(read_pieces("a.wav"))]    # doctest: +SKIP
    ['HELLO', 'WORLD']
    """

    def __init__(
        self,
        model: Exported,
        window: float = 40.0,
        overlap: float = 8.0,
        batch_seconds: float = 60.0,
        beam: int | None = None,
        lm: bool = False,
    ):
        if model.task != "asr":
            raise ExportError(f"{model.folder} is a model for {model.task}, not a recogniser (asr)")
        search = None
        if lm:
            search = model.search_with_lm(beam)
        elif beam is not None:
            search = beam_search(model.units, beam)
        self.model, self.decoder = model, Decoder(model.units, search)
        self.frame_rate = model.encoder.frame_rate
        longest = model.encoder.maximum_samples
        window = window if longest is None else min(window, longest / SAMPLE_RATE)
        self.overlap = round(overlap * self.frame_rate)  # in frames
        self.hop = int(window * self.frame_rate) - self.overlap
        if self.overlap < 2 or self.hop < self.overlap:
            raise ValueError(
                f"window={window:g} and overlap={overlap:g} seconds: expected a window of at least "
                "twice the overlap, and an overlap of some frames"
            )
        self.window, self.batch_seconds = window, batch_seconds
        self._per_frame = round(SAMPLE_RATE / self.frame_rate)  # samples

    def batch(self, signals: Sequence[torch.Tensor]) -> list[list[TimedWord]]:
        """Recognise signals (samples,) that are no longer than a window, together."""
        return [self._timed(row, 0) for row in self._log_probs(signals)]

    def stream(self, pieces: Iterable[torch.Tensor]) -> Iterator[TimedWord]:
        """Recognise one signal of any length that comes in pieces (samples,)."""
        size = (self.hop + self.overlap) * self._per_frame
        heard = self._heard(windows(pieces, size, self.overlap * self._per_frame))
        held, offset, spaced = None, 0, False
        for piece in joined(heard, self.hop, self.overlap, self.decoder.units.blank_index):
            held = piece if held is None else torch.cat([held, piece])
            done = self._complete(held)
            yield from self._timed(held[:done], offset, spaced)
            spaced = self._ends_with_space(held[:done], spaced)
            held, offset = held[done:], offset + done
        yield from self._timed(held, offset, spaced)

    def _heard(self, signals: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        at_once = max(1, int(self.batch_seconds // self.window))
        for group in grouped(signals, at_once):
            yield from self._log_probs(group)

    def _log_probs(self, signals: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        device = self.model.device
        wavs, wav_lens = padded(signals, self.model.encoder.minimum_samples)
        states, frames = self.model.states(wavs.to(device), wav_lens.to(device))
        outputs = self.model.outputs(states, frames).cpu()
        return [row[:count] for row, count in zip(outputs, frames.tolist(), strict=True)]

    def _complete(self, log_probs: torch.Tensor) -> int:
        """How many frames from the front hold whole words, which nothing that follows changes."""
        found = self.decoder.best_words(log_probs)
        if len(found) != 1:
            return found[-1].start if found else len(log_probs)
        if len(log_probs) < 2 * (self.hop + self.overlap):
            return 0
        # One endless word, as in scripts without spaces: where the longest silence of late is.
        half = len(log_probs) // 2
        silent = log_probs[half:].argmax(-1) == self.decoder.units.blank_index
        inside = _middle_of_longest(silent.tolist())
        return len(log_probs) if inside is None else half + inside

    def _ends_with_space(self, log_probs: torch.Tensor, before: bool) -> bool:
        labels = log_probs.argmax(-1)
        said = labels[labels != self.decoder.units.blank_index]
        return self.decoder.written[int(said[-1])][-1:].isspace() if len(said) else before

    def _timed(
        self, log_probs: torch.Tensor | None, offset: int, spaced: bool = False
    ) -> list[TimedWord]:
        """Words with times; ``spaced``: there was a space before the first of them."""
        if log_probs is None or len(log_probs) == 0:
            return []
        return [
            TimedWord(
                word.text,
                round((offset + word.start) / self.frame_rate, 3),
                round((offset + word.end) / self.frame_rate, 3),
                word.joined and not (spaced and number == 0),
            )
            for number, word in enumerate(self.decoder.words(log_probs))
        ]


def joined(
    heard: Iterable[torch.Tensor], hop: int, overlap: int, blank: int
) -> Iterator[torch.Tensor]:
    """Join the frames of overlapping windows to those of the whole.

    Two windows are joined inside what they share, away from its ends, where each lacks context: in
    the middle of the longest pause that both hear. So no unit is heard twice and none is lost, even
    if the windows place it some frames apart.

    Arguments
    ---------
    heard : Iterable[torch.Tensor]
        Log probabilities (frames, units) of each window.
    hop : int
        Frames between the starts of two windows.
    overlap : int
        Frames that two windows share.
    blank : int

    Yields
    ------
    torch.Tensor
        (frames, units), one after the other.
    """
    last, start = None, 0
    for current in heard:
        if last is not None:
            seam = _seam(last[hop:], current[:overlap], blank)
            yield last[start : hop + seam]
            start = seam
        last = current
    if last is not None:
        yield last[start:]


def _seam(before: torch.Tensor, after: torch.Tensor, blank: int) -> int:
    count = min(len(before), len(after))
    low, high = count // 4, count - count // 4
    silent = [(side[low:high].argmax(-1) == blank) for side in (before[:count], after[:count])]
    inside = _middle_of_longest((silent[0] & silent[1]).tolist())
    if inside is None:
        inside = int((before[low:high, blank] + after[low:high, blank]).argmax())
    return low + inside


def _middle_of_longest(flags: Sequence[bool]) -> int | None:
    """The middle of the longest run of True; None without any."""
    best, run = (0, None), 0
    for index, flag in enumerate(flags):
        run = run + 1 if flag else 0
        if run > best[0]:
            best = (run, index - run // 2)
    return best[1]


def grouped(things: Iterable, size: int) -> Iterator[list]:
    """Give things in lists of so many."""
    group = []
    for thing in things:
        group.append(thing)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def transcribe(
    model: Exported,
    inputs: Sequence[str],
    output: str | None = None,
    kind: str = "text",
    progress: bool = True,
    **options,
) -> list[Failure]:
    """Transcribe recordings.

    Arguments
    ---------
    model : Exported
        Of the task "asr".
    inputs : Sequence[str]
        Files, folders, patterns, or ``-`` for standard input.
    output : str, optional
        A file or a folder; standard output by default.
    kind : str
        "text", "jsonl" or "srt".
    progress : bool
        Show a bar, on standard error if that is a terminal.
    **options
        For :class:`Transcriber`.

    Returns
    -------
    list[Failure]
        What could not be read; each has been said on standard error.
    """
    transcriber, failures = Transcriber(model, **options), []

    def failed(failure: Failure) -> None:
        failures.append(failure)
        tqdm.write(f"failed: {failure}", file=sys.stderr)

    with (
        tempfile.TemporaryDirectory() as spool,
        Sink(output, kind) as sink,
        tqdm(unit=" s", unit_scale=True, desc="transcribing", disable=None if progress else True)
        as bar,
    ):  # fmt: skip
        for group in grouped(find_recordings(inputs, Path(spool)), AT_ONCE):
            recordings = []
            for one in group:
                if isinstance(one, Failure):
                    failed(one)
                    continue
                try:
                    sink.expect(one)
                    recordings.append(one)
                except AudioError as error:
                    failed(Failure(one.name, str(error)))
            bar.total = (bar.total or 0) + round(sum(one.seconds for one in recordings))
            short = [one for one in recordings if one.seconds <= transcriber.window]
            found = _short(transcriber, short, bar)
            for recording in recordings:
                try:
                    if recording in found:
                        result = found.pop(recording)
                        if isinstance(result, AudioError):
                            raise result
                    else:
                        pieces = _counted(read_pieces(recording.path), bar)
                        result = transcriber.stream(pieces)
                    sink.write(recording, result)
                except AudioError as error:
                    reason = str(error).replace(str(recording.path), recording.name)
                    failed(Failure(recording.name, reason))
    return failures


def _short(
    transcriber: Transcriber, recordings: Sequence[Recording], bar: tqdm
) -> dict[Recording, Iterable[TimedWord] | AudioError]:
    """Recognise what is heard as a whole, in batches by length."""
    found: dict[Recording, Iterable[TimedWord] | AudioError] = {}
    for batch in by_length(recordings, lambda one: one.seconds, transcriber.batch_seconds):
        signals = {}
        for recording in batch:
            try:
                signal = read_audio(recording.path)
                if len(signal) <= transcriber.window * SAMPLE_RATE:
                    signals[recording] = signal
                else:  # the header, of an mp3 say, tells less than there is
                    found[recording] = transcriber.stream(read_pieces(recording.path))
            except AudioError as error:
                found[recording] = error
        if signals:
            results = transcriber.batch(list(signals.values()))
            found.update(zip(signals, results, strict=True))
        bar.update(sum(recording.seconds for recording in batch))
    return found


def _counted(pieces: Iterable[torch.Tensor], bar: tqdm) -> Iterator[torch.Tensor]:
    for piece in pieces:
        yield piece
        bar.update(len(piece) / SAMPLE_RATE)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m hff_modules.transcribe", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("model", help="exported model: a folder, or a name on the hub")
    parser.add_argument("inputs", nargs="+", help="files, folders, patterns, or - for audio")
    parser.add_argument("--format", choices=SUFFIXES, default="text")
    parser.add_argument("--output", help="file, or folder for a file each; else standard output")
    parser.add_argument("--beam", type=int, nargs="?", const=BEAM, help="beam search of this width")
    parser.add_argument("--lm", action="store_true", help="with the model's language model")
    parser.add_argument("--window", type=float, default=40.0, help="seconds heard at once")
    parser.add_argument("--overlap", type=float, default=8.0, help="seconds that windows share")
    parser.add_argument("--batch-seconds", type=float, default=60.0)
    parser.add_argument("--device", default=default_device(), help="such as cpu or cuda:0")
    parser.add_argument("--encoder", help="another place of the base encoder")
    parser.add_argument("--revision", help="of the model on the hub")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    options = parser.parse_args(argv)
    model = load_exported(
        options.model,
        usable_device(options.device),
        base=options.encoder,
        revision=options.revision,
    )
    failures = transcribe(
        model,
        options.inputs,
        options.output,
        options.format,
        progress=not options.quiet,
        window=options.window,
        overlap=options.overlap,
        batch_seconds=options.batch_seconds,
        beam=options.beam,
        lm=options.lm,
    )
    if failures:
        sys.exit(1)


if __name__ == "__main__":
    run(main)

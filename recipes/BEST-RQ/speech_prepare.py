"""Unlabelled speech for pretraining: audio from any folders to one file of log-mels and a manifest.

The log-mels are those that the encoder reads (`transformers.SeamlessM4TFeatureExtractor`), computed
once and kept in half precision: on a CPU, decoding and filter banks would be paid in every epoch.
"""

import csv
import json
import logging
import multiprocessing
import os
import random
import re
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import torch

from hff_modules.data.audio import AudioError, read_audio
from hff_modules.files import open_atomically, write_atomically
from hff_modules.frontend import KaldiLogMel

logger = logging.getLogger(__name__)

SAMPLE_RATE = 16000
AUDIO_ENDINGS = {".wav", ".flac", ".mp3", ".opus", ".ogg"}
SPEAKER_COLUMNS = ("spk_id", "client_id", "speaker")
AUDIO_COLUMNS = ("wav", "path", "file")


def reason_to_skip(wav, min_seconds=0.4, min_level=-65.0, max_clipped=0.02):
    """Why a recording is of no use for pretraining, or None.

    Arguments
    ---------
    wav : torch.Tensor
        (samples,) at 16 kHz, full scale 1.
    min_seconds : float
        Shorter recordings are "too short".
    min_level : float
        Recordings whose root mean square is below this, in dB of full scale, are "silent".
    max_clipped : float
        Recordings with a larger share of samples at full scale are "clipped".

    Returns
    -------
    str or None

    Example
    -------
    >>> reason_to_skip(torch.zeros(16000))
    'silent'
    """
    if len(wav) < min_seconds * SAMPLE_RATE:
        return "too short"
    if wav.square().mean() < 10 ** (min_level / 10):
        return "silent"
    if (wav.abs() >= 0.999).float().mean() > max_clipped:
        return "clipped"
    return None


def find_audio(source):
    """Every recording of one source, with its speaker.

    Arguments
    ---------
    source : str
        A folder (all audio below it), or a .tsv/.csv table with a column wav, path or file; names
        in it are relative to the table's folder or to `clips` beside it (Common Voice).

    Returns
    -------
    list of (path, speaker)
        Without a speaker column the speaker is the file name up to the first "-" or "_".
    """
    source = Path(source)
    if source.is_dir():
        paths = sorted(p for p in source.rglob("*") if p.suffix.lower() in AUDIO_ENDINGS)
        if not paths:
            raise ValueError(f"no audio ({', '.join(sorted(AUDIO_ENDINGS))}) below {source}")
        return [(str(p), re.split("[-_]", p.stem)[0]) for p in paths]
    if not source.is_file():
        raise FileNotFoundError(f"sources: {source} is neither a folder nor a table")
    with open(source, newline="", encoding="utf-8") as table:
        tabs = source.suffix == ".tsv"
        quoting = csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL
        rows = list(csv.DictReader(table, delimiter="\t" if tabs else ",", quoting=quoting))
    columns = rows[0].keys() if rows else []
    audio = next((c for c in AUDIO_COLUMNS if c in columns), None)
    if audio is None:
        raise ValueError(f"{source} needs a column {', '.join(AUDIO_COLUMNS)}; has {list(columns)}")
    speaker = next((c for c in SPEAKER_COLUMNS if c in columns), None)
    folder = source.parent
    clips = folder / "clips"
    found = []
    for row in rows:
        name = row[audio].replace("{data_root}", str(folder)).replace("$data_root", str(folder))
        path = clips / name if clips.is_dir() and not (folder / name).exists() else folder / name
        found.append((str(path), row[speaker] if speaker else re.split("[-_]", path.stem)[0]))
    return found


def _process(job):
    path, stride, rules = job
    if not os.path.exists(path):
        return "missing", None
    try:
        wav = read_audio(path, SAMPLE_RATE)
    except AudioError:
        return "unreadable", None
    reason = reason_to_skip(wav, **rules)
    if reason:
        return reason, None
    mels, _ = KaldiLogMel(stride=stride)(wav[None], torch.tensor([len(wav)]))
    return None, mels[0].half().numpy()


def prepare_speech(
    sources, save_folder, valid_seconds=600.0, stride=4, seed=0, workers=2, rules=None
):
    """Writes `features.f16` (all stacked frames), `train.csv`, `valid.csv` and `prepared.json`.

    Nothing is done when `save_folder` was prepared from the same settings before; other settings
    are refused. The held-out part are whole speakers, drawn by `seed`, none longer than a quarter.

    Arguments
    ---------
    sources : list of str
        Folders and tables, see `find_audio`. **Give training parts only.**
    save_folder : str
        Where to write.
    valid_seconds : float
        Size of the held-out part.
    stride : int
        Frames that the model stacks; utterances are cut to a multiple of it.
    seed : int
        Draws the held-out speakers.
    workers : int
        Processes.
    rules : dict, optional
        Arguments of `reason_to_skip`.

    Returns
    -------
    dict
        Hours, files and what was skipped, as in `prepared.json`.
    """
    rules = dict(rules or {})
    folder = Path(save_folder)
    done = folder / "prepared.json"
    settings = {"sources": [str(s) for s in sources], "valid_seconds": valid_seconds}
    settings |= {"stride": stride, "seed": seed, "rules": rules}
    if done.exists():
        report = json.loads(done.read_text())
        for key, value in settings.items():
            if report["settings"][key] != value:
                raise ValueError(
                    f"{folder} was prepared with {key}={report['settings'][key]!r}, not {value!r}: "
                    "give another prepared folder or remove that one"
                )
        return report
    folder.mkdir(parents=True, exist_ok=True)

    found = []
    for source in sources:
        found += [(path, f"{source}/{speaker}") for path, speaker in find_audio(source)]
    skipped, rows, offset = Counter(), [], 0
    jobs = [(path, stride, rules) for path, _ in found]
    with ExitStack() as stack:
        out = stack.enter_context(open(folder / "features.f16.part", "wb"))
        results = map(_process, jobs)
        if workers > 1:
            context = multiprocessing.get_context("spawn")
            pool = stack.enter_context(context.Pool(workers, torch.set_num_threads, (1,)))
            results = pool.imap(_process, jobs, chunksize=16)
        for (path, speaker), (reason, mels) in zip(found, results, strict=True):
            if reason:
                skipped[reason] += 1
                logger.warning("skipped (%s): %s", reason, path)
                continue
            out.write(mels.tobytes())
            rows.append((path, speaker, offset, len(mels)))
            offset += len(mels)
    if not rows:
        raise ValueError(f"no usable audio in {settings['sources']}: {dict(skipped)}")
    os.replace(folder / "features.f16.part", folder / "features.f16")

    valid = _hold_out(rows, valid_seconds * 100 / stride, seed)
    hours = Counter()
    if valid >= {row[1] for row in rows}:
        raise ValueError(
            f"{settings['sources']}: all speech is of one speaker, {min(valid)}, as far as folders "
            "and tables tell (a column client_id, or file names up to the first - or _), and some "
            "has to be held out"
        )
    for split in ("train", "valid"):
        part = [row for row in rows if (row[1] in valid) == (split == "valid")]
        hours[split] = sum(row[3] for row in part) * stride / 360000
        _write_csv(folder / f"{split}.csv", part, stride)
    if skipped:
        logger.warning("skipped %d of %d: %s", sum(skipped.values()), len(found), dict(skipped))
    report = {"settings": settings, "files": len(rows), "skipped": dict(skipped)}
    report |= {"hours": dict(hours), "valid_speakers": len(valid)}
    write_atomically(done, json.dumps(report, indent=1))
    return report


def _hold_out(rows, frames, seed):
    """Whole speakers with `frames` in all; none with more than a quarter: no voice shall rule."""
    spoken = Counter()
    for _, speaker, _, count in rows:
        spoken[speaker] += count
    speakers = sorted(spoken)
    random.Random(seed).shuffle(speakers)
    held, total = set(), 0
    for speaker in speakers[:-1]:
        if total < frames and spoken[speaker] <= frames / 4:
            held.add(speaker)
            total += spoken[speaker]
    return held or {min(spoken, key=spoken.get)}


def _write_csv(path, rows, stride):
    with open_atomically(path) as out:
        table = csv.writer(out)
        table.writerow(["ID", "duration", "wav", "spk_id", "offset", "frames"])
        for wav, speaker, offset, frames in rows:
            seconds = f"{frames * stride / 100:.2f}"
            table.writerow([f"{offset:010d}", seconds, wav, speaker, offset, frames])

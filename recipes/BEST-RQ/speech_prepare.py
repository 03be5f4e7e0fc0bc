"""Unlabelled speech for pretraining: audio from any folders to one file of log-mels and a manifest.

The log-mels are those that the encoder reads (`transformers.SeamlessM4TFeatureExtractor`), computed
once and kept in half precision: on a CPU, decoding and filter banks would be paid in every epoch.
"""

import csv
import hashlib
import json
import logging
import os
import random
import re
from collections import Counter
from pathlib import Path

import torch
from worker_pool import in_order

from hff_modules.data.audio import read_audio
from hff_modules.data.prepare import read_table
from hff_modules.files import locked, open_atomically, write_atomically
from hff_modules.frontend import KaldiLogMel
from hff_modules.recordings import audio_below

logger = logging.getLogger(__name__)

SAMPLE_RATE = 16000
SPEAKER_COLUMNS = ("spk_id", "client_id", "speaker")
AUDIO_COLUMNS = ("wav", "path", "file")
NEEDED = "expected two at least, as some speech has to be held out"


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
        None for the speaker where no column names one.
    """
    source = Path(source)
    if source.is_dir():
        paths = audio_below(source)
        if not paths:  # or a mount point on which nothing is mounted now
            raise FileNotFoundError(f"no audio below {source}")
        return [(str(path), None) for path in paths]
    if not source.is_file():
        raise FileNotFoundError(f"sources: {source} is neither a folder nor a table")
    tabs = source.suffix == ".tsv"
    form = {"delimiter": "\t" if tabs else ","}
    form["quoting"] = csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL
    with open(source, newline="", encoding="utf-8-sig", errors="replace") as table:
        columns = next(csv.reader(table, **form), [])
    audio = next((c for c in AUDIO_COLUMNS if c in columns), None)
    if audio is None:
        raise ValueError(f"{source} needs a column {', '.join(AUDIO_COLUMNS)}; has {columns}")
    speaker = next((c for c in SPEAKER_COLUMNS if c in columns), None)
    folder = source.parent
    clips = folder / "clips"
    found = []
    for row in read_table(source, [audio, speaker] if speaker else [audio], **form):
        name = row[audio].replace("{data_root}", str(folder)).replace("$data_root", str(folder))
        path = clips / name if clips.is_dir() and not (folder / name).exists() else folder / name
        found.append((str(path), row[speaker] if speaker else None))
    return found


def as_list(sources):
    """One source or several of them, as a list of str."""
    one = isinstance(sources, str | os.PathLike)
    return [str(source) for source in ([sources] if one else sources or [])]


def learned_from(config):
    """Sources of a round and of the encoders that it begins with or takes its targets from.

    Arguments
    ---------
    config : dict
        ``sources``, ``objective``, ``init`` and ``teacher`` of the round.

    Returns
    -------
    list of str
        An encoder whose `training.json` is not there, or not one of this recipe's, is named itself.
    """
    found = list(config["sources"])
    teacher = config.get("teacher") if "states" in config["objective"] else None
    for encoder in filter(None, (teacher, config.get("init"))):
        path = Path(encoder, "training.json")
        before = json.loads(path.read_text()) if path.exists() else {}
        if "targets" not in before:
            found.append(str(encoder))
        elif "learned_from" in before["targets"]:
            found += before["targets"]["learned_from"]
        else:
            found += learned_from(before["config"])
    return list(dict.fromkeys(found))


def _list_all(sources):
    """(source, what `find_audio` finds) of all sources."""
    return [(source, find_audio(source)) for source in sources]


def _count(listed):
    return sum(len(recordings) for _, recordings in listed)


def _by_name(path):
    return re.split("[-_]", Path(path).stem)[0]


def _voices(listed):
    """{path: speaker} of what `_list_all` lists; each recording once, a table's word first.

    Tables of one folder share their speakers. Without a table's word it is the file name up to the
    first "-" or "_"; one that has neither names no speaker, but its folder does: the first in which
    the recordings of a source differ (VoxCeleb has one for each speaker, in it one for each video).
    """
    found, seen = {}, set()
    for source, recordings in sorted(listed, key=lambda pair: os.path.isdir(pair[0])):
        home = source if os.path.isdir(source) else os.path.dirname(source)
        folders = {os.path.dirname(os.path.abspath(path)) for path, _ in recordings}
        shared = os.path.commonpath(folders) if folders else home
        for path, speaker in recordings:
            if speaker is None:
                speaker = _by_name(path)
                first, *inside = os.path.relpath(path, shared).split(os.sep)
                if inside and speaker == Path(path).stem:
                    speaker = first
            real = os.path.realpath(path)
            if real not in seen:
                found[path] = f"{home}/{speaker}"
            seen.add(real)
    return found


def _fingerprint(listed):
    """Names, speakers and sizes of recordings in 16 characters, which change with any of them."""
    digest = hashlib.sha256()
    for source, path, speaker in ((s, *one) for s, recordings in listed for one in recordings):
        speaker = f"{source}/{_by_name(path) if speaker is None else speaker}"
        try:
            size = os.path.getsize(path)
        except OSError:
            size = "missing"
        try:
            digest.update(f"{path}\t{speaker}\t{size}\n".encode())
        except UnicodeEncodeError:
            raise ValueError(f"{path!r}: expected a file name in UTF-8; rename it") from None
    return digest.hexdigest()[:16]


def _process(job):
    path, stride, rules = job
    if not os.path.exists(path):
        return "missing", None
    try:
        wav = read_audio(path, SAMPLE_RATE)
    except (ValueError, RuntimeError, OSError, MemoryError):  # a broken header may ask for any size
        return "unreadable", None
    reason = reason_to_skip(wav, **rules)
    if reason:
        return reason, None
    log_mel, samples = KaldiLogMel(stride=stride), torch.tensor([len(wav)])
    if log_mel.count_frames(samples) < 1:
        return "too short", None
    mels = log_mel(wav[None], samples)[0][0].half()
    if not mels.isfinite().all():  # samples far beyond full scale, as a broken float file has them
        return "unreadable", None
    return None, mels.numpy()


def prepare_speech(
    sources, save_folder, valid_seconds=600.0, stride=4, seed=0, workers=2, rules=None
):
    """Writes `features.f16` (all stacked frames), `train.csv`, `valid.csv` and `prepared.json`.

    Nothing is done when `save_folder` was prepared from the same files and settings before; others
    are refused. If another process prepares it now, this one waits. What is held out says
    `_hold_out`, whose voices are whose `_voices`.

    Arguments
    ---------
    sources : str or list of str
        Folders and tables, see `find_audio`. **Give training parts only.**
    save_folder : str
        Where to write.
    valid_seconds : float
        Size of the held-out part; at most a quarter of all.
    stride : int
        Frames that the model stacks; utterances are cut to a multiple of it.
    seed : int
        Draws the held-out speech.
    workers : int
        Processes.
    rules : dict, optional
        Arguments of `reason_to_skip`.

    Returns
    -------
    dict
        Hours, files and what was skipped, as in `prepared.json`.

    Raises
    ------
    ValueError
        Fewer than two recordings, or other files or settings than `save_folder` was prepared from.
    OSError
        A source is not there, or a worker was killed.
    """
    rules = dict(rules or {})
    folder, sources = Path(save_folder), as_list(sources)
    done = folder / "prepared.json"
    settings = {"sources": sources, "valid_seconds": valid_seconds}
    settings |= {"stride": stride, "seed": seed, "rules": rules}
    if not done.exists():
        listed = _list_all(sources)
        found = _voices(listed)
        if len(found) < 2:
            raise ValueError(f"sources={sources}: {len(found)} recordings; {NEEDED}")
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / ".lock"):
            if not done.exists():  # else another process made it while this one waited
                return _prepare(listed, found, folder, settings, workers)
    report = json.loads(done.read_text())
    _check_same(folder, report, settings)
    return report


def _prepare(listed, found, folder, settings, workers):
    sources, stride, seed = settings["sources"], settings["stride"], settings["seed"]
    settings = settings | {"fingerprint": _fingerprint(listed)}
    skipped, rows, offset = Counter(), [], 0
    number = _count(listed)
    if number > len(found):
        skipped["listed twice"] = number - len(found)
    results = in_order(_process, ((path, stride, settings["rules"]) for path in found), workers)
    with open(folder / "features.f16.part", "wb") as out:
        for (path, speaker), (reason, mels) in zip(found.items(), results, strict=True):
            if reason:
                skipped[reason] += 1
                logger.warning("skipped (%s): %s", reason, path)
                continue
            out.write(mels.tobytes())
            rows.append((path, speaker, offset, len(mels)))
            offset += len(mels)
    if len(rows) < 2:
        usable = f"{len(rows)} recordings that can be used, skipped {dict(skipped)}"
        raise ValueError(f"sources={sources}: {usable}; {NEEDED}")
    os.replace(folder / "features.f16.part", folder / "features.f16")

    valid = _hold_out(rows, settings["valid_seconds"] * 100 / stride, seed)
    parts = {
        "train": [row for row in rows if row not in valid],
        "valid": [row for row in rows if row in valid],
    }
    hours = {name: sum(row[3] for row in part) * stride / 360000 for name, part in parts.items()}
    for name, part in parts.items():
        _write_csv(folder / f"{name}.csv", part, stride)
    if skipped:
        logger.warning("skipped %d of %d: %s", sum(skipped.values()), number, dict(skipped))
    logger.info("%.2f hours to train on, %.2f held out", hours["train"], hours["valid"])
    report = {"settings": settings, "files": len(rows), "skipped": dict(skipped)}
    speakers = {name: {row[1] for row in part} for name, part in parts.items()}
    shared = speakers["train"] & speakers["valid"]
    report |= {"hours": hours, "valid_speakers": len(speakers["valid"])}
    report["held_out"] = "recordings" if shared else "speakers"
    write_atomically(folder / "prepared.json", json.dumps(report, indent=1))
    return report


def _check_same(folder, report, settings):
    """Refuses speech that was prepared from other files or with other settings."""
    remedy = "give another prepared folder or remove that one"
    for key, value in settings.items():
        if report["settings"][key] != value:
            raise ValueError(
                f"{folder} was prepared with {key}={report['settings'][key]!r}, not {value!r}: "
                f"{remedy}"
            )
    try:
        listed = _list_all(settings["sources"])
    except FileNotFoundError as error:  # the recordings themselves are no longer needed
        logger.warning("%s; %s holds what was prepared from it", error, folder)
        return
    number = _count(listed)
    before, known = report["files"] + sum(report["skipped"].values()), report["settings"]
    if "fingerprint" not in known:  # by an earlier version of this recipe
        logger.warning(
            "%s was prepared from %d files and does not tell which; there are %d now, and what is "
            "new among them is not used",
            *(folder, before, number),
        )
    elif number != before:
        raise ValueError(
            f"{folder} was prepared from {before} files, now there are {number}: {remedy}"
        )
    elif known["fingerprint"] != _fingerprint(listed):
        raise ValueError(
            f"{folder} was prepared from {before} files, of which some have now another name, "
            f"size or speaker, or were missing then or are now: {remedy}"
        )


def _hold_out(rows, frames, seed):
    """Rows with about `frames` frames, at most a quarter of all: speakers, or else recordings.

    Whole speakers, none with more than a quarter of what is held out (no voice shall rule), or the
    one who has said least. If even that one has said too much, single recordings.
    """
    spoken = Counter()
    for _, speaker, _, count in rows:
        spoken[speaker] += count
    frames = min(frames, sum(spoken.values()) / 4)
    speakers = sorted(spoken)
    random.Random(seed).shuffle(speakers)
    held, total = set(), 0
    for speaker in speakers:
        if total < frames and spoken[speaker] <= frames / 4:
            held.add(speaker)
            total += spoken[speaker]
    least = min(spoken, key=spoken.get)
    if not held and spoken[least] <= frames:
        held = {least}
    if held:
        return {row for row in rows if row[1] in held}

    logger.warning(
        "no speaker is short enough to be held out (of %d, as far as tables and file names tell): "
        "single recordings are, and their voices are trained on, too",
        len(spoken),
    )
    for row in random.Random(seed).sample(rows, len(rows)):
        if total + row[3] <= frames:
            held.add(row)
            total += row[3]
    return held or {min(rows, key=lambda row: row[3])}


def _write_csv(path, rows, stride):
    with open_atomically(path) as out:
        table = csv.writer(out)
        table.writerow(["ID", "duration", "wav", "spk_id", "offset", "frames"])
        for wav, speaker, offset, frames in rows:
            seconds = f"{frames * stride / 100:.2f}"
            table.writerow([f"{offset:010d}", seconds, wav, speaker, offset, frames])

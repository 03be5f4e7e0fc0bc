"""Manifests of any LibriSpeech-shaped folder, Libri-Light's limited-supervision lists included.

A split is a folder ``speaker/chapter/`` with audio files (flac, wav, opus, ogg or mp3) and one
``*.trans.txt`` per chapter, as in LibriSpeech (Panayotov et al., 2015; OpenSLR 12 and 31). "10h",
"1h" and "10min" are the lists of Libri-Light (Kahn et al., 2020) in its folder
``librispeech_finetuning``. Any other corpus in this shape works as well.
"""

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hff_modules.data.manifest import read_rows, summarize_manifest, write_manifest
from hff_modules.data.prepare import ENDINGS, choose_subset, judge, listing, read_durations

logger = logging.getLogger(__name__)

VERSION = 2
# Libri-Light: the 10 h set is the 1 h set and 9 h more; the 1 h set is six parts of 10 min.
LIBRI_LIGHT = {"10h": ("1h", "9h"), "1h": ("1h",), "10min": ("1h/0",)}


@dataclass
class _Found:
    """What is in the folders of a split."""

    utterances: dict[str, tuple[Path, str]] = field(default_factory=dict)  # ID: (audio, words)
    transcripts: int = 0
    without_audio: list[str] = field(default_factory=list)
    without_transcript: list[str] = field(default_factory=list)
    without_words: list[str] = field(default_factory=list)

    def digest(self) -> str:
        """Which utterances, where and with which words: by it changed data is noticed."""
        everything = sorted(
            (name, str(path), words) for name, (path, words) in self.utterances.items()
        )
        problems = [self.without_audio, self.without_transcript, self.without_words]
        text = json.dumps([everything, problems])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def prepare_librispeech(
    data_folder: str | os.PathLike,
    save_folder: str | os.PathLike,
    splits: Sequence[str],
    max_hours: Mapping[str, float] | None = None,
    max_bad_share: float = 0.02,
    redo: bool = False,
) -> dict[str, Path]:
    """Write one manifest per split; those that are there for the same data and options stay.

    Arguments
    ---------
    data_folder : str or path
        Folder of the splits; the ``data_root`` of the manifests.
    save_folder : str or path
        Where the manifests go: ``{split}.csv``, or ``{split}-{hours}h.csv`` for a subset, each
        beside a ``.json`` with the options that it was made with.
    splits : sequence of str
        Names of folders in ``data_folder``, or "10h", "1h", "10min" of Libri-Light.
    max_hours : mapping, optional
        ``{split: hours}``: keep about so much of a split, chosen without chance: one utterance of
        each speaker in turn, so all speakers are there and have about equal parts.
    max_bad_share : float
        Share of a split's utterances that may be unusable: transcript without audio, audio without
        transcript, no words, unreadable or empty audio. They are named in a warning; more than
        this share is an error.
    redo : bool
        Make the manifests again even though they look up to date.

    Returns
    -------
    dict
        ``{split: path of its manifest}``.

    Raises
    ------
    FileNotFoundError
        The data folder, a split or its transcripts are not there.
    ValueError
        Too many unusable utterances, a broken transcript, or options that make no sense.
    """
    data_folder, save_folder = Path(data_folder).absolute(), Path(save_folder)
    if not data_folder.is_dir():
        raise FileNotFoundError(f"data_folder {data_folder}: no such folder")
    splits = [splits] if isinstance(splits, str) else list(splits)
    max_hours = dict(max_hours or {})
    strange = sorted(set(max_hours) - set(splits))
    if strange:
        raise ValueError(f"max_hours names {strange}, which is not among the splits {splits}")
    if any(hours <= 0 for hours in max_hours.values()):
        raise ValueError(f"max_hours must be above 0, got {max_hours}")
    manifests = {}
    for split in splits:
        hours = max_hours.get(split)
        name = split.replace("/", "-") + (f"-{hours:g}h" if hours else "")
        path, stamp = save_folder / f"{name}.csv", save_folder / f"{name}.json"
        found = _find(data_folder, split)
        options = {
            "version": VERSION,
            "data_folder": str(data_folder),
            "found": found.digest(),
            "split": split,
            "max_hours": hours,
            "max_bad_share": max_bad_share,
        }
        manifests[split] = path
        if not redo and path.is_file() and _read_stamp(stamp) == options:
            logger.info("%s is up to date: %s", path, summarize_manifest(path))
            continue
        stamp.unlink(missing_ok=True)
        write_manifest(path, _rows(found, data_folder, split, hours, max_bad_share))
        stamp.write_text(json.dumps(options, indent=1) + "\n", encoding="utf-8")
        logger.info("Wrote %s: %s", path, summarize_manifest(path))
    return manifests


def check_splits(
    manifests: Mapping[str, Path], train: Sequence[str], others: Sequence[str]
) -> None:
    """Refuse to score recordings that are trained on; name speakers that are, in a warning.

    Arguments
    ---------
    manifests : mapping of str to Path
        From :func:`prepare_librispeech`.
    train, others : sequence of str
        Splits.

    Raises
    ------
    ValueError
        A recording of train is in another split.
    """
    rows = {split: read_rows(manifests[split], "").values() for split in {*train, *others}}
    heard = {column: set() for column in ("wav", "spk_id")}
    for column, values in heard.items():
        values |= {row[column] for split in train for row in rows[split]}
    for split in others:
        wavs = sorted({row["wav"] for row in rows[split]} & heard["wav"])
        if wavs:
            raise ValueError(
                f"{split}: {len(wavs)} of its recordings are in {', '.join(train)}, too, such as "
                f"{wavs[0].lstrip('/')}: scores would be too good; expected splits that share none"
            )
        speakers = sorted({row["spk_id"] for row in rows[split]} & heard["spk_id"])
        if speakers:
            logger.warning(
                "%s: %d speakers (%s) are in train, too: scores there are of known voices",
                *(split, len(speakers), ", ".join(speakers[:3])),
            )


def _find(data_folder: Path, split: str) -> _Found:
    folders, is_part = _split_folders(data_folder, split)
    found = _Found()
    for folder in folders:
        _search(folder, found)
    if found.transcripts == 0:
        raise FileNotFoundError(
            f"{folders[0]}: no speaker/chapter/*.trans.txt in it; it holds {listing(folders[0])}"
        )
    if is_part and found.without_audio:
        # A limited-supervision list may keep whole chapters' transcripts for a few of their files.
        logger.info("%s: %d transcripts are not part of it", split, len(found.without_audio))
        found.without_audio.clear()
    return found


def _rows(
    found: _Found, data_folder: Path, split: str, hours: float | None, max_bad_share: float
) -> list[dict]:
    infos, unreadable = read_durations({name: path for name, (path, _) in found.utterances.items()})
    problems = {
        "transcript without audio": found.without_audio,
        "audio without transcript": found.without_transcript,
        "transcript without words": found.without_words,
        "unreadable or empty audio": unreadable,
    }
    judge(split, problems, len(infos), max_bad_share)
    rows = [
        {
            "ID": name,
            "duration": duration,
            "wav": f"$data_root/{found.utterances[name][0].relative_to(data_folder).as_posix()}",
            "spk_id": name.split("-")[0],
            "wrd": found.utterances[name][1],
        }
        for name, duration in sorted(infos.items())
    ]
    return choose_subset(rows, hours) if hours else rows


def _split_folders(data_folder: Path, split: str) -> tuple[list[Path], bool]:
    """Folders of a split, and whether it is a limited-supervision list."""
    if (data_folder / split).is_dir() and split not in LIBRI_LIGHT:
        return [data_folder / split], False
    if split in LIBRI_LIGHT:
        for root in (data_folder, data_folder / "librispeech_finetuning"):
            folders = [root / part for part in LIBRI_LIGHT[split]]
            if all(folder.is_dir() for folder in folders):
                return folders, True
        wanted = " and ".join(f"librispeech_finetuning/{part}" for part in LIBRI_LIGHT[split])
    else:
        wanted = split
    raise FileNotFoundError(
        f"data_folder {data_folder}: looked for {wanted} (speaker/chapter/*.trans.txt with audio); "
        f"the folder holds {listing(data_folder)}"
    )


def _search(folder: Path, found: _Found) -> None:
    for root, subfolders, files in os.walk(folder, followlinks=True):
        subfolders.sort()
        audio: dict[str, Path] = {}
        for ending in reversed(ENDINGS):  # the first ending wins when a file is there in several
            audio.update({Path(f).stem: Path(root, f) for f in files if f.lower().endswith(ending)})
        for file in sorted(f for f in files if f.endswith(".trans.txt")):
            for name, words in _read_transcripts(Path(root, file)):
                found.transcripts += 1
                path = audio.pop(name, None)
                if path is None:
                    found.without_audio.append(name)
                elif not words:
                    found.without_words.append(str(path))
                elif name in found.utterances:
                    raise ValueError(f"{name} is there twice: {found.utterances[name][0]}, {path}")
                else:
                    found.utterances[name] = (path, words)
        found.without_transcript += map(str, sorted(audio.values()))


def _read_transcripts(path: Path) -> list[tuple[str, str]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: the transcript is not UTF-8 ({error})") from error
    parts = (line.strip().partition(" ") for line in lines if line.strip())
    return [(name, " ".join(words.split())) for name, _, words in parts]


def _read_stamp(path: Path) -> dict | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None

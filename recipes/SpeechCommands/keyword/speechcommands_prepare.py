"""Manifests of Google's Speech Commands, version 2 (Warden, arXiv 1804.03209), its own lists.

``<word>/<speaker>_nohash_<number>.wav``; ``validation_list.txt`` and ``testing_list.txt`` name the
clips of dev and test, all others are for training. ``_background_noise_`` is not used.
"""

import os
import re
from pathlib import Path

from hff_modules.data.prepare import expect, find_audio, read_lines, write_parts

LISTS = {"dev": "validation_list.txt", "test": "testing_list.txt"}
LAYOUT = (
    "Speech Commands v2: validation_list.txt, testing_list.txt and a folder per word with "
    "<speaker>_nohash_<number>.wav"
)
CLIP = re.compile(r"(?P<word>[a-z]+)/(?P<speaker>[0-9a-f]{8})_nohash_\d+\.\w+")


def prepare_speechcommands(
    data_folder: str | os.PathLike, save_folder: str | os.PathLike
) -> dict[str, Path]:
    """Write ``train.csv``, ``dev.csv`` and ``test.csv``.

    Arguments
    ---------
    data_folder : str or path
    save_folder : str or path

    Returns
    -------
    dict
        ``{part: path of its manifest}``.

    Raises
    ------
    FileNotFoundError, ValueError
        Another layout; says what was expected and what was found.
    """
    folder = expect(data_folder, LISTS.values(), LAYOUT)
    parts = {}
    listed: set[str] = set()
    for part, name in LISTS.items():
        clips = read_lines(folder / name)
        parts[part] = [_row(clip, folder / name) for clip in clips]
        listed.update(clips)
    words = sorted(p for p in folder.iterdir() if p.is_dir() and p.name[0] not in "._")
    clips = [f"{word.name}/{path.name}" for word in words for path in find_audio(word)]
    train = [_row(clip, folder / clip) for clip in clips if clip not in listed]
    if not train:
        raise FileNotFoundError(f"data_folder {folder}: no clips to train on; expected {LAYOUT}")
    return write_parts(folder, save_folder, {"train": train, **parts}, ["keyword"])


def _row(clip: str, source: Path) -> dict:
    found = CLIP.fullmatch(clip)
    if found is None:
        raise ValueError(
            f"{source}: {clip!r} is no clip; expected such as bed/026290a7_nohash_0.wav"
        )
    name = clip.rpartition(".")[0].replace("/", "-")
    return {"ID": name, "wav": clip, "spk_id": found["speaker"], "keyword": found["word"]}

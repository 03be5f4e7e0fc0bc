"""Manifests of the Arabic Speech Commands Dataset (Ghandoura et al., 2021), its own three tables.

``train.csv``, ``val.csv`` and ``test.csv`` have the columns file and class; a file is
``dataset/<word>/<speaker>_NO_<number>.wav``.
"""

import os
import re
from pathlib import Path

from hff_modules.data.prepare import expect, read_table, write_parts

TABLES = {"train": "train.csv", "dev": "val.csv", "test": "test.csv"}
LAYOUT = "Arabic Speech Commands: train.csv, val.csv, test.csv and dataset/<word>/*.wav"
CLIP = re.compile(r"dataset/(?P<word>[^/]+)/(?P<name>(?P<speaker>\d+)_NO_\d+)\.\w+")


def prepare_arabic(
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
    folder = expect(data_folder, [*TABLES.values(), "dataset"], LAYOUT)
    parts = {}
    for part, name in TABLES.items():
        parts[part] = []
        for row in read_table(folder / name, ("file", "class")):
            clip = CLIP.fullmatch(row["file"])
            if clip is None:
                raise ValueError(
                    f"{folder / name}: {row['file']!r} is no clip; expected such as "
                    "dataset/backward/00000014_NO_01.wav"
                )
            word = clip["word"].replace(" ", "_")
            name_of_clip = f"{word}-{clip['name']}"
            row = {"ID": name_of_clip, "wav": row["file"], "spk_id": clip["speaker"],
                   "keyword": row["class"]}  # fmt: skip
            parts[part].append(row)
    return write_parts(folder, save_folder, parts, ["keyword"])

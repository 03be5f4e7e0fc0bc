"""Manifests of Fluent Speech Commands (Lugosch et al., Interspeech 2019), its own three parts.

``data/{train,valid,test}_data.csv`` have the columns path, speakerId, transcription, action, object
and location; a path is ``wavs/speakers/<speaker>/<name>.wav``.
"""

import os
from pathlib import Path, PurePosixPath

from hff_modules.data.prepare import expect, read_table, write_parts

SLOTS = ("action", "object", "location")
PARTS = {"train": "train", "dev": "valid", "test": "test"}
LAYOUT = (
    "Fluent Speech Commands: data/{train,valid,test}_data.csv and wavs/speakers/<speaker>/*.wav"
)


def prepare_fluent(
    data_folder: str | os.PathLike, save_folder: str | os.PathLike
) -> dict[str, Path]:
    """Write ``train.csv``, ``dev.csv`` and ``test.csv`` with a column for each slot.

    Arguments
    ---------
    data_folder : str or path
        As unpacked, ``fluent_speech_commands_dataset``.
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
    tables = {part: f"data/{name}_data.csv" for part, name in PARTS.items()}
    folder = expect(data_folder, [*tables.values(), "wavs/speakers"], LAYOUT)
    parts = {}
    for part, table in tables.items():
        rows = read_table(folder / table, ("path", "speakerId", *SLOTS))
        parts[part] = [
            {
                "ID": PurePosixPath(row["path"]).stem,
                "wav": row["path"],
                "spk_id": row["speakerId"],
                **{slot: row[slot] for slot in SLOTS},
            }
            for row in rows
        ]
    return write_parts(folder, save_folder, parts, SLOTS)

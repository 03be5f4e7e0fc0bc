"""Manifests of EmoDB, the Berlin Database of Emotional Speech (Burkhardt et al., Interspeech 2005).

``wav/03a01Fa.wav``: speaker 03, sentence a01, emotion F, version a.
"""

import os
import re
from pathlib import Path

from hff_modules.data.prepare import expect, find_audio, write_parts
from hff_modules.folds import check_fold

LAYOUT = "EmoDB: wav/03a01Fa.wav and the like"
NAME = re.compile(r"(?P<speaker>\d\d)[ab]\d\d(?P<emotion>[A-Z])[a-z]?")
EMOTIONS = {
    "W": "anger",
    "L": "boredom",
    "E": "disgust",
    "A": "fear",
    "F": "joy",
    "T": "sadness",
    "N": "neutral",
}
# Fold n: the nth man and the nth woman.
MEN, WOMEN = ("03", "10", "11", "12", "15"), ("08", "09", "13", "14", "16")
FOLDS = tuple(range(1, len(MEN) + 1))


def speakers_of_fold(fold: int) -> set[str]:
    """The two speakers that a fold is tested on."""
    return {MEN[fold - 1], WOMEN[fold - 1]}


def prepare_emodb(
    data_folder: str | os.PathLike, save_folder: str | os.PathLike, fold: int
) -> dict[str, Path]:
    """Write ``train.csv``, ``dev.csv`` and ``test.csv`` of a fold.

    Arguments
    ---------
    data_folder : str or path
    save_folder : str or path
    fold : int
        1 to 5: a man and a woman for test; those of the next fold for dev, the others for training.

    Returns
    -------
    dict
        ``{part: path of its manifest}``.

    Raises
    ------
    FileNotFoundError, ValueError
        Another layout, or no such fold; says what was expected and what was found.
    """
    check_fold(fold, FOLDS)
    folder = expect(data_folder, ["wav"], LAYOUT)
    test = speakers_of_fold(fold)
    dev = speakers_of_fold(fold % len(FOLDS) + 1)
    parts: dict[str, list[dict]] = {"train": [], "dev": [], "test": []}
    paths = find_audio(folder / "wav")
    if not paths:
        raise FileNotFoundError(f"{folder / 'wav'}: no audio file in it; expected {LAYOUT}")
    for path in paths:
        name = NAME.fullmatch(path.stem)
        known = name and name["speaker"] in (*MEN, *WOMEN) and name["emotion"] in EMOTIONS
        if not known:
            raise ValueError(
                f"{path}: expected a name such as 03a01Fa: a speaker of {', '.join(MEN + WOMEN)}, "
                f"the sentence, an emotion of {', '.join(EMOTIONS)}"
            )
        speaker = name["speaker"]
        part = "test" if speaker in test else "dev" if speaker in dev else "train"
        row = {"ID": path.stem, "wav": f"wav/{path.name}", "spk_id": speaker}
        parts[part].append({**row, "emotion": EMOTIONS[name["emotion"]]})
    return write_parts(folder, save_folder, parts, ["emotion"])

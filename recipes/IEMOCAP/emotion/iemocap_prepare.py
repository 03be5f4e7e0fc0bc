"""Manifests of IEMOCAP (Busso et al., Language Resources and Evaluation 2008), four classes.

``Session1/dialog/EmoEvaluation/Ses01F_impro01.txt`` has one line per turn with its emotion,
``Session1/sentences/wav/Ses01F_impro01/Ses01F_impro01_F000.wav`` is the turn. As usual (SUPERB,
arXiv 2105.01051), "excited" counts as "happy", and turns with other labels are left out.
"""

import os
import re
from pathlib import Path

from hff_modules.data.prepare import expect, write_parts
from hff_modules.folds import check_fold

SESSIONS = (1, 2, 3, 4, 5)
LAYOUT = (
    "IEMOCAP: Session1 to Session5, each with dialog/EmoEvaluation/*.txt and "
    "sentences/wav/<dialog>/<turn>.wav"
)
TURN = re.compile(
    r"\[[\d.]+ - [\d.]+\]\t(?P<turn>(?P<dialog>Ses\d\d[FM]_\w+)_(?P<sex>[FM])[^_\s]+)"
    r"\t(?P<emotion>\w+)\t"
)
EMOTIONS = {"ang": "angry", "exc": "happy", "hap": "happy", "neu": "neutral", "sad": "sad"}


def prepare_iemocap(
    data_folder: str | os.PathLike, save_folder: str | os.PathLike, fold: int
) -> dict[str, Path]:
    """Write ``train.csv``, ``dev.csv`` and ``test.csv`` of a fold.

    Arguments
    ---------
    data_folder : str or path
    save_folder : str or path
    fold : int
        The session to test on; the next one (after the last the first) is for dev, the other three
        are for training. Every session has two speakers of its own.

    Returns
    -------
    dict
        ``{part: path of its manifest}``.

    Raises
    ------
    FileNotFoundError, ValueError
        Another layout, or no such fold; says what was expected and what was found.
    """
    check_fold(fold, SESSIONS)
    needed = [
        f"Session{s}/{p}" for s in SESSIONS for p in ("dialog/EmoEvaluation", "sentences/wav")
    ]
    folder = expect(data_folder, needed, LAYOUT)
    parts: dict[str, list[dict]] = {"train": [], "dev": [], "test": []}
    for session in SESSIONS:
        is_dev = session == fold % len(SESSIONS) + 1
        part = "test" if session == fold else "dev" if is_dev else "train"
        parts[part] += _rows(folder, session)
    return write_parts(folder, save_folder, parts, ["emotion"])


def _rows(folder: Path, session: int) -> list[dict]:
    evaluations = folder / f"Session{session}/dialog/EmoEvaluation"
    rows = []
    for path in sorted(evaluations.glob("Ses*.txt")):
        found = 0
        for line in path.read_text(encoding="utf-8").splitlines():
            turn = TURN.match(line)
            if turn is None:
                continue
            found += 1
            if turn["emotion"] not in EMOTIONS:
                continue
            name = turn["turn"]
            wav = f"Session{session}/sentences/wav/{turn['dialog']}/{name}.wav"
            speaker = f"Ses{session:02d}{turn['sex']}"  # not the dialog's letter: both speak in it
            emotion = EMOTIONS[turn["emotion"]]
            rows.append({"ID": name, "wav": wav, "spk_id": speaker, "emotion": emotion})
        if not found:
            raise ValueError(
                f"{path}: no turn in it; expected lines such as "
                "`[6.2901 - 8.2357]\\tSes01F_impro01_F000\\tneu\\t[2.5000, 2.5000, 2.5000]`"
            )
    if not rows:
        raise FileNotFoundError(f"{evaluations}: no turns of {', '.join(EMOTIONS)}; {LAYOUT}")
    return rows

"""Speaker verification on a language of Common Voice (Ardila et al., LREC 2020).

``train.tsv``, ``dev.tsv`` and ``test.tsv`` have the columns client_id and path; clips are in
``clips`` and may have another ending than the tables say. No client is in two of them. Trials are
drawn from the clips of dev and of test.
"""

import csv
import os
from pathlib import Path

from hff_modules.data.manifest import read_rows
from hff_modules.data.prepare import at_most, clip_finder, expect, read_table, write_parts
from hff_modules.data.trials import make_trials, write_trials

PARTS = ("train", "dev", "test")
LAYOUT = "a language of Common Voice: train.tsv, dev.tsv, test.tsv and clips/"


def prepare_commonvoice_speakers(
    data_folder: str | os.PathLike,
    save_folder: str | os.PathLike,
    same_trials: int = 1000,
    different_trials: int = 4000,
    max_per_speaker: int | None = None,
    seed: int = 0,
) -> tuple[dict[str, Path], dict[str, Path]]:
    """Write manifests of the three parts, and lists of trials for dev and test.

    Arguments
    ---------
    data_folder : str or path
        The folder of a language.
    save_folder : str or path
    same_trials, different_trials : int
        Trials at most in each list, of one speaker and of two.
    max_per_speaker : int, optional
        Clips of a speaker to train on; all by default.
    seed : int
        Of both draws.

    Returns
    -------
    tuple of dict
        ``{part: path of its manifest}`` and ``{part: path of its trials}``.

    Raises
    ------
    FileNotFoundError, ValueError
        Another layout; says what was expected and what was found.
    """
    folder = expect(data_folder, [*(f"{part}.tsv" for part in PARTS), "clips"], LAYOUT)
    find_clip, parts = clip_finder(folder / "clips"), {}
    for part in PARTS:
        table = folder / f"{part}.tsv"
        rows = read_table(table, ("client_id", "path"), delimiter="\t", quoting=csv.QUOTE_NONE)
        parts[part] = [
            {
                "ID": Path(r["path"]).stem,
                "wav": f"clips/{find_clip(r['path']) or r['path']}",
                "spk_id": r["client_id"],
            }
            for r in rows
        ]
    parts["train"] = at_most(parts["train"], "spk_id", max_per_speaker, seed)
    manifests = write_parts(folder, save_folder, parts)
    trials = {}
    for part in ("dev", "test"):
        rows = read_rows(manifests[part], data_root=folder, columns=("ID", "wav", "spk_id"))
        speakers = {name: row["spk_id"] for name, row in rows.items()}
        try:
            drawn = make_trials(speakers, same_trials, different_trials, seed)
        except ValueError as error:
            raise ValueError(f"{folder / part}.tsv: {error}") from None
        trials[part] = Path(save_folder) / f"{part}-trials.txt"
        write_trials(trials[part], drawn)
    return manifests, trials

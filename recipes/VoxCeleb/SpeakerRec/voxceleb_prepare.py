"""Speaker verification on VoxCeleb1 (Nagrani et al., Interspeech 2017): its own lists.

    wav/<speaker>/<video>/<number>.wav      both archives, dev and test, unpacked into one folder
    vox1_meta.csv                           tab-separated; column Set: dev or test
    veri_test2.txt                          trials: ``1 id10270/5r0dWxy17C8/00001.wav id10270/...``

Some speakers of the dev set are held out to choose by; their trials are drawn.
"""

import os
import random
from pathlib import Path

from hff_modules.data.manifest import read_rows
from hff_modules.data.prepare import (
    at_most,
    expect,
    find_audio,
    read_lines,
    read_table,
    write_parts,
)
from hff_modules.data.trials import Trial, make_trials, write_trials

SPEAKER, SET = "VoxCeleb1 ID", "Set"
LAYOUT = "VoxCeleb1: wav/<speaker>/<video>/*.wav, vox1_meta.csv and the list of trials"


def prepare_voxceleb(
    data_folder: str | os.PathLike,
    save_folder: str | os.PathLike,
    trials: str = "veri_test2.txt",
    dev_speakers: int = 40,
    dev_per_speaker: int = 10,
    max_per_speaker: int | None = None,
    seed: int = 0,
) -> tuple[dict[str, Path], dict[str, Path]]:
    """Write manifests of the three parts, and lists of trials for dev and test.

    Arguments
    ---------
    data_folder : str or path
    save_folder : str or path
    trials : str
        List of trials in ``data_folder``.
    dev_speakers, dev_per_speaker : int
        Speakers of the dev set that are held out to choose by, and utterances of each.
    max_per_speaker : int, optional
        Utterances of a speaker to train on; all by default.
    seed : int
        Of the draws.

    Returns
    -------
    tuple of dict
        ``{part: path of its manifest}`` and ``{part: path of its trials}``.

    Raises
    ------
    FileNotFoundError, ValueError
        Another layout, or trials that name absent files or training speakers; says what was
        expected and what was found.
    """
    folder = expect(data_folder, ["wav", "vox1_meta.csv", trials], LAYOUT)
    sets = _sets(folder / "vox1_meta.csv")
    of_test = _read_trials(folder, trials, sets)
    found = {p.name for p in (folder / "wav").iterdir() if p.is_dir()}
    training = sorted(speaker for speaker in found if sets.get(speaker) == "dev")
    if len(training) < dev_speakers + 2:
        raise FileNotFoundError(
            f"{folder / 'wav'}: {len(training)} speakers of the dev set; expected more than "
            f"dev_speakers={dev_speakers} and two to train on; {LAYOUT}"
        )
    held_out = set(random.Random(seed).sample(training, dev_speakers))
    everything = {speaker: _rows(folder, speaker) for speaker in training}
    dev = [row for speaker in sorted(held_out) for row in everything[speaker]]
    train = [row for s in training if s not in held_out for row in everything[s]]
    heard = sorted({name for trial in of_test for name in trial[1:]})
    parts = {
        "train": at_most(train, "spk_id", max_per_speaker, seed),
        "dev": at_most(dev, "spk_id", dev_per_speaker, seed),
        "test": [_row(f"wav/{name}.wav") for name in heard],
    }
    manifests = write_parts(folder, save_folder, parts)
    lists = {part: Path(save_folder) / f"{part}-trials.txt" for part in ("dev", "test")}
    rows = read_rows(manifests["dev"], data_root=folder, columns=("ID", "wav", "spk_id"))
    speakers = {name: row["spk_id"] for name, row in rows.items()}
    write_trials(lists["dev"], make_trials(speakers, 1000, 4000, seed))
    write_trials(lists["test"], of_test)
    return manifests, lists


def _sets(path: Path) -> dict[str, str]:
    rows = read_table(path, (SPEAKER, SET), delimiter="\t")
    for row in rows:
        if row[SET] not in ("dev", "test"):
            raise ValueError(f"{path}: {row[SPEAKER]} is in {row[SET]!r}; expected dev or test")
    return {row[SPEAKER]: row[SET] for row in rows}


def _read_trials(folder: Path, name: str, sets: dict[str, str]) -> list[Trial]:
    path, trials, checked = folder / name, [], set()
    for number, line in enumerate(read_lines(path), start=1):
        fields = line.split()
        if len(fields) != 3 or fields[0] not in ("0", "1"):
            raise ValueError(
                f"{path}, line {number}: expected `1 id10270/5r0dWxy17C8/00001.wav id10270/...` or "
                f"the like, got {line!r}"
            )
        for wav in set(fields[1:]) - checked:
            if not (folder / "wav" / wav).is_file():
                raise FileNotFoundError(
                    f"{path}, line {number}: names {wav}, which is absent; expected it in "
                    f"{folder / 'wav'}"
                )
            if sets.get(wav.split("/")[0]) != "test":
                raise ValueError(
                    f"{path}, line {number}: {wav} is of no speaker of the test set of "
                    f"{folder / 'vox1_meta.csv'}; expected trials of those alone (veri_test2.txt)"
                )
            checked.add(wav)
        trials.append(Trial(fields[0] == "1", *(wav.removesuffix(".wav") for wav in fields[1:])))
    return trials


def _rows(folder: Path, speaker: str) -> list[dict]:
    videos = sorted(p for p in (folder / "wav" / speaker).iterdir() if p.is_dir())
    return [_row(p.relative_to(folder).as_posix()) for v in videos for p in find_audio(v)]


def _row(wav: str) -> dict:
    name = wav.removeprefix("wav/").rpartition(".")[0]
    return {"ID": name, "wav": wav, "spk_id": name.split("/")[0]}

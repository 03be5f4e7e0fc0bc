"""Trials of speaker verification: ``1 first second`` or ``0 first second``, as VoxCeleb's lists.

``1`` says that the same speaker is heard in both; ``first`` and ``second`` are IDs of a manifest.
"""

import itertools
import random
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from hff_modules.files import read_text, write_atomically


class Trial(NamedTuple):
    """Two utterances, and whether they are of one speaker."""

    same: bool
    first: str
    second: str


def make_trials(
    speakers: Mapping[str, str], same: int, different: int, seed: int = 0
) -> list[Trial]:
    """Draw trials, the same for the same seed.

    Arguments
    ---------
    speakers : mapping of str to str
        Speaker of each utterance, by ID.
    same, different : int
        Trials to draw at most.
    seed : int

    Returns
    -------
    list of Trial

    Raises
    ------
    ValueError
        There are no two utterances of one speaker, or there is one speaker only.
    """
    by_speaker: dict[str, list[str]] = {}
    for name in sorted(speakers):
        by_speaker.setdefault(speakers[name], []).append(name)
    generator = random.Random(seed)
    pairs = [p for names in by_speaker.values() for p in itertools.combinations(names, 2)]
    if not pairs or len(by_speaker) < 2:
        raise ValueError(
            f"no trials from {len(speakers)} utterances of {len(by_speaker)} speakers: expected "
            "two speakers or more, one of them with two utterances or more"
        )
    targets = generator.sample(pairs, min(same, len(pairs)))
    names = sorted(speakers)
    everything = len(names) * (len(names) - 1) // 2 - len(pairs)
    others: dict[tuple[str, str], None] = {}
    while len(others) < min(different, everything):
        first, second = sorted(generator.sample(names, 2))
        if speakers[first] != speakers[second]:
            others[first, second] = None
    return [Trial(True, *pair) for pair in targets] + [Trial(False, *pair) for pair in others]


def write_trials(path: str | Path, trials: Iterable[Trial]) -> None:
    """Write a list of trials."""
    lines = (f"{int(trial.same)} {trial.first} {trial.second}\n" for trial in trials)
    write_atomically(path, "".join(lines))


def read_trials(path: str | Path, names: Collection[str], manifest: str | Path) -> list[Trial]:
    """Read a list of trials.

    Arguments
    ---------
    path : str or path
    names : collection of str
        The utterances that there are.
    manifest : str or path
        Where they are from, for messages.

    Returns
    -------
    list of Trial

    Raises
    ------
    FileNotFoundError
        There is no such list.
    ValueError
        A line is no trial or names an utterance that is not there, or all trials are of one kind.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such list of trials; expected `1 first second` lines")
    trials = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        fields = line.split()
        if not fields:
            continue
        if len(fields) != 3 or fields[0] not in ("0", "1"):
            raise ValueError(
                f"{path}, line {number}: expected `1 first second` or `0 first second`, "
                f"got {line!r}"
            )
        for name in fields[1:]:
            if name not in names:
                raise ValueError(
                    f"{path}, line {number}: names {name}, which is absent; expected utterances of "
                    f"{manifest}"
                )
        trials.append(Trial(fields[0] == "1", *fields[1:]))
    kinds = {trial.same for trial in trials}
    if len(kinds) != 2:
        raise ValueError(
            f"{path}: expected trials of both kinds, found {len(trials)} of "
            f"{'one kind' if trials else 'none'}"
        )
    return trials

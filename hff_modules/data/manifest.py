"""Manifests: CSV files of utterances, in the form that SpeechBrain's ``DynamicItemDataset`` reads.

Columns are ``ID, duration, wav, spk_id, wrd`` and whatever else a task needs. ``wav`` is written as
``$data_root/relative/path.flac``: the data may move, the manifest stays right.
"""

import csv
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hff_modules.files import open_atomically

COLUMNS = ("ID", "duration", "wav", "spk_id", "wrd")
DATA_ROOT = "$data_root"


class ManifestError(ValueError):
    """A manifest that cannot be used; the message names file, line and column."""


@dataclass(frozen=True)
class ManifestSummary:
    """Size of a manifest; ``str()`` of it is one line to print.

    Arguments
    ---------
    hours : float
        Sum of the durations.
    utterances : int
        Number of rows.
    speakers : int
        Number of different ``spk_id``; 0 when there is no such column, or nothing in it.
    shortest, longest : float
        Seconds.
    """

    hours: float
    utterances: int
    speakers: int
    shortest: float
    longest: float

    def __str__(self) -> str:
        size = f"{self.hours:.2f} h" if self.hours >= 0.1 else f"{60 * self.hours:.1f} min"
        return (
            f"{size}, {self.utterances} utterances of {self.shortest:.1f} to {self.longest:.1f} s, "
            f"{self.speakers or 'unknown'} speakers"
        )


def write_manifest(
    path: str | os.PathLike,
    rows: Iterable[Mapping[str, object]],
    columns: Sequence[str] = COLUMNS,
) -> None:
    """Write a manifest in one step: there is the whole new file or what was there before.

    Arguments
    ---------
    path : str or path
        CSV file to write; its folder is made when absent.
    rows : iterable of mappings
        One per utterance, with a value for every column; ``duration`` in seconds.
    columns : sequence of str
        Columns in their order; ``ID``, ``duration`` and ``wav`` must be among them.

    Raises
    ------
    ManifestError
        No rows, a row without a column, an ID given twice, or a duration that is not positive.
    """
    path = Path(path)
    absent = {"ID", "duration", "wav"} - set(columns)
    if absent:
        raise ManifestError(f"{path}: a manifest needs the columns {sorted(absent)}")
    table, seen = [], set()
    for row in rows:
        name = row.get("ID")
        missing = [column for column in columns if row.get(column) is None]
        if missing:
            raise ManifestError(f"{path}: utterance {name!r} has no {', '.join(missing)}")
        if name in seen:
            raise ManifestError(f"{path}: the ID {name!r} is there twice")
        seen.add(name)
        duration = _positive(row["duration"], f"{path}: utterance {name!r}")
        table.append([f"{duration:.4f}" if c == "duration" else str(row[c]) for c in columns])
    if not table:
        raise ManifestError(f"{path}: no utterances to write")
    with open_atomically(path) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(table)


def read_rows(
    path: str | os.PathLike,
    data_root: str | os.PathLike | None = None,
    columns: Sequence[str] = COLUMNS,
) -> dict[str, dict]:
    """Read a manifest into ``{ID: {column: value}}``, as ``DynamicItemDataset`` takes it.

    Other than ``speechbrain.dataio.dataio.load_data_csv`` it only replaces ``$data_root`` at the
    start of ``wav``, so a transcript may contain a dollar sign.

    Arguments
    ---------
    path : str or path
        CSV file.
    data_root : str or path, optional
        Folder that replaces ``$data_root``. Needed only when the manifest uses it.
    columns : sequence of str
        Columns that must be there; others are kept as well.

    Returns
    -------
    dict
        In the order of the file; ``duration`` is a float, everything else a str.

    Raises
    ------
    ManifestError
        The file is missing or empty, lacks a column, or a row is broken.
    """
    path = Path(path)
    if not path.is_file():
        raise ManifestError(f"{path}: no such manifest")
    rows: dict[str, dict] = {}
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file, skipinitialspace=True, restkey="")
        header = reader.fieldnames or []
        absent = [column for column in columns if column not in header]
        if absent:
            raise ManifestError(
                f"{path}: no column {', '.join(absent)}; it has {', '.join(header) or 'nothing'}"
            )
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            if None in row.values() or "" in row:
                raise ManifestError(f"{where}: expected {len(header)} fields ({', '.join(header)})")
            name = row.pop("ID")
            if name in rows:
                raise ManifestError(f"{where}: the ID {name!r} is there twice")
            row["duration"] = _positive(row["duration"], where)
            if row["wav"].startswith(DATA_ROOT):
                if data_root is None:
                    raise ManifestError(f"{where}: {row['wav']} needs a data_root; none was given")
                row["wav"] = os.fspath(data_root) + row["wav"][len(DATA_ROOT) :]
            rows[name] = row
    if not rows:
        raise ManifestError(f"{path}: the manifest has no utterances")
    return rows


def summarize_manifest(path: str | os.PathLike) -> ManifestSummary:
    """Hours, utterances and speakers of a manifest."""
    rows = read_rows(path, data_root="", columns=("ID", "duration", "wav")).values()
    durations = [row["duration"] for row in rows]
    speakers = {row["spk_id"] for row in rows if row.get("spk_id")}
    return ManifestSummary(
        hours=sum(durations) / 3600,
        utterances=len(rows),
        speakers=len(speakers),
        shortest=min(durations),
        longest=max(durations),
    )


def _positive(value: object, where: str) -> float:
    try:
        duration = float(value)
    except (TypeError, ValueError):
        duration = math.nan
    if not 0 < duration < math.inf:
        raise ManifestError(f"{where}: duration is {value!r}, expected seconds above 0")
    return duration

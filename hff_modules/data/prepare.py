"""What recipes share to make manifests: reading durations, leaving out what is broken, no leaks.

A recipe reads the tables or folders of its data set into rows; :func:`write_parts` does the rest.
"""

import contextlib
import csv
import hashlib
import json
import logging
import os
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from speechbrain.utils.logger import get_logger

from hff_modules.data.audio import AudioError, audio_info, check_all, check_end
from hff_modules.data.manifest import summarize_manifest, write_manifest
from hff_modules.files import read_text, write_atomically

logger = get_logger(__name__)

ENDINGS = (".flac", ".wav", ".opus", ".ogg", ".mp3")


def expect(data_folder: str | os.PathLike, names: Iterable[str], layout: str) -> Path:
    """Give the data folder if it holds what it should.

    Arguments
    ---------
    data_folder : str or path
    names : iterable of str
        Files or folders that must be in it, as paths relative to it.
    layout : str
        The data set and its layout, for the message.

    Returns
    -------
    Path
        Absolute.

    Raises
    ------
    FileNotFoundError
        The folder or something in it is not there; says what was expected and what there is.
    """
    folder = Path(data_folder).absolute()
    if not folder.is_dir():
        raise FileNotFoundError(f"data_folder {folder}: no such folder; expected {layout}")
    absent = [name for name in names if not (folder / name).exists()]
    if absent:
        raise FileNotFoundError(
            f"data_folder {folder}: no {', '.join(absent)} in it; expected {layout}; "
            f"it holds {listing(folder)}"
        )
    return folder


LINE = "line of the file"


def listing(folder: Path) -> str:
    """Name the first things in a folder, for messages."""
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "") if names else "nothing"


def find_audio(folder: Path) -> list[Path]:
    """Audio files of a folder, sorted; hidden files (macOS leaves some) are no audio."""
    files = (p for p in folder.iterdir() if p.suffix.lower() in ENDINGS)
    return sorted(p for p in files if not p.name.startswith("."))


def clip_finder(folder: Path) -> Callable[[str], str | None]:
    """Gives a file's name in a folder by a table's, whose ending may be from before a conversion.

    Arguments
    ---------
    folder : Path

    Returns
    -------
    Callable
        Gives None where there is no such file.
    """
    names = [file.name for file in os.scandir(folder)]
    clips: dict[str, str] = {}
    for ending in reversed(ENDINGS):
        clips |= {name.removesuffix(ending): name for name in names if name.endswith(ending)}
    clips |= {name: name for name in names}
    return lambda name: clips.get(name) or clips.get(Path(name).stem)


def read_table(
    path: Path, columns: Sequence[str], delimiter: str = ",", quoting: int = csv.QUOTE_MINIMAL
) -> list[dict[str, str]]:
    """Read a table of a data set.

    Arguments
    ---------
    path : Path
        Delimited text with a line of headings.
    columns : sequence of str
        Columns that must be there.
    delimiter : str
    quoting : int
        ``csv.QUOTE_NONE`` where quotation marks are text.

    Returns
    -------
    list of dict
        One per line, by heading; the number of the line is under ``LINE``.

    Raises
    ------
    ValueError
        A column is not there, a line is too short or too long, there is a line break in a field, or
        the file is not UTF-8.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:  # Excel begins with a BOM
            reader = csv.DictReader(file, delimiter=delimiter, quoting=quoting)
            header = reader.fieldnames or []
            absent = [column for column in columns if column not in header]
            if absent:
                raise ValueError(
                    f"{path}: expected the columns {', '.join(columns)}; it has "
                    f"{', '.join(header) or 'nothing'}"
                )
            rows = []
            for row in reader:
                line, extra = reader.line_num, row.pop(None, [])
                open_at = [column for column, value in row.items() if "\n" in (value or "")]
                if open_at:  # in any column: what is lost are rows
                    raise ValueError(
                        f"{path}, line {line}: a text goes over several lines, in the column "
                        f"{open_at[0]}; is a quotation mark left open?"
                    )
                cut = any(map(str.strip, extra))
                if any(row[column] is None for column in columns) or cut:
                    hint = "; a text with commas needs quotation marks around it"
                    hint = hint if delimiter == "," else "; is there a tab in a text?"
                    raise ValueError(
                        f"{path}, line {line}: expected {len(header)} fields{hint * cut}"
                    )
                rows.append({**row, LINE: line})
            return rows
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text ({error})") from None


def read_lines(path: Path) -> list[str]:
    """Lines of a list that are not empty."""
    return [line.strip() for line in read_text(path).splitlines() if line.strip()]


def read_durations(
    paths: Mapping[str, Path], whole: bool = False
) -> tuple[dict[str, float], list[str]]:
    """Seconds of audio files by ID, and what is wrong with the others.

    Only headers and ends are looked at, or, with ``whole``, all is decoded: some 500 times as fast
    as it is spoken.
    """

    def duration(path: Path) -> float | AudioError:
        try:
            seconds = audio_info(path).duration
            (check_all if whole else check_end)(path)
            return seconds
        except AudioError as error:
            return error

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(duration, paths.values()))
    pairs = list(zip(paths, results, strict=True))
    return (
        {name: result for name, result in pairs if not isinstance(result, AudioError)},
        [str(result) for _, result in pairs if isinstance(result, AudioError)],
    )


def judge(
    part: str,
    problems: Mapping[str, Sequence[str]],
    usable: int,
    max_bad_share: float,
    key: str | None = None,
) -> None:
    """Name in a warning what cannot be used; refuse a part with too much of it.

    Arguments
    ---------
    part : str
        Name of the part, for the message.
    problems : mapping of str to sequence of str
        Unusable utterances by kind of trouble.
    usable : int
        The others.
    max_bad_share : float
        Share of unusable utterances that is an error.
    key : str, optional
        What the user calls that share, where it can be set.
    """
    bad = sum(map(len, problems.values()))
    if bad == 0:
        return
    report = "; ".join(
        f"{kind}: {len(names)} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for kind, names in problems.items()
        if names
    )
    share = bad / (bad + usable)
    message = f"{part}: {bad} of {bad + usable} utterances cannot be used: {report}"
    if usable == 0 or share > max_bad_share:
        raise ValueError(
            f"{message}. That is {share:.1%}, and at most {max_bad_share:.1%} may be"
            + f" (--{key})" * (key is not None)
        )
    logger.warning("%s. They are left out.", message)


@contextlib.contextmanager
def warnings_of(*names: str) -> Iterator[list[str]]:
    """Collect the warnings of some loggers, and of those below them, for a report."""
    found: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(record.getMessage())
    loggers = [logging.getLogger(name) for name in names]
    for one in loggers:
        one.addHandler(handler)
    try:
        yield found
    finally:
        for one in loggers:
            one.removeHandler(handler)


def write_parts(
    data_folder: Path,
    save_folder: str | os.PathLike,
    parts: Mapping[str, Sequence[Mapping[str, str]]],
    labels: Sequence[str] = (),
    max_bad_share: float = 0.02,
    key: str | None = None,
) -> dict[str, Path]:
    """Write one manifest per part, once the parts are known to share no speaker.

    Arguments
    ---------
    data_folder : Path
        The ``data_root`` of the manifests.
    save_folder : str or path
        Gets ``{part}.csv``, and ``parts.json``, by which a second call with the same rows knows
        that nothing is to be done.
    parts : mapping of str to sequence of mappings
        Rows with ``ID``, ``wav`` (relative to ``data_folder``), ``spk_id`` ("" where nobody knows
        who speaks) and the labels.
    labels : sequence of str
        Columns besides these.
    max_bad_share : float
        Share of a part that may be unreadable or absent; named in a warning, more is an error.
    key : str, optional
        What the user calls that share, where it can be set.

    Returns
    -------
    dict
        ``{part: path of its manifest}``.

    Raises
    ------
    ValueError
        A part is empty, a speaker or a recording is in two parts, or too much cannot be read.
    """
    check_apart(parts)
    for part in parts:
        if not parts[part]:
            there = sorted({row["spk_id"] for rows in parts.values() for row in rows} - {""})
            raise ValueError(
                f"{data_folder}: nothing in it is for {part}; "
                f"speakers there: {', '.join(there[:12]) or 'unknown'}"
            )
    save_folder = Path(save_folder)
    paths = {part: save_folder / f"{part}.csv" for part in parts}
    rows = {part: [dict(row) for row in rows] for part, rows in parts.items()}
    known = json.dumps([str(data_folder), rows, list(labels), max_bad_share], sort_keys=True)
    stamp = json.dumps({"made_from": hashlib.sha256(known.encode()).hexdigest()}) + "\n"
    stamp_file = save_folder / "parts.json"
    if stamp_file.is_file() and stamp_file.read_text(encoding="utf-8") == stamp:
        if all(path.is_file() for path in paths.values()):
            return paths
    stamp_file.unlink(missing_ok=True)
    for part, path in paths.items():
        audio = {row["ID"]: data_folder / row["wav"] for row in rows[part]}
        durations, unreadable = read_durations(audio)
        bad = {"absent, unreadable or empty audio": unreadable}
        judge(part, bad, len(durations), max_bad_share, key)
        table = [
            {**row, "duration": durations[row["ID"]], "wav": f"$data_root/{row['wav']}"}
            for row in rows[part]
            if row["ID"] in durations
        ]
        write_manifest(path, table, ("ID", "duration", "wav", "spk_id", *labels))
        logger.info("Wrote %s: %s", path, summarize_manifest(path))
    write_atomically(stamp_file, stamp)
    return paths


def check_apart(parts: Mapping[str, Sequence[Mapping[str, str]]]) -> None:
    """Refuse parts that share a recording, or a speaker where they are known.

    Arguments
    ---------
    parts : mapping of str to sequence of mappings
        Rows with ``ID``, ``wav`` and ``spk_id``.
    """
    for column, what in (("wav", "recording"), ("spk_id", "speaker")):
        seen: dict[str, str] = {}
        for part, rows in parts.items():
            for value in {row[column] for row in rows} - {""}:
                if value in seen:
                    raise ValueError(
                        f"the {what} {value} is in {seen[value]} and in {part}: scores would be "
                        "too good; expected parts that share none"
                    )
                seen[value] = part


def at_most(rows: Sequence[dict], column: str, limit: int | None, seed: int) -> list[dict]:
    """Rows of which no value of ``column`` has more than ``limit``, drawn at random; all for None.

    Arguments
    ---------
    rows : sequence of dict
        Rows with ``ID`` and ``column``.
    column : str
    limit : int, optional
    seed : int

    Returns
    -------
    list of dict
        In the order of ``rows``.
    """
    if limit is None:
        return list(rows)
    shuffled = sorted(rows, key=lambda row: row["ID"])
    random.Random(seed).shuffle(shuffled)
    counts, kept = Counter(), set()
    for row in shuffled:
        counts[row[column]] += 1
        if counts[row[column]] <= limit:
            kept.add(row["ID"])
    return [row for row in rows if row["ID"] in kept]


def choose_subset(rows: Sequence[dict], hours: float) -> list[dict]:
    """About ``hours`` hours of ``rows``: one utterance of each speaker in turn, without chance.

    Arguments
    ---------
    rows : sequence of dict
        Rows with ``ID``, ``spk_id`` and ``duration`` in seconds.
    hours : float
        Hours to reach; the last utterance may go over it.

    Returns
    -------
    list of dict
        In the order of ``rows``; all of them when there is no more than asked for.
    """
    queues: dict[str, list[dict]] = {}
    # By the number within the chapter first: so a speaker's chapters take turns, too.
    for row in sorted(rows, key=lambda row: (row["ID"].rpartition("-")[2], row["ID"])):
        queues.setdefault(row["spk_id"], []).append(row)
    chosen, seconds, position = set(), 0.0, 0
    while seconds < 3600 * hours and len(chosen) < len(rows):
        for queue in queues.values():
            if position < len(queue) and seconds < 3600 * hours:
                chosen.add(queue[position]["ID"])
                seconds += queue[position]["duration"]
        position += 1
    return [row for row in rows if row["ID"] in chosen]

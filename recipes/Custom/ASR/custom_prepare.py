"""Your own recordings: a CSV file is checked, reported on, split if need be, and made manifests.

Columns ``wav`` (a path, relative to the CSV file's folder or absolute) and ``text``; optionally
``split`` (train, dev or test) and ``speaker``. Tabs instead of commas in a ``.tsv`` file. Common
Voice's names of columns, and clips in a folder ``clips``, are understood as well.
"""

import csv as csv_module
import hashlib
import os
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from speechbrain.utils.logger import get_logger

from hff_modules.data.manifest import DATA_ROOT, summarize_manifest, write_manifest
from hff_modules.data.prepare import LINE, judge, read_durations, read_table, warnings_of
from hff_modules.data.writing import clean_parts, describe_units, writing_of
from hff_modules.files import write_atomically

logger = get_logger(__name__)

PARTS = ("train", "dev", "test")
ALSO_DEV = ("valid", "validation", "val")  # not eval, which is test to some
SHARE = 0.1  # of dev, and of test, where nobody says which is which
SHORT, LONG = 0.5, 30.0  # seconds
UNUSUAL = 4.0  # spreads from the median of characters per second
SHOWN = 20  # suspicious rows
COMMON_VOICE = ("path", "sentence", "client_id")
LIKELY_MEANT = {
    "split": ("set", "part", "partition", "subset", "fold"),
    "speaker": ("spk", "spk_id", "speaker_id", "speakers", "client_id"),
}


def prepare_custom(
    csv: str | os.PathLike,
    save_folder: str | os.PathLike,
    language: str = "",
    max_bad_share: float = 0.05,
    keep_harakat: bool = False,
    drop_shared_texts: bool = False,
    whole: bool = False,
    letters: str = "",
) -> tuple[dict[str, Path], Path]:
    """Check the rows, report on them, and write a manifest for each part.

    Arguments
    ---------
    csv : str or path
    save_folder : str or path
        Gets ``train.csv``, ``dev.csv``, ``test.csv`` and ``report.txt``.
    language : str
        Its code, for rules of case.
    max_bad_share : float
        Share of the rows that may be unusable; they are named in a warning, more is an error.
    keep_harakat : bool
    drop_shared_texts : bool
        Leave texts that dev or test has, too, out of train. They are counted in any case.
    whole : bool
        Decode every file from end to end, and not only its end.
    letters : str
        Signs that are letters in this language, such as digits for tones.

    Returns
    -------
    tuple of dict and Path
        ``{part: path of its manifest}``, and what ``$data_root`` stands for in them.

    Raises
    ------
    FileNotFoundError, ValueError
        No such file or column, too many unusable rows, a split that is none, or too few rows.
    """
    csv, save_folder = Path(csv).absolute(), Path(save_folder)
    with warnings_of("hff_modules", __name__) as warned:
        manifests, report = _prepare(
            *(csv, save_folder, max_bad_share, whole, drop_shared_texts),
            {"language": language, "keep_harakat": keep_harakat, "letters": letters},
        )
    report += ["  warnings:", *(f"    {warning}" for warning in warned)] if warned else []
    write_atomically(save_folder / "report.txt", "\n".join(report) + "\n")
    return manifests, csv.parent


def _prepare(csv, save_folder, max_bad_share, whole, drop_shared_texts, rules):
    rows = _usable(csv, _read(csv), max_bad_share, whole)
    given = any(row["split"] for row in rows)
    how = "as the column split says"
    if not given:
        how = split_rows(rows, writing_of((row["text"] for row in rows), **rules))
    parts = {part: [row for row in rows if row["split"] == part] for part in PARTS}
    _check_parts(csv, parts)
    texts = clean_parts(
        {part: {r["ID"]: r["text"] for r in rows} for part, rows in parts.items() if rows},
        drop_shared_texts=drop_shared_texts,
        **rules,
    )
    manifests, report = {}, [f"{csv}: {len(rows)} usable rows, parts {how}"]
    for part, cleaned in texts.items():
        manifests[part] = save_folder / f"{part}.csv"
        made = [{**row, "wrd": cleaned[row["ID"]]} for row in parts[part] if row["ID"] in cleaned]
        write_manifest(manifests[part], made)
        lost = len(parts[part]) - len(made)
        report.append(
            f"  {part}: {summarize_manifest(manifests[part])}"
            + f"; {lost} of {len(parts[part])} rows left out" * (lost > 0)
        )
    known = [(row, texts[row["split"]].get(row["ID"], "")) for row in rows]
    report += [f"  {describe_units(texts['train'].values())}", *suspicious(known)]
    logger.info("\n".join(report))
    return manifests, report


def _read(csv: Path) -> list[dict]:
    if not csv.is_file():
        raise FileNotFoundError(f"csv {csv}: no such file; expected the columns wav and text")
    delimiter = "\t" if csv.suffix == ".tsv" else ","
    quoting = csv_module.QUOTE_NONE if csv.suffix == ".tsv" else csv_module.QUOTE_MINIMAL
    wav_column, text_column, speaker_column, split_column = _columns(csv, delimiter)
    rows = read_table(csv, (wav_column, text_column), delimiter, quoting)
    if not rows:
        raise ValueError(f"csv {csv}: there are no rows below the line of headings")
    clips = csv.parent / "clips" if wav_column == "path" else csv.parent
    read = []
    for row in rows:
        line = row[LINE]
        split = (row.get(split_column) or "").strip().lower()
        split = "dev" if split in ALSO_DEV else split
        if split not in (*PARTS, ""):
            raise ValueError(
                f"csv {csv}, line {line}: split is {split!r}; expected train, dev, test"
            )
        wav = row[wav_column].strip()
        if not (csv.parent / wav).is_file() and (clips / wav).is_file():
            wav = f"clips/{wav}"
        read.append(
            {
                "ID": f"{line:05d}-{Path(wav).stem}",
                "line": line,
                "path": csv.parent / wav,
                "wav": wav if os.path.isabs(wav) else f"{DATA_ROOT}/{wav}",
                "text": row[text_column],
                "split": split,
                "spk_id": (row.get(speaker_column) or "").strip(),
            }
        )
    without = [row["line"] for row in read if not row["split"]]
    if without and len(without) < len(read):
        raise ValueError(
            f"csv {csv}, line {without[0]}: no split; expected one in all rows or none"
        )
    return read


def _columns(csv: Path, delimiter: str) -> tuple[str, str, str, str]:
    """The columns of path, text, speaker and split as they are spelt: ours, or Common Voice's.

    Speakers and splits that are overlooked put the user's own test clips into training.
    """
    with open(csv, encoding="utf-8-sig", errors="replace") as file:
        names = next(csv_module.reader(file, delimiter=delimiter), [])
    spelt = {name.strip().lower(): name for name in names}
    ours, theirs = ("wav", "text", "speaker"), COMMON_VOICE
    chosen = theirs if spelt.keys() >= {*theirs[:2]} and not spelt.keys() >= {*ours[:2]} else ours
    wanted = (*chosen, "split")
    for key, others in LIKELY_MEANT.items():
        meant = [spelt[name] for name in others if name in spelt and name not in wanted]
        if key in wanted and key not in spelt and meant:
            raise ValueError(
                f"csv {csv}: there is no column {key}, but {meant[0]}; call it {key}, or delete it"
            )
    unused = [name for key, name in spelt.items() if key not in wanted]
    if unused and chosen is ours:
        logger.warning(f"{csv}: columns that are not used: {', '.join(unused)}")
    return tuple(spelt.get(key, key) for key in wanted)


def _usable(csv: Path, rows: Sequence[dict], max_bad_share: float, whole: bool) -> list[dict]:
    problems: dict[str, list[str]] = {}
    seen: dict[Path, int] = {}
    candidates = []
    for row in rows:
        where = f"line {row['line']}"
        before = seen.setdefault(row["path"], row["line"])
        if not row["path"].is_file():
            problems.setdefault("no such file", []).append(f"{where}: {row['path']}")
        elif before != row["line"]:
            problems.setdefault("the file of another row", []).append(f"{where}: as line {before}")
        elif not any(character.isalpha() for character in row["text"]):
            problems.setdefault("text without letters", []).append(where)
        else:
            candidates.append(row)
    durations, unreadable = read_durations({r["ID"]: r["path"] for r in candidates}, whole)
    problems["unreadable or empty audio"] = unreadable
    usable = [
        {**row, "duration": durations[row["ID"]]} for row in candidates if row["ID"] in durations
    ]
    judge(str(csv), problems, len(usable), max_bad_share, "max_bad_share")
    return usable


def split_rows(rows: Sequence[dict], writing) -> str:
    """Choose a part for each row: whole speakers if they allow it, else whole texts.

    Arguments
    ---------
    rows : sequence of dict
        With ``spk_id``, ``text`` and ``duration``; get ``split``. The same rows get the same parts.
    writing : hff_modules.data.writing.Writing
        Which spellings are one text.

    Returns
    -------
    str
        How it was done, for the report.

    Raises
    ------
    ValueError
        Neither is possible.
    """
    ways = {"by text: no text is in two, speakers may be": lambda row: writing.clean(row["text"])}
    if all(row["spk_id"] for row in rows):
        ways = {"by speaker: none is in two": lambda row: row["spk_id"], **ways}
    for how, key in ways.items():
        parts = _shared_out(rows, key)
        if parts is not None:
            for row in rows:
                row["split"] = parts.get(key(row), "train")
            return how
    raise ValueError(
        f"{len(rows)} rows are too few to be split: expected some texts or speakers that are each "
        f"less than {2 * SHARE:.0%} of the speech, or a column split"
    )


def _shared_out(rows: Sequence[dict], key) -> dict[str, str] | None:
    """Parts of whole groups, as near to a tenth as can be for test and dev; None if too far off."""
    seconds = Counter()
    for row in rows:
        seconds[key(row)] += row["duration"]
    order = sorted(seconds, key=lambda group: hashlib.sha256(group.encode()).hexdigest())
    total, parts = seconds.total(), {}
    for part in ("test", "dev"):
        filled = 0.0
        for group in order:
            with_it, enough = filled + seconds[group], filled >= SHARE / 2 * total
            # Nearer to a tenth than without it; as long as there is too little, up to a fifth.
            most = 2 * SHARE * total - (filled if enough else 0.0)
            if group not in parts and with_it <= most + 1e-6:
                parts[group] = part
                filled += seconds[group]
        if filled < SHARE / 2 * total:  # a few clips would choose the epoch, or be the result
            return None
    return parts


def _check_parts(csv: Path, parts: Mapping[str, Sequence[dict]]) -> None:
    for part in ("train", "dev"):
        if not parts[part]:
            raise ValueError(f"csv {csv}: no usable row of the split {part}; expected some")
    if not parts["test"]:
        logger.warning(f"{csv}: no row of the split test: nothing is tested")
    speakers = {part: {row["spk_id"] for row in rows} - {""} for part, rows in parts.items()}
    for part in ("dev", "test"):
        both = sorted(speakers["train"] & speakers[part])
        if both:
            named = ", ".join(both[:3]) + (", ..." if len(both) > 3 else "")
            logger.warning(
                f"{csv}: {len(both)} speakers ({named}) are in train and in {part}: scores there "
                "are of known voices"
            )


def suspicious(rows: Sequence[tuple[dict, str]]) -> list[str]:
    """Lines about rows whose text and audio hardly belong together, the strangest first.

    Arguments
    ---------
    rows : sequence of tuple of dict and str
        Row with ``line``, ``path`` and ``duration``; its cleaned text.
    """
    rates = [len(text) / row["duration"] for row, text in rows if text]
    middle = statistics.median(rates)
    spread = 1.4826 * statistics.median(abs(rate - middle) for rate in rates)  # as a deviation
    spread = max(spread, 0.1 * middle)
    found = []
    for row, text in rows:
        seconds, rate = row["duration"], len(text) / row["duration"]
        away = abs(rate - middle) / spread
        reasons = []
        if text and away > UNUSUAL:
            much = "many" if rate > middle else "few"
            reasons.append(f"{much} characters, {rate:.1f} per second, usual are {middle:.1f}")
        if not SHORT <= seconds <= LONG:
            reasons.append(f"{seconds:.1f} s long")
        if reasons:
            found.append(
                (-away, f"    line {row['line']}, {row['path'].name}: {'; '.join(reasons)}")
            )
    if not found:
        return ["  no suspicious rows"]
    lines = [line for _, line in sorted(found)[:SHOWN]]
    more = [f"    and {len(found) - SHOWN} more"] if len(found) > SHOWN else []
    return [f"  {len(found)} suspicious rows, which are kept:", *lines, *more]

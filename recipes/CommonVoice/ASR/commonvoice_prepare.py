"""Manifests of languages of Common Voice (Ardila et al., LREC 2020), or of any data in its shape.

A folder for each language, with ``train.tsv``, ``dev.tsv``, ``test.tsv`` (columns client_id, path
and sentence; no quoting) and ``clips``. Clips may have another ending than the tables say.
"""

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from speechbrain.utils.logger import get_logger

from hff_modules.data.manifest import DATA_ROOT, read_rows, summarize_manifest, write_manifest
from hff_modules.data.prepare import (
    choose_subset,
    clip_finder,
    expect,
    judge,
    listing,
    read_table,
    write_parts,
)
from hff_modules.data.writing import clean_parts, describe_units

logger = get_logger(__name__)

PARTS = ("train", "dev", "test")
COLUMNS = ("client_id", "path", "sentence")
LAYOUT = "a language of Common Voice: train.tsv, dev.tsv, test.tsv and clips/"


def prepare_commonvoice(
    data_folder: str | os.PathLike,
    save_folder: str | os.PathLike,
    language: str | Sequence[str],
    max_minutes: float | None = None,
    max_dev_minutes: float | None = None,
    max_missing: float = 0.05,
    keep_harakat: bool = False,
    drop_shared_texts: bool = False,
    letters: str = "",
) -> dict[str, dict[str, Path]]:
    """Write the manifests of one language or of several, each in a folder of its own.

    Arguments
    ---------
    data_folder : str or path
        The folder of the languages' folders, and the ``data_root`` of the manifests.
    save_folder : str or path
    language : str or sequence of str
        Names of folders in ``data_folder``.
    max_minutes : float, optional
        Train on about so much of each language: one clip of each speaker in turn, without chance.
    max_dev_minutes : float, optional
        The same for dev, which is scored after every epoch.
    max_missing : float
        Share of a part's clips that may be absent; another such share may be unreadable.
    keep_harakat : bool
        Keep the vowel marks of Arabic script.
    drop_shared_texts : bool
        Leave sentences that dev or test has, too, out of train. They are counted in any case.
    letters : str
        Signs that are letters, such as digits for tones.

    Returns
    -------
    dict
        ``{language: {part: path of its manifest}}``.

    Raises
    ------
    FileNotFoundError, ValueError
        A language that is not there, another layout, too much that is absent or unreadable, a
        clip or a speaker in two parts.
    """
    languages = [language] if isinstance(language, str) else language
    if not isinstance(languages, Sequence) or not all(isinstance(n, str) for n in languages):
        raise ValueError(f"language: expected a folder's name or a list of them, got {language!r}")
    if not languages or len(set(languages)) < len(languages):
        raise ValueError(f"language: expected names that differ, got {languages}")
    limits = {"train": max_minutes, "dev": max_dev_minutes}
    for key, minutes in {"max_minutes": max_minutes, "max_dev_minutes": max_dev_minutes}.items():
        if minutes is not None and not (isinstance(minutes, int | float) and minutes > 0):
            raise ValueError(f"{key}: expected minutes above 0, got {minutes}")
    root = Path(data_folder).absolute()
    check_languages(root, languages)
    options = (limits, max_missing, keep_harakat, drop_shared_texts, letters)
    return {
        name: _prepare_language(root, Path(save_folder) / name, name, *options)
        for name in languages
    }


def check_languages(root: Path, languages: Sequence[str]) -> None:
    """Refuse languages that are not there, naming those that are."""
    if not root.is_dir():
        raise FileNotFoundError(f"data_folder {root}: no such folder; expected one per language")
    known = sorted(path.parent.name for path in root.glob("*/train.tsv"))
    absent = [name for name in languages if name not in known]
    if absent:
        there = f"languages there: {', '.join(known)}" if known else f"it holds {listing(root)}"
        alone = [name for name in absent if (root / name / "validated.tsv").is_file()]
        if alone:  # as the smallest languages come
            there = f"of {root / alone[0] / 'validated.tsv'} recipes/Custom/ASR makes parts (--csv)"
        raise FileNotFoundError(
            f"language {', '.join(absent)}: no such folder with a train.tsv in {root}; {there}"
        )


def _prepare_language(
    root: Path,
    save_folder: Path,
    language: str,
    limits: Mapping[str, float | None],
    max_missing: float,
    keep_harakat: bool,
    drop_shared_texts: bool,
    letters: str,
) -> dict[str, Path]:
    folder = expect(root / language, [*(f"{part}.tsv" for part in PARTS), "clips"], LAYOUT)
    find_clip = clip_finder(folder / "clips")
    parts: dict[str, list[dict[str, str]]] = {}
    for part in PARTS:
        table = folder / f"{part}.tsv"
        rows = read_table(table, COLUMNS, delimiter="\t", quoting=csv.QUOTE_NONE)
        if not rows:
            raise ValueError(
                f"{table} has no rows; where a language has too few clips for three parts, "
                "recipes/Custom/ASR takes validated.tsv and makes the parts"
            )
        found, missing = [], []
        for row in rows:
            path = row["path"].strip()
            clip = find_clip(path)
            if clip is None:
                missing.append(path)
                continue
            found.append(
                {
                    "ID": f"{language}-{Path(clip).stem}",
                    "wav": f"{language}/clips/{clip}",
                    "spk_id": row["client_id"],
                    "sentence": row["sentence"],
                }
            )
        named = {"clips that the table names are absent": missing}
        judge(str(table), named, len(found), max_missing, "max_missing")
        _refuse_twice(found, table)
        parts[part] = found
    sentences = {part: {r["ID"]: r["sentence"] for r in rows} for part, rows in parts.items()}
    texts = clean_parts(sentences, language, keep_harakat, drop_shared_texts, letters)
    made = {
        part: [
            {"ID": r["ID"], "wav": r["wav"], "spk_id": r["spk_id"], "wrd": texts[part][r["ID"]]}
            for r in rows
            if r["ID"] in texts[part]
        ]
        for part, rows in parts.items()
    }
    manifests = write_parts(root, save_folder, made, ("wrd",), max_missing, "max_missing")
    for part, minutes in limits.items():
        if minutes is not None:
            manifests[part] = _limited(manifests[part], minutes)
    train = read_rows(manifests["train"], DATA_ROOT).values()
    logger.info(f"{language}: {describe_units(row['wrd'] for row in train)}")
    return manifests


def _limited(manifest: Path, minutes: float) -> Path:
    rows = [{"ID": ID, **row} for ID, row in read_rows(manifest, DATA_ROOT).items()]
    path = manifest.with_name(f"{manifest.stem}-{minutes:g}min.csv")
    write_manifest(path, choose_subset(rows, minutes / 60))
    logger.info(f"{path}: {summarize_manifest(path)}")
    return path


def _refuse_twice(rows: Sequence[dict[str, str]], table: Path) -> None:
    seen = set()
    for row in rows:
        if row["wav"] in seen:
            raise ValueError(f"{table}: the clip {row['wav']} is named twice")
        seen.add(row["wav"])

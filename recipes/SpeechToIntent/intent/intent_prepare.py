"""Manifests of Picovoice's speech-to-intent benchmark: coffee orders, ``label.json`` with slots.

    clean/<name>.wav              or speech/clean/, as in the ``data`` folder of the benchmark
    label.json                    or label/label.json: {file: {"slots": {slot: value}, ...}}

Nobody knows who speaks in which clip, so the parts are drawn by clip: a speaker may be in several.
"""

import json
import os
import random
from collections import Counter
from pathlib import Path

from hff_modules.data.prepare import expect, judge, write_parts

SLOTS = ("coffeeDrink", "milkAmount", "numberOfShots", "roast", "size", "sugarAmount")
ABSENT = "none"
PLACES = (("clean", "label.json"), ("speech/clean", "label/label.json"))
LAYOUT = (
    "the speech-to-intent benchmark: clean/*.wav with label.json, or speech/clean/*.wav with "
    "label/label.json"
)


def prepare_intent(
    data_folder: str | os.PathLike,
    save_folder: str | os.PathLike,
    shares: tuple[float, float] = (0.1, 0.2),
    seed: int = 0,
    max_bad_share: float = 0.02,
) -> dict[str, Path]:
    """Write ``train.csv``, ``dev.csv`` and ``test.csv`` with a column for each slot.

    Arguments
    ---------
    data_folder : str or path
    save_folder : str or path
    shares : tuple of float
        Of all clips, for dev and for test. What they hold of values of slots has two examples in
        training at least, so a clip with a very rare value is always trained on.
    seed : int
        Of the draw.
    max_bad_share : float
        Share of labelled clips that may be absent.

    Returns
    -------
    dict
        ``{part: path of its manifest}``.

    Raises
    ------
    FileNotFoundError, ValueError
        Another layout; says what was expected and what was found.
    """
    present = [p for p in PLACES if all((Path(data_folder) / name).exists() for name in p)]
    clips, labels = present[0] if present else PLACES[0]
    folder = expect(data_folder, [clips, labels], LAYOUT)
    rows = _rows(folder, clips, folder / labels)
    absent = [row["wav"] for row in rows if not (folder / row["wav"]).is_file()]
    rows = [row for row in rows if row["wav"] not in set(absent)]
    judge(labels, {"absent": absent}, len(rows), max_bad_share)
    return write_parts(folder, save_folder, draw_parts(rows, shares, seed), SLOTS)


def _rows(folder: Path, clips: str, labels: Path) -> list[dict]:
    try:
        table = json.loads(labels.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{labels}: expected JSON ({error})") from None
    rows = []
    for name, label in sorted(table.items()):
        if not isinstance(label, dict) or not isinstance(label.get("slots"), dict):
            raise ValueError(f'{labels}: {name} has no "slots"; expected {{slot: value}} there')
        strange = sorted(set(label["slots"]) - set(SLOTS))
        if strange:
            raise ValueError(
                f"{labels}: {name} has the slot {strange[0]}; expected some of {', '.join(SLOTS)}"
            )
        # Some values begin with a space: " milk" and "milk" are one.
        slots = {slot: label["slots"].get(slot, ABSENT).strip() for slot in SLOTS}
        rows.append({"ID": Path(name).stem, "wav": f"{clips}/{name}", "spk_id": "", **slots})
    return rows


def draw_parts(rows: list[dict], shares: tuple[float, float], seed: int) -> dict[str, list[dict]]:
    """Share clips out; arguments as for :func:`prepare_intent`."""
    shuffled = sorted(rows, key=lambda row: row["ID"])
    random.Random(seed).shuffle(shuffled)
    examples: Counter = Counter()
    parts: dict[str, list[dict]] = {"train": [], "dev": [], "test": []}
    rest = []
    for row in shuffled:
        values = [(slot, row[slot]) for slot in SLOTS]
        if any(examples[value] < 2 for value in values):
            parts["train"].append(row)
            examples.update(values)
        else:
            rest.append(row)
    dev, test = (round(share * len(rows)) for share in shares)
    parts["dev"], parts["test"] = rest[:dev], rest[dev : dev + test]
    parts["train"] += rest[dev + test :]
    return parts

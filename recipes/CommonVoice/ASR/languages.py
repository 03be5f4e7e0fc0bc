"""A plan of hff_modules.compare for several languages, and one table of all of them.

    python languages.py plans/few_shot.yaml mt ru hi --jobs 2 -- --data_folder /data/CommonVoice

Everything but the languages goes to ``hff_modules.compare``, which goes on where it was stopped.
The runs of a row and a seed become one entry of ``measured.json``: CER of each language, their mean
as the set "mean", and with a language model those of the beam search without and with it. All
scores of each language are under ``per_language``.
"""

import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from commonvoice_prepare import check_languages

from hff_modules.cli import on_command_line, run
from hff_modules.files import write_atomically
from hff_modules.tables import markdown

MEANS = ("train_seconds", "step_seconds", "peak_memory_mb", "trainable_parameters")
KNOWN = ("known_units", "new_units")
OF_ONE = ("test", "history", "lm", "start_from", "language", "reach", "layer_weights", "chosen")
OF_ONE += ("dataset",)
BY_LANGUAGE = ("settings", "data")


def together(runs: Sequence[dict[str, Any]], languages: Sequence[str]) -> list[dict[str, Any]]:
    """One entry for the runs of all languages that share label and seed.

    Arguments
    ---------
    runs : sequence of dict
        As ``runs.json`` of a comparison has them, with ``language``.
    languages : sequence of str
        In the order of the columns.

    Returns
    -------
    list of dict
        Where a run failed, the entry has failed, too: a mean of fewer languages would be another.
    """
    groups: dict[tuple, list[dict]] = {}
    for one in runs:
        groups.setdefault((one["label"], one["seed"]), []).append(one)
    entries = []
    for group in groups.values():
        first = group[0]
        entry = {k: v for k, v in first.items() if k not in (*OF_ONE, *BY_LANGUAGE)}
        failed = [f"{one['language']}: {one['failed']}" for one in group if "failed" in one]
        absent = set(languages) - {one["language"] for one in group}
        if failed or absent:
            why = "; ".join([*failed, *(f"{name}: not run" for name in sorted(absent))])
            entries.append({"label": first["label"], "method": first["method"],
                            "seed": first["seed"], "failed": why})  # fmt: skip
            continue
        scores = {one["language"]: one["test"][one["language"]] for one in group}
        names = set.intersection(*(set(of_one) for of_one in scores.values()))
        mean = {n: statistics.mean(of_one[n] for of_one in scores.values()) for n in names}
        test = {"mean": {"cer": mean["cer"]}}  # WER counts sentences in scripts without spaces
        for name, key in (("mean, beam", "cer_beam"), ("mean, beam with LM", "cer_lm")):
            if key in mean:
                test[name] = {"cer": mean[key]}
        test |= {name: {"cer": scores[name]["cer"]} for name in languages}
        entry |= {key: statistics.mean(one[key] for one in group) for key in MEANS}
        entry["trainable_parameters"] = round(entry["trainable_parameters"])
        for key in BY_LANGUAGE:
            if all(key in one for one in group):
                entry[key] = {one["language"]: one[key] for one in group}
        entry["per_language"] = {
            one["language"]: {**scores[one["language"]], "train_seconds": one["train_seconds"]}
            | {key: one["start_from"][key] for key in KNOWN if one.get("start_from")}
            for one in group
        }
        entry["dev"] = {"cer": statistics.mean(one["dev"]["cer"] for one in group)}
        entries.append({**entry, "languages": list(languages), "test": test})
    return entries


def main(argv: Sequence[str]) -> list[dict]:
    """Command line."""
    argv, extra = list(argv), []
    if "--" in argv:
        argv, extra = argv[: argv.index("--")], argv[argv.index("--") + 1 :]
    options = [place for place, word in enumerate(argv) if word.startswith("--")]
    words = options[0] if options else len(argv)
    if words < 2 or not Path(argv[0]).is_file() or "--output" in argv:
        raise ValueError(
            "expected a plan and languages, then options of hff_modules.compare but --output, such "
            f"as plans/few_shot.yaml mt ru --jobs 2 -- --data_folder ...; got {' '.join(argv)}"
        )
    plan, languages, options = argv[0], argv[1:words], argv[words:]
    for folder in on_command_line(["method", *extra]).get("data_folder", []):
        check_languages(Path(folder), languages)  # before the first of them has taken hours
    place = Path("results/compare") / Path(plan).stem
    runs, codes = [], {}
    for language in languages:
        output = place / language
        line = [sys.executable, "-m", "hff_modules.compare", plan, "--output", str(output)]
        written = output / "runs.json"
        before = written.stat().st_mtime_ns if written.is_file() else None
        codes[language] = subprocess.call([*line, *options, "--", *extra, "--language", language])
        if written.is_file() and written.stat().st_mtime_ns != before:  # else it was refused
            found = json.loads((output / "runs.json").read_text(encoding="utf-8"))
            runs += [{**one, "language": language} for one in found]
        if codes[language] < 0 or codes[language] == 130:
            raise ValueError(f"stopped at {language}; the same command goes on from here")
    if not runs:
        raise ValueError(f"no language gave results: {codes}")
    entries = together(runs, languages)
    write_atomically(
        place / "measured.json", json.dumps(entries, indent=1, ensure_ascii=False) + "\n"
    )
    write_atomically(place / "table.md", markdown(entries))
    print(f"\n{markdown(entries)}{place}: measured.json, table.md, and a folder for each language")
    wrong = [language for language, code in codes.items() if code]
    if wrong:
        raise ValueError(f"not all of it was done, see above: {', '.join(wrong)}")
    return entries


if __name__ == "__main__":
    run(main)

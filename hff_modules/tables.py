"""Tables in READMEs from ``results.json`` files: gathered and written by command, never typed.

    python -m hff_modules.tables collect results/librispeech measured.json
    python -m hff_modules.tables add results/compare/methods/runs.json measured.json
    python -m hff_modules.tables write README.md

``collect`` gathers the results of all runs below a folder. ``add`` adds the runs of a comparison to
a file: those of other seeds or rows, from another machine, say. ``write`` fills every block between
``<!-- table: measured.json -->`` and ``<!-- end of table -->`` in a Markdown file from the file
that it names (beside the Markdown file), runs that differ in their seed only as mean ± spread. A
block may choose its columns: ``<!-- table: measured.json | method | dev CER % -->``.
"""

import argparse
import json
import math
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from hff_modules.cli import run as run_main
from hff_modules.config import DEBUG
from hff_modules.files import read_json, read_text, write_atomically

SCORES = (
    *("cer", "wer", "cer_beam", "wer_beam", "cer_lm", "wer_lm"),
    *("eer", "eer_s_norm", "min_dcf", "min_dcf_s_norm", "accuracy", "unweighted_accuracy"),
)
NO_PERCENT = ("min_dcf", "min_dcf_s_norm")  # all others are
LARGER_IS_BETTER = ("accuracy", "unweighted_accuracy")

# What the runs of a row have in common, where no label says which belong together
ALIKE = ("task", "dataset", "method", "encoder", "layers", "horizon")
ALIKE += ("trainable_encoder_parameters", "trainable_parameters")
# What runs have in common where a label says that they belong together
OF_A_ROW = ("settings", "processes", "auto_layers", "dataset", "languages", "encoder")
OF_A_ROW += ("weights", "layers", "trainable_parameters")
_BLOCK = re.compile(
    r"(<!-- table: (\S+)((?: \| [^|\n]+)*) -->\n).*?(<!-- end of table -->)", re.DOTALL
)


def collect(folder: str | Path, target: str | Path) -> list[dict]:
    """Gather the ``results.json`` of all runs below a folder into one file.

    Arguments
    ---------
    folder : str | Path
        Searched to any depth.
    target : str | Path
        JSON file to write: a list of results.

    Returns
    -------
    list[dict]
        Runs that were not tested, such as trials of a grid, are left out.

    Raises
    ------
    FileNotFoundError
        There is none.
    ValueError
        Two runs that no row could tell apart: same task, data, method, sizes, seed and fold. Or a
        row of runs with different settings.
    """
    found = {}
    for path in sorted(Path(folder).rglob("results.json")):
        run = read_json(path)
        if path.parent.name.endswith(DEBUG):
            continue
        same = json.dumps([_identity(run), run["seed"], run.get("fold")])
        if not run.get("test"):
            continue
        if same in found:
            raise ValueError(
                f"{path} and {found[same][0]} are runs of one method with the same seed, data and "
                "sizes: a row is a mean over seeds; collect a folder that holds only one of them"
            )
        found[same] = path, run
    if not found:
        raise FileNotFoundError(f"there is no results.json of a tested run below {folder}")
    runs = [run for _, run in found.values()]
    check_rows(runs)
    runs.sort(key=lambda run: (run["method"], run["encoder"], run["layers"], run["seed"]))
    write_atomically(target, json.dumps(runs, indent=1, ensure_ascii=False) + "\n")
    return runs


def add(source: str | Path, target: str | Path) -> list[dict]:
    """Add the runs of a file to those of another, in which they are not yet.

    Arguments
    ---------
    source : str | Path
        JSON file: a list of results.
    target : str | Path
        JSON file, made if it is not there.

    Returns
    -------
    list[dict]
        All of them; a run that failed gives way to the same one that did not.

    Raises
    ------
    ValueError
        A run is in both with other results, or a row would have runs with different settings.
    """
    source, target = Path(source), Path(target)
    files = [target, source] if target.is_file() else [source]
    found: dict[str, dict] = {}
    for path in files:
        for run in read_json(path):
            same = json.dumps([_identity(run), run["seed"], run.get("fold")])
            before = found.get(same, run)
            if "failed" in run:
                found[same] = before
            elif "failed" in before or _measured(before) == _measured(run):
                found[same] = run
            else:
                name = run.get("label") or run["method"]
                raise ValueError(
                    f"{source} and {target} both have {name}, {_which(run)}, with other results; "
                    "delete one of them"
                )
    runs = list(found.values())
    check_rows(runs)
    _reach_together(runs)
    write_atomically(target, json.dumps(runs, indent=1, ensure_ascii=False) + "\n")
    return runs


def _measured(run: dict) -> dict:
    """A run without what a comparison adds to it, and changes when more runs join."""
    return {key: value for key, value in run.items() if key not in ("reach", "checkpoint_mb")}


def check_rows(runs: Sequence[dict]) -> None:
    """Refuse a mean over seeds or folds of runs that differ in more.

    Raises
    ------
    ValueError
        Names the row, what differs and the runs.
    """
    first: dict[str, dict] = {}
    for run in runs:
        if "failed" in run:
            continue
        before = first.setdefault(_identity(run), run)
        fold = first.setdefault(f"{_identity(run)} {run.get('fold')}", run)
        if run.get("data", fold.get("data")) != fold.get("data", run.get("data")):
            name = run.get("label") or run["method"]
            raise ValueError(
                f"{name}: {_which(run)} was trained, chosen or tested on other data than "
                f"{_which(fold)}; a row is a mean over seeds or folds, of nothing else"
            )
        chosen = ("weights", "layers", "trainable_parameters") if "auto_layers" in run else ()
        for key in [key for key in OF_A_ROW if key not in chosen]:
            if key in run and key in before and run[key] != before[key]:
                name = run.get("label") or run["method"]
                raise ValueError(
                    f"{name}: {_which(run)} has other {key} than {_which(before)} ({run[key]}, "
                    f"{before[key]}); a row is a mean over seeds or folds, of nothing else"
                )


def _reach_together(runs: Sequence[dict]) -> None:
    """Let all runs have the time to one score: the worst of those that comparisons chose."""
    timed = [run for run in runs if run.get("reach", {}).get("value") is not None]
    if len({run["reach"]["value"] for run in timed}) < 2:
        return
    score = timed[0]["reach"]["score"]
    worst = min if is_better_when_larger(score) else max
    value = worst(run["reach"]["value"] for run in timed)
    for run in timed:
        run["reach"] |= {"value": value, "seconds": seconds_to(run, score, value)}


def seconds_to(run: dict, score: str, value: float) -> float | None:
    """Seconds of training after which a run's score on dev was as good; None if it never was.

    Epochs in which the head waited on the plain encoder do not count: that is not the method yet.
    """
    sign = -1 if is_better_when_larger(score) else 1
    for past in run.get("history", []):
        if past["epoch"] <= run.get("frozen_epochs", 0):
            continue
        if sign * past[score] <= sign * value + 1e-9:
            return past["train_seconds"]
    return None


def summaries(runs: Sequence[dict]) -> list[dict]:
    """Sum up runs that differ in seed or fold only, or that bear the same label, the best first.

    Arguments
    ---------
    runs : Sequence[dict]
        As ``results.json`` has them. :mod:`hff_modules.compare` adds a ``label``, the ``score`` it
        chose by, ``chosen`` settings, ``checkpoint_mb``, what it took to ``reach`` a score, or
        nothing but the reason why a run ``failed``.

    Returns
    -------
    list[dict]
        ``method`` (label or method), ``scores`` {"test-mini cer": (mean, spread)} and the like;
        spread is the standard deviation, None with one seed. Failed ones come last.
    """
    groups: dict[str, list[dict]] = {}
    for run in runs:
        groups.setdefault(_identity(run), []).append(run)
    names = score_names(runs)
    rows = [_summary(group, names) for group in groups.values()]

    def order(row: dict) -> tuple:
        values = [row["scores"][name][0] for name in names[:1] if name in row["scores"]]
        if not values:
            return (0, math.inf, row["method"])
        value = -values[0] if is_better_when_larger(names[0]) else values[0]
        return (-len(row["folds"]), value, row["method"])  # means of other folds are none of these

    return sorted(rows, key=order)


def score_names(runs: Sequence[dict]) -> list[str]:
    """Scores on test sets that are in some run, such as "test-mini cer"; the first one orders."""
    chosen = [run["score"] for run in runs if run.get("score") in SCORES]
    kinds = sorted(SCORES, key=lambda score: score not in chosen)
    sets = dict.fromkeys(name for run in runs for name in run.get("test", {}))
    return [
        f"{name} {score}"
        for name in sets
        for score in kinds
        if any(score in run.get("test", {}).get(name, {}) for run in runs)
    ]


def score_title(score: str) -> str:
    """A score's name as people write it.

    Example
    -------
    >>> score_title("cer_lm"), score_title("unweighted_accuracy")
    ('CER LM', 'unweighted accuracy')
    """
    short = ("cer", "wer", "eer", "lm")
    words = score.replace("min_dcf", "minDCF").split("_")
    return " ".join(word.upper() if word in short else word for word in words)


def score_text(score: str, value: float, spread: float | None = None) -> str:
    """A score as it stands in a table, without its unit.

    Example
    -------
    >>> score_text("cer", 12.34), score_text("min_dcf", 0.5678, 0.01)
    ('12.3', '0.568 ± 0.010')
    """
    digits = 3 if score in NO_PERCENT else 1
    return f"{value:.{digits}f}" + ("" if spread is None else f" ± {spread:.{digits}f}")


def unit(score: str) -> str:
    """`` %`` behind a score that is in percent."""
    return "" if score in NO_PERCENT else " %"


def is_better_when_larger(name: str) -> bool:
    """Whether a score, "test-mini accuracy" or "accuracy action" say, is no error rate."""
    return any(word in LARGER_IS_BETTER for word in (name.split()[0], name.split()[-1]))


def _identity(run: dict) -> str:
    if run.get("label") is not None:
        return json.dumps(run["label"])
    return json.dumps({key: run.get(key) for key in ALIKE})


def _summary(group: Sequence[dict], names: Sequence[str]) -> dict:
    done = [run for run in group if "failed" not in run]
    first = done[0] if done else group[0]
    row = {"method": first.get("label") or first["method"], "scores": {}, "file": first["method"]}
    row["seeds"] = list(dict.fromkeys(run["seed"] for run in done))
    row["folds"] = sorted({run["fold"] for run in done if "fold" in run})
    row["failed"] = [f"{_which(run)}: {run['failed']}" for run in group if "failed" in run]
    if not done:
        return row
    of_first = [run for run in done if run.get("fold") == 1]
    row["first"] = _score_of(of_first, names[0]) if names else None
    for name in names:
        score = _score_of(done, name)
        if score is not None:
            row["scores"][name] = score
    if "score" in first:
        row["dev"] = mean_and_spread([run["dev"][first["score"]] for run in done])
    for key in ("encoder", "layers", "horizon", "trainable_encoder_parameters", "chosen"):
        row[key] = first.get(key)
    row["trainable_parameters"] = first["trainable_parameters"]
    row["train_seconds"] = statistics.mean(run["train_seconds"] for run in done)
    steps = [run["step_seconds"] for run in done if run["step_seconds"] is not None]
    row["step_seconds"] = statistics.median(steps) if steps else None
    row["peak_memory_mb"] = max(run["peak_memory_mb"] for run in done)
    if any("checkpoint_mb" in run for run in done):
        sizes = [run.get("checkpoint_mb") for run in done]  # None where it has been deleted since
        row["checkpoint_mb"] = None if None in sizes else max(sizes)
    if any("reach" in run for run in done):
        times = [run.get("reach", {}).get("seconds") for run in done]
        row["reach_seconds"] = None if None in times else statistics.mean(times)
    return row


def _score_of(runs: Sequence[dict], name: str) -> tuple[float, float | None] | None:
    dataset, _, score = name.rpartition(" ")
    values = [r["test"][dataset][score] for r in runs if score in r["test"].get(dataset, {})]
    return mean_and_spread(values) if values else None


def _which(run: dict) -> str:
    return f"seed {run['seed']}" + (f", fold {run['fold']}" if "fold" in run else "")


def mean_and_spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and standard deviation; None for the latter where there is one value."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def cells(runs: Sequence[dict]) -> list[list[str]]:
    """Head and rows of the table, as text: one row for each of :func:`summaries`."""
    names, rows = score_names(runs), summaries(runs)
    known = [run for run in runs if "failed" not in run]
    columns: list[tuple[str, Callable[[dict], str]]] = [
        ("method", lambda row: row["method"]),
        ("encoder", lambda row: f"`{row['encoder']}`"),
        ("layers", lambda row: _layers(row["layers"])),
        ("horizon", lambda row: str(row["horizon"])),
        ("trained in encoder + fusion", lambda row: f"{row['trainable_encoder_parameters']:,}"),
        ("trained", lambda row: f"{row['trainable_parameters']:,}"),
    ]
    if any("chosen" in run for run in known):
        columns.append(("chosen on dev", lambda row: row["chosen"] or "–"))
    chosen_by = next((run["score"] for run in known if "score" in run), None)
    if chosen_by:
        head = f"dev {score_title(chosen_by)}{unit(chosen_by)}"
        columns.append((head, lambda row: _rounded(chosen_by, row.get("dev"))))
    for name in names:
        dataset, _, score = name.rpartition(" ")
        head = f"{dataset} {score_title(score)}{unit(score)}"
        columns.append((head, lambda row, name=name, s=score: _rounded(s, row["scores"].get(name))))
    if any("fold" in run for run in known):
        columns.append(("folds", lambda row: ", ".join(map(str, row["folds"]))))
    if len({tuple(row["folds"]) for row in rows if row["seeds"]}) > 1:
        columns.append(("that of fold 1", lambda row: _rounded(names[0].split()[-1], row["first"])))
    columns += [
        ("seeds", lambda row: ", ".join(map(str, row["seeds"]))),
        ("training s", lambda row: f"{row['train_seconds']:.0f}"),
    ]
    if any("reach" in run for run in known):
        reach = next(run["reach"] for run in known if "reach" in run)
        head = f"s to dev {score_title(reach['score'])} {reach['value']:.1f} %"
        columns.append((head, lambda row: _or_dash(row.get("reach_seconds"), "{:.0f}")))
    columns += [
        ("step ms", lambda row: _or_dash(row["step_seconds"], "{:.0f}", 1000)),
        ("peak MB", lambda row: f"{row['peak_memory_mb']:.0f}"),
    ]
    if any("checkpoint_mb" in run for run in known):
        columns.append(("checkpoint MB", lambda row: _or_dash(row.get("checkpoint_mb"), "{:.1f}")))
    if any("failed" in run for run in runs):
        columns.append(("failed", lambda row: "; ".join(row["failed"])))
    table = [[head for head, _ in columns]]
    for row in rows:
        always = ("method", "failed")
        table.append(
            [text(row) if row["seeds"] or head in always else "–" for head, text in columns]
        )
    return table


def markdown(runs: Sequence[dict], columns: Sequence[str] = ()) -> str:
    """One row for all runs that differ in their seed only, in the order of their first score.

    Arguments
    ---------
    runs : Sequence[dict]
        As for :func:`summaries`.
    columns : Sequence[str]
        Their heads; all by default.

    Returns
    -------
    str
        A Markdown table.

    Raises
    ------
    ValueError
        There is no such column.
    """
    table = cells(runs)
    unknown = [name for name in columns if name not in table[0]]
    if unknown:
        raise ValueError(f"no column {unknown[0]!r} in the table; expected {', '.join(table[0])}")
    places = [table[0].index(name) for name in columns or table[0]]
    head, *rows = [[row[place] for place in places] for row in table]
    lines = [head, ["---"] * len(head), *([c.replace("|", "\\|") for c in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def filled(text: str, folder: Path) -> str:
    """Give a Markdown text with every table block filled from the file that it names."""

    def table(match: re.Match) -> str:
        runs = read_json(folder / match[2])
        columns = [name.strip() for name in match[3].split("|")[1:]]
        return f"{match[1]}\n{markdown(runs, columns)}\n{match[4]}"

    marks = text.count("<!-- table:")
    text, found = _BLOCK.subn(table, text)
    if found < marks:
        raise ValueError(
            f"{marks - found} of {marks} tables lack their end or are spelt otherwise than "
            "<!-- table: file.json | column | column -->"
        )
    return text


def write(path: str | Path) -> None:
    """Fill the table blocks of a Markdown file."""
    path = Path(path)
    write_atomically(path, filled(read_text(path), path.parent))


def _layers(layers: Sequence[int]) -> str:
    if len(layers) > 4 and layers == list(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]}–{layers[-1]}"
    return ", ".join(map(str, layers))


def _rounded(score: str, found: tuple[float, float | None] | None) -> str:
    return "–" if found is None else score_text(score, *found)


def _or_dash(value: float | None, form: str, factor: float = 1) -> str:
    return "–" if value is None else form.format(factor * value)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m hff_modules.tables", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(dest="command", required=True)
    gather = commands.add_parser("collect", help="gather results.json files into one")
    gather.add_argument("folder")
    gather.add_argument("target")
    join = commands.add_parser("add", help="add the runs of a file to another")
    join.add_argument("source", help="such as runs.json of a comparison")
    join.add_argument("target")
    fill = commands.add_parser("write", help="fill the tables of Markdown files")
    fill.add_argument("files", nargs="+")
    options = parser.parse_args(argv)
    if options.command == "write":
        for file in options.files:
            write(file)
            print(f"{file} is up to date")
        return
    if options.command == "collect":
        runs = collect(options.folder, options.target)
    else:
        runs = add(options.source, options.target)
    print(f"{len(runs)} runs in {options.target}")
    print(markdown(runs))


if __name__ == "__main__":
    run_main(main)

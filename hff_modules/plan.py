"""What a comparison is made of: rows of a table, from one small YAML (or JSON) file.

::

    recipe: ../train.py                  # beside this file; its folder is where the runs start
    output: results/compare/fusions      # in the recipe's folder
    seeds: [1, 2, 3]
    options: {number_of_epochs: 6}       # of every run, as --number_of_epochs 6
    score: cer                           # on dev; chooses among a grid's settings
    reach: 55                            # the time that it takes to get there is a column
    methods:
      - weighted_sum                     # a method file
      - method: tpa
        label: tpa, narrow               # what the row is called
        options: {bottleneck: 64}
        seeds: [1]
        grid: {lr_adapters: [0.0003, 0.001]}     # all combinations; the best one on dev is tested
        vary: {tpa_layers: [all, last:6]}        # all combinations, a row each
      - method: elp
        grid: [{lr_adapters: 0.001, lr_norms: 0.0001}, {lr_adapters: 0.003, lr_norms: 0.0003}]
    grid_options: {number_of_epochs: 2}  # of runs that only serve to choose; a full run otherwise

``seeds``, ``folds`` (of a recipe with ``--fold``; each is run with every seed), ``options`` and
``grid`` may stand at the top, for all rows, and in a row: options are added up, of the others the
row's own count. With ``extends: another_plan.yaml`` a plan says only what differs from that one:
options are added up, other keys replaced. ``rows: {elp: {seeds: [1], options: {lr_norms: 0.1}}}``
does the same within rows of that one, by their labels.
"""

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ruamel.yaml

from hff_modules.config import find_method

KEYS = ("recipe output seeds folds options score reach methods grid grid_options").split()
ROW_KEYS = ("method label options seeds folds grid vary").split()
OF_RUNS = ("seed", "output_folder", "test_only")  # what a comparison says to each run itself


class PlanError(ValueError):
    """A plan that cannot be carried out; the message names file, row, key and value."""


@dataclass(frozen=True)
class Row:
    """A row of the table: one method with its options, and the settings to choose from.

    Arguments
    ---------
    label : str
        What the row is called, and (with other signs replaced) its folder.
    method : str
        Method file, as a recipe's ``train.py`` takes it.
    options : dict
        ``{key: value}`` for the command line.
    seeds : tuple[int, ...]
        The first one is also the grid's.
    settings : tuple[dict, ...]
        Options to choose from on dev; one empty dict where there is nothing to choose.
    folds : tuple[int, ...]
        Each is run with every seed, as ``--fold``; the grid has the first. Empty: no ``--fold``.
    """

    label: str
    method: str
    options: dict[str, Any]
    seeds: tuple[int, ...]
    settings: tuple[dict[str, Any], ...]
    folds: tuple[int, ...] = ()

    @property
    def folder(self) -> str:
        """The label as the name of a folder."""
        return as_folder(self.label)


@dataclass(frozen=True)
class Plan:
    """A whole comparison; see the module's example for what the fields mean.

    Arguments
    ---------
    recipe : Path
        A ``train.py``.
    output : Path
        Folder of runs, tables and pictures.
    rows : tuple[Row, ...]
    grid_options : dict
        Options of runs that only serve to choose.
    extra : tuple[str, ...]
        What follows ``--`` on the command line: handed to every run.
    score : str, optional
        By default the first of :data:`hff_modules.tables.SCORES` that the task has.
    reach : float, optional
        By default the score on dev that every row reached.
    only : tuple[str, ...], optional
        Labels of the rows that are run now; of the others, what was run before is reported.
    """

    recipe: Path
    output: Path
    rows: tuple[Row, ...]
    grid_options: dict[str, Any]
    extra: tuple[str, ...] = ()
    score: str | None = None
    reach: float | None = None
    only: tuple[str, ...] | None = None

    @property
    def wanted(self) -> tuple[Row, ...]:
        """The rows that are run now."""
        return tuple(row for row in self.rows if self.only is None or row.label in self.only)


def read_plan(path: str | Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read a plan file; gives its keys.

    Arguments
    ---------
    path : str | Path
    above : tuple[Path, ...]
        Plans that extend this one.

    Raises
    ------
    PlanError
        No such file, not YAML, not ``key: value`` lines, or plans that extend each other.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"plan {path}: cannot be read ({_one_line(error)})") from None
    try:
        plan = ruamel.yaml.YAML(typ="safe", pure=True).load(text)
    except ruamel.yaml.YAMLError as error:
        raise PlanError(f"plan {path} is no YAML: {_one_line(error)}") from None
    if not isinstance(plan, dict):
        raise PlanError(f"plan {path}: expected `key: value` lines, found {type(plan).__name__}")
    if "extends" not in plan:
        return plan
    if path.resolve() in above:
        raise PlanError(f"plan {path}: extends itself")
    base = read_plan(path.parent / str(plan.pop("extends")), (*above, path.resolve()))
    rows = _mapping(plan, "rows", f"plan {path}")
    plan = {key: value for key, value in plan.items() if key != "rows"}
    merged = _with(base, plan, f"plan {path}")
    if rows:
        merged["methods"] = _changed(merged.get("methods"), rows, f"plan {path}, rows")
    return merged


def _with(keys: Mapping[str, Any], more: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Keys of a plan or a row, replaced by those of another one; options are added up."""
    options = {**_mapping(keys, "options", where), **_mapping(more, "options", where)}
    return {**keys, **more, "options": options}


def _changed(methods: Any, changes: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """The rows of a plan, some of them changed."""
    entries = [_as_entry(entry, where) for entry in methods or []]
    changed = {_label(entry): entry for entry in entries}
    for label in changes:
        if label not in changed:
            raise PlanError(f"{where}: there is no row {label!r}, but {', '.join(changed)}")
        changed[label] = _with(changed[label], _mapping(changes, label, where), where)
    return [changed[_label(entry)] for entry in entries]


def make_plan(
    keys: Mapping[str, Any], source: str | Path, extra: Sequence[str] = (), output: str = ""
) -> Plan:
    """Check the keys of a plan and spell out its rows.

    Arguments
    ---------
    keys : Mapping[str, Any]
        As :func:`read_plan` gives them.
    source : str | Path
        The file they are from; relative paths start in its folder.
    extra : Sequence[str]
        More options for every run, as on a command line.
    output : str
        Folder of the results, instead of the plan's.

    Returns
    -------
    Plan

    Raises
    ------
    PlanError
        An unknown or absent key, a value of the wrong kind, two rows of the same name, a method
        file or a recipe that is not there, or ``--debug``.
    """
    source = Path(source)
    _check_keys(keys, KEYS, f"plan {source}")
    for needed in ("recipe", "methods"):
        if not keys.get(needed):
            raise PlanError(f"plan {source}: `{needed}` is missing or empty")
    recipe = Path(source.parent, str(keys["recipe"])).resolve()
    if not recipe.is_file():
        raise PlanError(f"plan {source}: recipe {recipe} is not there; expected a train.py")
    shared = {
        "seeds": keys.get("seeds", [1]),
        "folds": keys.get("folds", []),
        "options": _mapping(keys, "options", f"plan {source}"),
        "grid": keys.get("grid"),
    }
    if not isinstance(keys["methods"], list):
        raise PlanError(f"plan {source}: methods: expected a list, got {keys['methods']!r}")
    rows = [row for entry in keys["methods"] for row in _rows(entry, shared, source, recipe)]
    folders = [row.folder for row in rows]
    twice = [row.label for row in rows if folders.count(row.folder) > 1]
    if twice:
        raise PlanError(f"plan {source}: two rows are called {twice[0]!r}; give one a `label`")
    reach = keys.get("reach")
    if reach is not None and (isinstance(reach, bool) or not isinstance(reach, int | float)):
        raise PlanError(f"plan {source}: reach: expected a score in percent, got {reach!r}")
    if any(word.split("=")[0] == "--debug" for word in extra):
        raise PlanError("--debug leaves nothing to compare; try it with a recipe's train.py")
    grid_options = _mapping(keys, "grid_options", f"plan {source}")
    _check_options(rows, grid_options, extra, f"plan {source}")
    folder = Path(output).resolve() if output else _output(keys, source, recipe)
    if "=" in str(folder):
        raise PlanError(f"output {folder}: SpeechBrain cannot handle paths with a '='")
    return Plan(
        recipe=recipe,
        output=folder,
        rows=tuple(rows),
        grid_options=grid_options,
        extra=tuple(extra),
        score=keys.get("score"),
        reach=reach,
    )


def _check_options(
    rows: Sequence[Row], grid_options: Mapping[str, Any], extra: Sequence[str], where: str
) -> None:
    said = {word.partition("=")[0].removeprefix("--") for word in extra if word.startswith("--")}
    for row in rows:
        tried = {key for settings in row.settings for key in settings}
        for key in OF_RUNS:
            if key in {*row.options, *grid_options, *tried, *said}:
                hint = "; take --seeds" if key == "seed" else ""
                raise PlanError(f"{where}: {key} is the comparison's own to say{hint}")
        if tried & said:
            raise PlanError(f"{where}, {row.label}: --{min(tried & said)} would undo the grid's")


def _settings(grid: Any, where: str) -> list[dict[str, Any]]:
    """What a grid stands for: all combinations of its values, or the settings that it lists."""
    if not isinstance(grid, list):
        return combinations(_mapping({"grid": grid}, "grid", where), where)
    if not grid or not all(isinstance(settings, dict) for settings in grid):
        raise PlanError(
            f"{where}: expected {{key: values}} or a list of {{key: value}}, got {grid}"
        )
    return grid


def combinations(choices: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """All combinations of a few values for each key.

    Example
    -------
    >>> combinations({"lr_head": [1, 2], "layers": ["all"]}, "a plan")
    [{'lr_head': 1, 'layers': 'all'}, {'lr_head': 2, 'layers': 'all'}]
    """
    for key, values in choices.items():
        if not isinstance(values, list) or not values:
            raise PlanError(f"{where}: {key}: expected a list of values, got {values!r}")
    return [
        dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())
    ]


def as_text(options: Mapping[str, Any]) -> str:
    """Options in a few words, for labels, folders and tables.

    Example
    -------
    >>> as_text({"lr_head": 0.001, "layers": [3, 6]})
    'lr_head=0.001, layers=[3, 6]'
    """
    return ", ".join(f"{key}={as_argument(value)}" for key, value in options.items())


def as_folder(text: str) -> str:
    """A text as the name of a folder; SpeechBrain's command line would split it at a "=".

    Example
    -------
    >>> as_folder("tpa, tpa_layers=last:3")
    'tpa-tpa_layers-last-3'
    """
    return re.sub(r"[^\w.+-]+", "-", text).strip("-.") or "-"


def as_argument(value: Any) -> str:
    """A value as the command line of a run takes it, in YAML."""
    if isinstance(value, str):
        number = re.fullmatch(r"[-+]?[\d_]*\.?\d+([eE][-+]?\d+)?|0[xo][\da-fA-F]+", value)
        return json.dumps(value) if number else value
    if isinstance(value, float) and "e" in repr(value) and "." not in repr(value):
        return repr(value).replace("e", ".0e")  # 1e-05 is a text to some readers of YAML
    return json.dumps(value, ensure_ascii=False)


def _rows(entry: Any, shared: Mapping[str, Any], source: Path, recipe: Path) -> list[Row]:
    entry = _as_entry(entry, f"plan {source}")
    where = f"plan {source}, {entry['method']}"
    _check_keys(entry, ROW_KEYS, where)
    method = entry["method"]
    if (source.parent / method).is_file():
        method = str((source.parent / method).resolve())
    try:
        find_method(method, beside=recipe.parent / "hparams")
    except FileNotFoundError as error:
        raise PlanError(f"plan {source}: {error}") from None
    repeats = {}
    for key in ("seeds", "folds"):
        numbers = repeats[key] = entry.get(key, shared[key])
        fitting = isinstance(numbers, list) and all(type(n) is int for n in numbers)
        if not fitting or (key == "seeds" and not numbers):
            raise PlanError(f"{where}: {key}: expected a list of whole numbers, got {numbers!r}")
        if len(set(numbers)) < len(numbers):
            raise PlanError(f"{where}: {key}: one is there twice in {numbers}")
    settings = _settings(entry.get("grid", shared["grid"]), f"{where}: grid")
    folders = [as_folder(as_text(one)) for one in settings]
    twice = [as_text(one) for one in settings if folders.count(as_folder(as_text(one))) > 1]
    if twice:
        raise PlanError(f"{where}: grid: {' and '.join(twice)} would have the same folder")
    options = {**shared["options"], **_mapping(entry, "options", where)}
    label = _label(entry)
    rows = []
    for varied in combinations(_mapping(entry, "vary", where), f"{where}: vary"):
        rows.append(
            Row(
                label=f"{label}, {as_text(varied)}" if varied else label,
                method=method,
                options={**options, **varied},
                seeds=tuple(repeats["seeds"]),
                settings=tuple(settings),
                folds=tuple(repeats["folds"]),
            )
        )
    return rows


def _as_entry(entry: Any, where: str) -> dict[str, Any]:
    entry = {"method": entry} if isinstance(entry, str) else entry
    if not isinstance(entry, dict) or not isinstance(entry.get("method"), str):
        raise PlanError(f"{where}: methods: expected a method file, got {entry!r}")
    return entry


def _label(entry: Mapping[str, Any]) -> str:
    return str(entry.get("label") or Path(entry["method"]).stem)


def _output(keys: Mapping[str, Any], source: Path, recipe: Path) -> Path:
    folder = keys.get("output") or f"results/compare/{source.stem}"
    return (recipe.parent / str(folder)).resolve()


def _mapping(keys: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    value = keys.get(key) or {}
    if not isinstance(value, dict):
        raise PlanError(f"{where}: {key}: expected {{key: value}}, got {value!r}")
    return value


def _check_keys(keys: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in keys:
        if key not in known:
            raise PlanError(f"{where}: unknown key {key!r}; there are {', '.join(known)}")


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())

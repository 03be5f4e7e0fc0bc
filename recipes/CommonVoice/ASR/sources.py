"""The first of two stages: adapters, fusion and head learn from other languages (arXiv 2411.18217).

A folder of its own for each set of languages and options, so that many targets, seeds and methods
of decoding start from the same one, also at the same time.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

from hff_modules.cli import given, on_command_line
from hff_modules.files import locked
from hff_modules.plan import as_argument, as_folder

# What is said of the new language, and of how it is learned; the rest holds for both stages.
OF_TARGET = (
    "language letters dataset source_languages source_options sources_folder start_from few_shot "
    "seed output_folder max_minutes max_dev_minutes number_of_epochs frozen_epochs patience "
    "batch_seconds max_batch_size testing decoding test_only fill_only analysis"
).split()
# What the first stage gives does not hang on: it is no part of its folder's name.
FREE = (
    "num_workers cache cache_gigabytes speed_cache noprogressbar device debug_persistently"
).split()
OF_TARGET_BEGIN = ("lr_", "lm")


def train_sources(argv: Sequence[str], train: Callable[[list[str]], object]) -> Path:
    """Train on the source languages together; what was done before is only looked through again.

    Arguments
    ---------
    argv : sequence of str
        The command line of the whole run, with ``--source_languages``.
    train : callable
        Takes a command line.

    Returns
    -------
    Path
        The output folder of that run.

    Raises
    ------
    ValueError
        The new language is one of its sources, options that are none, or ``--debug``.
    """
    languages = given(argv, "source_languages")
    options = given(argv, "source_options") or {}
    if not isinstance(languages, list) or not languages or not isinstance(options, dict):
        raise ValueError(
            "source_languages: expected a list such as [ca, it], and source_options a mapping; "
            f"got {languages!r}, {options!r}"
        )
    target = given(argv, "language")
    if "--debug" in argv and "--debug_persistently" not in argv:
        raise ValueError(
            "source_languages: --debug keeps no checkpoint that the second stage could start from; "
            "add --debug_persistently, or try the stages one by one"
        )
    shared = {target} & set(languages) if isinstance(target, str) else set()
    if shared:
        raise ValueError(f"source_languages: {min(shared)} is the language to be learned")
    line = list(_without_target(argv))
    for key, value in {"testing": False, **options, "language": languages}.items():
        line += [f"--{key}", as_argument(value)]
    said = {key: words for key, words in on_command_line(line).items() if key not in FREE}
    name = hashlib.sha256(json.dumps([said], sort_keys=True).encode()).hexdigest()[:8]
    root = Path(str(given(argv, "sources_folder") or "results/sources"))
    folder = root / as_folder("-".join(languages)) / f"{Path(line[0]).stem}-{name}"
    lock = locked(folder.parent / f".{folder.name}.lock")
    first = os.environ.get("RANK", "0") == "0"  # a distributed run's processes are one
    with lock if first else nullcontext():
        train([*line, "--output_folder", str(folder)])  # refused if settings or data have changed
    return folder


def _without_target(argv: Sequence[str]) -> Iterator[str]:
    values = False  # of a key that is left out
    for word in argv:
        if word.startswith("--"):
            key = word.removeprefix("--")
            values = key in OF_TARGET or key.startswith(OF_TARGET_BEGIN)
        if not values:
            yield word

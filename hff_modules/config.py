"""One run from three sources: base file(s) <- method file <- command line.

HyperPyYAML's ``!include`` nests and cannot merge, so a file may name another one that it refines::

    extends: base/ctc.yaml       # a file beside this one, or else in the project's hparams

Top-level keys of the refining file replace those of the file that it extends; of several files,
``extends: [tpa.yaml, fusion.yaml]``, a later one's replace an earlier one's. The merge happens
before HyperPyYAML resolves ``!ref``, ``!new`` and the like, so all of them see the final values.
"""

import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ruamel.yaml
import speechbrain as sb
from hyperpyyaml import load_hyperpyyaml

from hff_modules.cli import (
    OF_SPEECHBRAIN,
    check_run_options,
    on_command_line,
    override,
    separated,
    tag_of,
    usable_device,
)
from hff_modules.files import parse_yaml, read_text

METHODS = Path(__file__).resolve().parent.parent / "hparams"  # one file per method, for all recipes

# SpeechBrain's run options that decide about results: keys of ours, too, so that they are compared
DECISIVE = ("precision", "eval_precision", "max_grad_norm", "grad_accumulation_factor")
DEBUG = "-debug"  # behind the name of the folder of a run that only tries a few batches
# What may change between two commands that work on one run: where things lie (the encoder's content
# is compared, not its name), what is stored and logged, and what follows training.
MAY_CHANGE = (
    "output_folder data_folder csv encoder ssl_encoder sources_folder cache cache_gigabytes "
    "speed_cache fill_only analysis probes num_workers ckpt_interval_minutes checkpointer "
    "train_logger tensorboard check_only max_missing max_bad_share testing test_splits "
    "cohort_speakers cohort_utterances cohort_nearest decoding beam_searcher "
    "lm lm_text lm_order lm_alpha lm_beta lm_beam lm_minutes start_from"
).split()


def load_config(
    argv: list[str], base: str | Path | Sequence[str | Path]
) -> tuple[dict[str, Any], Any]:
    """Read the method file that the command line names on top of a base file, and build all of it.

    Arguments
    ---------
    argv : list[str]
        What follows the script's name: a method file, SpeechBrain's run options, ``--key value``.
        The method file is looked for as given, then beside the recipe, then in the project's
        ``hparams``.
    base : str | Path | Sequence[str | Path]
        The recipe's own file: dataset, and by ``extends:`` the task. Of several, each refines those
        before it.

    Returns
    -------
    hparams : dict[str, Any]
        What :func:`hyperpyyaml.load_hyperpyyaml` builds; ``hparams["config"]`` is the merged text.
        With ``layers: auto`` the encoder has all layers and ``hparams["auto_layers"]`` says what
        was asked for, see :mod:`hff_modules.auto_layers`.
    run_opts : speechbrain.utils.run_opts.RunOptions

    Raises
    ------
    FileNotFoundError
        No such method file, or nothing where ``extends:`` points to; names what there is.
    ValueError
        Files that extend each other in a circle.
    KeyError
        A key on the command line that no file has.
    """
    argv = separated(argv)
    method, run_opts, _ = sb.parse_arguments(argv)
    # Of more processes than GPUs, some have none.
    usable_device(run_opts.device or sb.utils.distributed.infer_device())
    # Before anything is built: loggers and the like ask at once which process they are in.
    if not sb.utils.distributed.is_distributed_initialized():  # else by a run before this one
        sb.utils.distributed.ddp_init_group(run_opts)
    bases = [Path(base)] if isinstance(base, str | Path) else [Path(path) for path in base]
    merged = merge_files(bases[0])
    for path in bases[1:]:
        merged.update(merge_files(path))
    merged.update(merge_files(find_method(method, beside=bases[0].resolve().parent)))
    words = on_command_line(argv)
    check_run_options({key: said for key, said in words.items() if key in OF_SPEECHBRAIN})
    override(merged, {key: said for key, said in words.items() if key not in OF_SPEECHBRAIN})
    missing = [key for key, value in merged.items() if tag_of(value) == "!PLACEHOLDER"]
    if missing:
        raise ValueError(f"{' and '.join(f'--{key}' for key in missing)} must be given")
    for key in DECISIVE:
        if key in merged and key in run_opts.overridden_args:
            merged[key] = getattr(run_opts, key)
    if run_opts.debug and not run_opts.debug_persistently and "output_folder" in merged:
        # As SpeechBrain does with its checkpoints: a few batches are no results of a run.
        folder = merged["output_folder"]
        if tag_of(folder):
            folder.value += DEBUG
        else:
            merged["output_folder"] = f"{folder}{DEBUG}"
        if "cache" in merged and "cache" not in words:
            merged["cache"] = None  # nor are all of its states wanted
    asked = merged.get("layers")
    if not is_auto(asked):
        return _build(merged), run_opts
    merged["layers"] = "all"
    return {**_build(merged), "auto_layers": str(asked)}, run_opts


def is_auto(layers: Any) -> bool:
    """Whether layers are to be chosen by :mod:`hff_modules.auto_layers`."""
    return isinstance(layers, str) and (layers == "auto" or layers.startswith("auto:"))


def rebuilt(hparams: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Build everything anew with other values of some keys.

    Arguments
    ---------
    hparams : dict[str, Any]
        From :func:`load_config`.
    **changes
        Values of top-level keys.

    Returns
    -------
    dict[str, Any]
    """
    merged = ruamel.yaml.YAML().load(hparams["config"])
    merged.update(changes)
    return _build(merged)


def changed_settings(old: str, new: str) -> dict[str, tuple[Any, Any]]:
    """The keys that two merged texts both have, with other values; what each of them says.

    Example
    -------
    >>> changed_settings("{seed: 1, lr: 0.1}", "{seed: 1, lr: 0.2, more: 3}")
    {'lr': (0.1, 0.2)}
    """
    then, now = (_plain(ruamel.yaml.YAML().load(text)) for text in (old, new))
    return {k: (then[k], now[k]) for k in now if k in then and then[k] != now[k]}


def digest_of_settings(text: str, *without: str) -> str:
    """What tells the settings of a merged text from others, whatever may change in a run left out.

    Arguments
    ---------
    text : str
    *without : str
        More keys to leave out.
    """
    settings = _plain(ruamel.yaml.YAML().load(text))
    decisive = {k: v for k, v in settings.items() if k not in (*MAY_CHANGE, *without)}
    described = json.dumps(decisive, sort_keys=True, default=str)
    return hashlib.sha256(described.encode()).hexdigest()[:16]


def _plain(node: Any) -> Any:
    """A node without comments and anchors; a tag stands in front of what it is on."""
    if isinstance(node, dict):
        plain = {str(key): _plain(value) for key, value in node.items()}
    elif isinstance(node, list):
        plain = [_plain(value) for value in node]
    else:
        plain = getattr(node, "value", node)  # of a scalar with a tag
    return f"{tag_of(node)} {plain}" if tag_of(node) else plain


def _build(merged: ruamel.yaml.CommentedMap) -> dict[str, Any]:
    text = _dump(merged)
    try:
        return {**load_hyperpyyaml(text), "config": text}
    except TypeError as error:  # names the class, and what it does not know
        raise ValueError(f"a setting does not fit: {error}") from error


def merge_files(path: Path, seen: tuple[Path, ...] = ()) -> ruamel.yaml.CommentedMap:
    """Read a YAML file and everything that it extends; its own keys win.

    Arguments
    ---------
    path : Path
        File in HyperPyYAML syntax.
    seen : tuple[Path, ...]
        Files that led here, to notice circles.

    Returns
    -------
    ruamel.yaml.CommentedMap
        Top-level keys with their nodes; tags such as ``!new:`` and ``!ref`` are kept as they are.
    """
    path = path.resolve()
    if path in seen:
        chain = " -> ".join(str(p) for p in (*seen, path))
        raise ValueError(f"`extends:` goes in a circle: {chain}")
    if not path.is_file():
        raise FileNotFoundError(f"no configuration file {path}{_available(path.parent)}")
    own = parse_yaml(read_text(path), path)
    parents = own.pop("extends", [])
    merged = ruamel.yaml.CommentedMap()
    for parent in parents if isinstance(parents, list) else [parents]:
        merged.update(merge_files(_parent(path, str(parent)), (*seen, path)))
    merged.update(own)
    return merged


def _parent(path: Path, name: str) -> Path:
    if not name.endswith((".yaml", ".yml")):
        name += ".yaml"
    beside = (path.parent / name).resolve()
    shared = METHODS / name
    # A recipe's fusion.yaml that `extends: fusion` means the project's method, not itself.
    if beside != path and beside.is_file():
        return beside
    if shared.is_file() and shared != path:
        return shared
    if beside == path:
        raise ValueError(f"{path} extends itself, and {METHODS} has no {shared.name}")
    raise FileNotFoundError(f"{path} extends {name}: no file {beside}{_available(METHODS)}")


def find_method(method: str, beside: Path) -> Path:
    """Find a method file: as given, else ``beside`` the recipe, else in the project's folder."""
    name = method if method.endswith((".yaml", ".yml")) else method + ".yaml"
    for path in (Path(name), beside / Path(name).name, METHODS / Path(name).name):
        if path.is_file():
            return path
    raise FileNotFoundError(f"no method file {method}{_available(METHODS)}")


def _available(folder: Path) -> str:
    files = sorted(p.name for p in folder.glob("*.y*ml")) if folder.is_dir() else []
    return f"; in {folder} there are: {', '.join(files)}" if files else ""


def _dump(merged: ruamel.yaml.CommentedMap) -> str:
    stream = io.StringIO()
    ruamel.yaml.YAML().dump(merged, stream)
    return stream.getvalue()

"""A job's command line, keys and values, and how it ends: in good order, or with one message."""

import difflib
import gc
import itertools
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ruamel.yaml
import torch
from hyperpyyaml.core import recursive_update
from speechbrain.utils.distributed import is_distributed_initialized
from speechbrain.utils.run_opts import HELP_TEXTS, RunOptions

# SpeechBrain's run options, and those that do nothing, or harm, in these recipes
OF_SPEECHBRAIN = {*HELP_TEXTS, "jit_module_keys", "compile_module_keys"}
NOT_TAKEN = {
    "data_parallel_backend": "start with torchrun",
    "auto_mix_prec": "take --precision fp16",
    "bfloat16_mix_prec": "take --precision bf16",
    "remove_vector_weight_decay": "optimizers are made otherwise here; see the key `optimizer`",
    "optimizer_step_limit": "take --number_of_epochs",
}
LESS_MEMORY = (
    "It takes less with a lower --batch_seconds; in training also with --encoder_precision bf16 "
    "and --precision bf16, and --grad_accumulation_factor keeps steps as large as they were."
)
MAY_BE_NULL = ("tensorboard", "masking", "checkpointer")  # of the objects
STRUCTURED = tuple("[{!&*'\"|>")  # how YAML begins that is more than a word


def run(main: Callable[[Sequence[str]], object]) -> None:
    """Call ``main`` with the command line; say what is wrong in a message and exit with 1.

    Arguments
    ---------
    main : Callable
        Takes what follows the script's name. Wrong input raises OSError, ValueError or KeyError
        with a message for the user; anything else is a bug of ours and keeps its traceback. So do
        these with ``HFF_TRACEBACK=1`` in the environment.
    """
    try:
        main(sys.argv[1:])
    except SystemExit as done:  # --fill_only, say
        if done.code:
            raise
    except torch.OutOfMemoryError as error:
        print(f"\nerror: {str(error).splitlines()[0]}\n{LESS_MEMORY}", file=sys.stderr)
        sys.exit(1)
    except (OSError, ValueError, KeyError) as error:
        if os.environ.get("HFF_TRACEBACK"):
            raise
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        print(f"\nerror: {message}\n(HFF_TRACEBACK=1 shows where)", file=sys.stderr)
        sys.exit(1)
    if is_distributed_initialized():
        # Left to the interpreter's end, gloo's threads abort every other job that is done, see
        # https://github.com/pytorch/pytorch/pull/179291; modules in cycles keep the group alive.
        gc.collect()
        torch.distributed.destroy_process_group()


def usable_device(name: str) -> str:
    """The name of a device, if PyTorch can work on it here.

    Raises
    ------
    ValueError
        It cannot: there is no such GPU, say.
    """
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"--device {name}: PyTorch has no such device here ({reason})") from None
    return name


def default_device() -> str:
    """The GPU of this process if there is one, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def separated(argv: Sequence[str]) -> list[str]:
    """A command line on which each ``--key=value`` is two words, the method file in front.

    Raises
    ------
    ValueError
        Where a key's value cannot be told from the method file.

    Example
    -------
    >>> separated(["fusion", "--language=[fr, ml]", "--seed", "1"])
    ['fusion', '--language', '[fr, ml]', '--seed', '1']
    """
    line = []
    ahead = list(itertools.takewhile(lambda word: word.startswith("--") and "=" in word, argv))
    for word in [*argv[len(ahead) :], *ahead]:
        key, equals, value = word.partition("=")
        line += [key, value] if equals and key.startswith("--") else [word]
    if line and line[0].startswith("--") and line[0] != "--help":
        raise ValueError(
            f"expected the method file first, such as hparams/fusion.yaml {line[0]} ..."
        )
    return line


def given(argv: Sequence[str], key: str) -> Any:
    """The value of a key on the command line, before any file is read; None without.

    Example
    -------
    >>> given(["hparams/fusion.yaml", "--language", "[fr, ml]"], "language")
    ['fr', 'ml']
    """
    words = on_command_line(argv)
    plain = ruamel.yaml.YAML(typ="safe", pure=True)
    return _value(key, words[key], plain) if key in words else None


def without_wait(argv: Sequence[str]) -> list[str]:
    """A command line on which a run that starts from another one does not wait with the encoder.

    Its head knows the adapted encoder; ``frozen_epochs`` would show it the plain one again. What
    is said of them on the command line holds.

    Example
    -------
    >>> without_wait(["fusion_tpa", "--start_from", "results/fr"])
    ['fusion_tpa', '--start_from', 'results/fr', '--frozen_epochs', '0']
    """
    sources = given(argv, "start_from") or given(argv, "source_languages")
    started = sources and given(argv, "frozen_epochs") is None
    return [*argv, "--frozen_epochs", "0"] if started else list(argv)


def check_said(argv: Sequence[str], hparams: Mapping[str, Any], *keys: str) -> None:
    """Refuse keys that are looked for on the command line, and that a file gives instead.

    Raises
    ------
    ValueError
        Such a key would be without effect.
    """
    for key in keys:
        if hparams[key] and not given(argv, key):
            raise ValueError(f"{key}: it has an effect on the command line alone, as --{key}")


def on_command_line(argv: Sequence[str]) -> dict[str, list[str]]:
    """The words behind each key; of a key that is there twice, the last ones."""
    words: dict[str, list[str]] = {}
    key = None
    for place, word in enumerate(separated(argv)):
        if word.startswith("--"):
            key = word.removeprefix("--")
            words[key] = []
        elif key is not None:
            words[key].append(word)
        elif place > 0:
            raise ValueError(f"expected `--key value` after the method file, got {word!r}")
    return words


def _value(key: str, words: Sequence[str], yaml: ruamel.yaml.YAML) -> Any:
    """True without words; numbers, lists and objects are YAML, and what else there is a text.

    Not YAML's idea of it, which knows dates, and ends ``my #1.csv`` before the sign.
    """
    if not words:
        return True
    text = " ".join(words)
    if not text or text in STRUCTURED:  # such as an apostrophe
        return text
    try:
        value = yaml.load(text)
    except ruamel.yaml.YAMLError as error:
        if text.startswith(STRUCTURED):
            reason = str(error).splitlines()[0]
            raise ValueError(f"--{key}: {text} is no YAML ({reason})") from None
        return text
    plain = value is None or isinstance(value, bool | int | float)
    return value if plain or text.startswith(STRUCTURED) else text


def check_run_options(words: dict[str, list[str]]) -> None:
    """Refuse what argparse would take for something else, and what has no effect here."""
    defaults = RunOptions()
    for key, said in words.items():
        if key in NOT_TAKEN:
            raise ValueError(f"--{key} is not taken; {NOT_TAKEN[key]}")
        if getattr(defaults, key) is False and said:
            raise ValueError(f"--{key} is a switch, without a value; got {' '.join(said)!r}")
        if len(said) > 1 and not key.endswith("module_keys"):
            raise ValueError(f"--{key}: expected one value, got {' '.join(said)!r}")


def _check_kind(key: str, old: Any, value: Any, said: str) -> None:
    """Refuse a value of a kind that nobody who reads the key expects."""
    if isinstance(old, bool) != isinstance(value, bool) and not tag_of(old):
        expected = "true or false" if isinstance(old, bool) else "a value, or null"
        raise ValueError(f"--{key}: expected {expected}, got {said}")
    if isinstance(old, int | float) and isinstance(value, str):
        raise ValueError(f"--{key}: expected a number, got {said}")
    plain = isinstance(value, int | float | str) and not tag_of(value)
    if isinstance(old, list) and plain:
        raise ValueError(f"--{key}: expected a list such as [{said}], got {said}")
    if isinstance(old, dict) and not tag_of(old) and plain:
        example = next(iter(old), "name")
        raise ValueError(f"--{key}: expected a mapping such as {{{example}: {said}}}, got {said}")
    if tag_of(old).startswith(("!name:", "!new:")) and (
        plain or (value is None and key not in MAY_BE_NULL)
    ):
        raise ValueError(f"--{key}: expected an object such as '{tag_of(old)}', got {said}")
    if isinstance(old, dict) and isinstance(value, dict) and old and key != "adapters":
        unknown = [name for name in value if name not in old]
        if unknown and not tag_of(old):  # of an object, only its class knows what it takes
            raise KeyError(f"--{key} has no {unknown[0]!r}; it has {', '.join(old)}")


def override(merged: ruamel.yaml.CommentedMap, changes: dict[str, list[str]]) -> None:
    """Change what files say by the words behind each key; of a mapping, the entries that are said.

    Raises
    ------
    KeyError
        A key that no file has; names the nearest one.
    ValueError
        A value that is missing, no YAML, or of a kind that the key never is.
    """
    for key, words in changes.items():
        if key not in merged:
            near = difflib.get_close_matches(str(key), list(merged), n=1)
            hint = f" Did you mean --{near[0]}?" if near else ""
            keys = ", ".join(k for k in merged if not k.startswith("__"))
            raise KeyError(f"--{key}: there is no such key.{hint} There are: {keys}")
        if not words and not isinstance(merged[key], bool):
            raise ValueError(f"--{key}: expected a value")
        value = _value(key, words, ruamel.yaml.YAML())
        if tag_of(merged[key]) == "!PLACEHOLDER" and isinstance(value, int | float):
            value = " ".join(words)  # a place or a name, also if it is 2024
        _check_kind(key, merged[key], value, " ".join(words))
        nested = isinstance(merged[key], dict) and isinstance(value, dict)
        if nested and not tag_of(value):
            recursive_update(merged[key], value)
        else:
            merged[key] = value


def tag_of(node: Any) -> str:
    """The tag that a node of YAML has, such as ``!new:torch.nn.Linear``; "" without."""
    tag = getattr(node, "tag", None)
    return getattr(tag, "value", None) or ""

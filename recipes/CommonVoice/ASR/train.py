"""CTC speech recognition on any language of Common Voice with any method of the project.

python train.py hparams/fusion.yaml --data_folder /data/CommonVoice --language ml [--key value ...]
"""

import itertools
from pathlib import Path
from typing import Any

import ruamel.yaml
import speechbrain as sb
from commonvoice_prepare import prepare_commonvoice
from speechbrain.utils.distributed import run_on_main

from hff_modules.brains import train_ctc
from hff_modules.cli import run
from hff_modules.config import load_config

BASE = Path(__file__).parent / "hparams" / "commonvoice.yaml"


def given(argv: list[str], key: str) -> Any:
    """The value of a key on the command line, None without: before any file is read."""
    values = [value for name, value in itertools.pairwise(argv) if name == f"--{key}"]
    return ruamel.yaml.YAML(typ="safe", pure=True).load(values[-1]) if values else None


def main(argv: list[str]) -> dict:
    """Run one job; gives what ``results.json`` holds."""
    languages = given(argv, "language")
    if isinstance(languages, list) and given(argv, "dataset") is None:
        argv = [*argv, "--dataset", f"commonvoice-{'-'.join(map(str, languages))}"]
    hparams, run_opts = load_config(argv, BASE)
    sb.create_experiment_directory(hparams["output_folder"])
    options = ("data_folder", "language", "max_minutes", "max_missing", "keep_harakat")
    manifests = run_on_main(
        prepare_commonvoice,
        kwargs={key: hparams[key] for key in options}
        | {"save_folder": Path(hparams["output_folder"]) / "manifests"},
    )
    return train_ctc(
        hparams,
        run_opts,
        data_root=hparams["data_folder"],
        train=[parts["train"] for parts in manifests.values()],
        dev=[parts["dev"] for parts in manifests.values()],
        test={language: parts["test"] for language, parts in manifests.items()},
    )


if __name__ == "__main__":
    run(main)

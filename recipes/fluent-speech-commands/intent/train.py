"""Spoken intents of Fluent Speech Commands with any method of the project.

python train.py hparams/fusion.yaml --data_folder /data/fluent_speech_commands_dataset [...]
"""

from pathlib import Path

import speechbrain as sb
from fluent_prepare import prepare_fluent
from speechbrain.utils.distributed import run_on_main

from hff_modules.brains import train_classification
from hff_modules.cli import run
from hff_modules.config import load_config

BASE = Path(__file__).parent / "hparams" / "fluent.yaml"


def main(argv: list[str]) -> dict:
    """Run one job; gives what ``results.json`` holds."""
    hparams, run_opts = load_config(argv, BASE)
    output_folder = Path(hparams["output_folder"])
    sb.create_experiment_directory(output_folder)
    manifests = run_on_main(
        prepare_fluent, args=[hparams["data_folder"], output_folder / "manifests"]
    )
    return train_classification(
        hparams,
        run_opts,
        data_root=hparams["data_folder"],
        train=[manifests["train"]],
        dev=[manifests["dev"]],
        test={"test": manifests["test"]},
    )


if __name__ == "__main__":
    run(main)

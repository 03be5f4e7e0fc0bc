"""Spoken intents of the speech-to-intent benchmark with any method of the project.

python train.py hparams/fusion.yaml --data_folder /data/SpeechToIntent [--key value ...]
"""

from pathlib import Path

from intent_prepare import prepare_intent

from hff_modules.brains import prepared, train_classification
from hff_modules.cli import run
from hff_modules.config import load_config

BASE = Path(__file__).parent / "hparams" / "speechtointent.yaml"


def main(argv: list[str]) -> dict:
    """Run one job; gives what ``results.json`` holds."""
    hparams, run_opts = load_config(argv, BASE)
    manifests = prepared(hparams, prepare_intent)
    return train_classification(hparams, run_opts, hparams["data_folder"], manifests)


if __name__ == "__main__":
    run(main)

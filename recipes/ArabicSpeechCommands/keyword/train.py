"""Keywords of the Arabic Speech Commands with any method of the project.

python train.py hparams/fusion.yaml --data_folder /data/ArabicSpeechCommands [--key value ...]
"""

from pathlib import Path

from arabic_prepare import prepare_arabic

from hff_modules.brains import prepared, train_classification
from hff_modules.cli import run
from hff_modules.config import load_config

BASE = Path(__file__).parent / "hparams" / "arabicspeechcommands.yaml"


def main(argv: list[str]) -> dict:
    """Run one job; gives what ``results.json`` holds."""
    hparams, run_opts = load_config(argv, BASE)
    manifests = prepared(hparams, prepare_arabic)
    return train_classification(hparams, run_opts, hparams["data_folder"], manifests)


if __name__ == "__main__":
    run(main)

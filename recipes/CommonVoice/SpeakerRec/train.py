"""Speaker verification on a language of Common Voice with any method of the project.

python train.py hparams/fusion.yaml --data_folder /data/CommonVoice/fr [--key value ...]
"""

from pathlib import Path

from commonvoice_speakers_prepare import prepare_commonvoice_speakers

from hff_modules.brains import prepared, train_speaker
from hff_modules.cli import run
from hff_modules.config import load_config

BASE = Path(__file__).parent / "hparams" / "commonvoice_speakers.yaml"


def main(argv: list[str]) -> dict:
    """Run one job; gives what ``results.json`` holds."""
    hparams, run_opts = load_config(argv, BASE)
    manifests, trials = prepared(hparams, prepare_commonvoice_speakers, **hparams["drawn"])
    return train_speaker(hparams, run_opts, hparams["data_folder"], manifests, trials)


if __name__ == "__main__":
    run(main)

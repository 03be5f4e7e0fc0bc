"""Emotion recognition on EmoDB with any method of the project, folds by speaker.

python train.py hparams/fusion.yaml --data_folder /data/EmoDB [--fold 1..5|all] [--key value ...]
"""

from pathlib import Path

from emodb_prepare import FOLDS, prepare_emodb

from hff_modules.brains import prepared, train_classification
from hff_modules.cli import run
from hff_modules.config import load_config
from hff_modules.folds import with_folds

BASE = Path(__file__).parent / "hparams" / "emodb.yaml"


def job(argv: list[str]) -> tuple[Path, dict]:
    """Run one fold; gives its folder and what ``results.json`` holds."""
    hparams, run_opts = load_config(argv, BASE)
    manifests = prepared(hparams, prepare_emodb, hparams["fold"])
    results = train_classification(hparams, run_opts, hparams["data_folder"], manifests)
    return Path(hparams["output_folder"]), results


main = with_folds(job, FOLDS)

if __name__ == "__main__":
    run(main)

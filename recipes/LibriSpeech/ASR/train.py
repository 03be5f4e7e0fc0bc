"""CTC speech recognition on LibriSpeech with any method of the project.

python train.py hparams/fusion.yaml --data_folder /data/LibriSpeech [--key value ...]
torchrun --nproc_per_node=4 train.py hparams/fusion.yaml --data_folder /data/LibriSpeech
"""

from pathlib import Path

from librispeech_prepare import check_splits, prepare_librispeech
from speechbrain.utils.distributed import run_on_main

from hff_modules.brains import prepared, train_ctc
from hff_modules.cli import run
from hff_modules.config import load_config

BASE = Path(__file__).parent / "hparams" / "librispeech.yaml"


def main(argv: list[str]) -> dict:
    """Run one job; gives what ``results.json`` holds."""
    hparams, run_opts = load_config(argv, BASE)
    train, dev, test = (hparams[f"{part}_splits"] for part in ("train", "dev", "test"))
    splits = [*train, *dev, *test]
    manifests = prepared(hparams, prepare_librispeech, splits, hparams["max_hours"])
    run_on_main(check_splits, args=[manifests, train, [*dev, *test]])
    return train_ctc(
        hparams,
        run_opts,
        data_root=hparams["data_folder"],
        train=[manifests[split] for split in train],
        dev=[manifests[split] for split in dev],
        test={split: manifests[split] for split in test},
    )


if __name__ == "__main__":
    run(main)

"""The main job: train and test one method on the built-in corpus with the built-in encoder.

python train.py hparams/fusion.yaml [--key value ...] [SpeechBrain's run options]
"""

from pathlib import Path

from speechbrain.utils.distributed import run_on_main

from hff_modules.brains import enter_folder, train_ctc
from hff_modules.cli import run
from hff_modules.config import load_config
from hff_modules.data import prepare_spoken

BASE = Path(__file__).parent / "hparams" / "base" / "spoken.yaml"


def main(argv: list[str]) -> dict:
    """Run one job; gives what ``results.json`` holds."""
    hparams, run_opts = load_config(argv, BASE)
    enter_folder(hparams)
    folder = Path(hparams["data_folder"])
    run_on_main(prepare_spoken, args=[folder], kwargs=hparams["utterances"])
    return train_ctc(
        hparams,
        run_opts,
        data_root=folder,
        train=[folder / "train.csv"],
        dev=[folder / "dev.csv"],
        test={"test": folder / "test.csv"},
    )


if __name__ == "__main__":
    run(main)

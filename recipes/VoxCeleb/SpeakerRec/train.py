"""Speaker verification on VoxCeleb1 with any method of the project.

python train.py hparams/fusion.yaml --data_folder /data/VoxCeleb1 [--key value ...]
"""

from pathlib import Path

import speechbrain as sb
from speechbrain.utils.distributed import run_on_main
from voxceleb_prepare import prepare_voxceleb

from hff_modules.brains import train_speaker
from hff_modules.cli import run
from hff_modules.config import load_config

BASE = Path(__file__).parent / "hparams" / "voxceleb.yaml"


def main(argv: list[str]) -> dict:
    """Run one job; gives what ``results.json`` holds."""
    hparams, run_opts = load_config(argv, BASE)
    output_folder = Path(hparams["output_folder"])
    sb.create_experiment_directory(output_folder)
    manifests, trials = run_on_main(
        prepare_voxceleb,
        args=[hparams["data_folder"], output_folder / "manifests"],
        kwargs=hparams["drawn"],
    )
    return train_speaker(
        hparams,
        run_opts,
        data_root=hparams["data_folder"],
        train=[manifests["train"]],
        dev=manifests["dev"],
        test={"test": manifests["test"]},
        trials=trials,
    )


if __name__ == "__main__":
    run(main)

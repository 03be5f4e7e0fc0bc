"""CTC speech recognition on your own recordings with any method of the project.

python train.py hparams/fusion.yaml --csv my.csv --check_only
python train.py hparams/fusion.yaml --csv my.csv [--key value ...]
"""

from pathlib import Path

import speechbrain as sb
from custom_prepare import prepare_custom
from speechbrain.utils.distributed import run_on_main

from hff_modules.brains import enter_folder, manifests_folder, train_ctc
from hff_modules.cli import check_said, given, run, without_wait
from hff_modules.config import METHODS, load_config
from hff_modules.data.writing import clean_text_file

BASE = Path(__file__).parent / "hparams" / "custom.yaml"
FEW_SHOT = METHODS / "base" / "few_shot.yaml"


def main(argv: list[str]) -> dict | None:
    """Run one job; gives what ``results.json`` holds, None where only the data is checked."""
    argv = without_wait(argv)
    hparams, run_opts = load_config(argv, [BASE, FEW_SHOT] if given(argv, "few_shot") else BASE)
    check_said(argv, hparams, "few_shot")
    output_folder = Path(hparams["output_folder"])
    keys = "csv language max_bad_share keep_harakat drop_shared_texts letters"
    options = {key: hparams[key] for key in keys.split()}
    if hparams["check_only"]:  # what a run has left in the folder stays what it is
        checked = output_folder / "checked"
        sb.create_experiment_directory(checked)
        run_on_main(prepare_custom, kwargs={**options, "save_folder": checked, "whole": True})
        return None
    enter_folder(hparams)
    options["save_folder"] = manifests_folder(hparams)
    manifests, data_root = run_on_main(prepare_custom, kwargs=options)
    train, rules = [manifests["train"]], [hparams["language"], hparams["keep_harakat"]]
    others = [csv for part, csv in manifests.items() if part != "train"]
    hparams["lm_text"] = run_on_main(
        clean_text_file,
        args=[hparams["lm_text"], output_folder / "lm_text.txt", train, *rules],
        kwargs={"others": others, **{k: hparams[k] for k in ("drop_shared_texts", "letters")}},
    )
    return train_ctc(
        hparams,
        run_opts,
        data_root=data_root,
        train=train,
        dev=[manifests["dev"]],
        test={"test": manifests["test"]} if "test" in manifests else {},
    )


if __name__ == "__main__":
    run(main)

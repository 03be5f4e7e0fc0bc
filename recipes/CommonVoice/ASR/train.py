"""CTC speech recognition on any language of Common Voice with any method of the project.

python train.py hparams/fusion.yaml --data_folder /data/CommonVoice --language ml [--key value ...]
python train.py hparams/fusion.yaml --data_folder /data/CommonVoice --language mt --few_shot
"""

from pathlib import Path

from commonvoice_prepare import check_languages, prepare_commonvoice
from sources import train_sources
from speechbrain.utils.distributed import run_on_main

from hff_modules.brains import prepared, train_ctc
from hff_modules.cli import check_said, given, run, separated, without_wait
from hff_modules.config import METHODS, load_config
from hff_modules.data.writing import clean_text_file

BASE = Path(__file__).parent / "hparams" / "commonvoice.yaml"
FEW_SHOT = METHODS / "base" / "few_shot.yaml"


def main(argv: list[str]) -> dict:
    """Run one job; gives what ``results.json`` holds."""
    argv = separated(argv)
    if given(argv, "source_languages") and "--test_only" not in argv:
        _check_names(argv)  # before hours of work on the sources
        argv = [*argv, "--start_from", str(train_sources(argv, main))]
    argv = without_wait(argv)
    languages = given(argv, "language")
    if isinstance(languages, list) and given(argv, "dataset") is None:
        argv = [*argv, "--dataset", f"commonvoice-{'-'.join(map(str, languages))}"]
    hparams, run_opts = load_config(argv, [BASE, FEW_SHOT] if given(argv, "few_shot") else BASE)
    check_said(argv, hparams, "few_shot", "source_languages")
    output_folder = Path(hparams["output_folder"])
    keys = "language max_minutes max_dev_minutes max_missing keep_harakat drop_shared_texts letters"
    options = {key: hparams[key] for key in keys.split()}
    manifests = prepared(hparams, prepare_commonvoice, **options)
    train = [parts["train"] for parts in manifests.values()]
    # The rules of one language hold for its text; several share those of their scripts.
    rules = [next(iter(manifests)) if len(manifests) == 1 else "", hparams["keep_harakat"]]
    others = [csv for parts in manifests.values() for part, csv in parts.items() if part != "train"]
    hparams["lm_text"] = run_on_main(
        clean_text_file,
        args=[hparams["lm_text"], output_folder / "lm_text.txt", train, *rules],
        kwargs={"others": others, **{k: hparams[k] for k in ("drop_shared_texts", "letters")}},
    )
    return train_ctc(
        hparams,
        run_opts,
        data_root=hparams["data_folder"],
        train=train,
        dev=[parts["dev"] for parts in manifests.values()],
        test={language: parts["test"] for language, parts in manifests.items()},
    )


def _check_names(argv: list[str]) -> None:
    folder, language = given(argv, "data_folder"), given(argv, "language")
    if language is None:
        raise ValueError("source_languages: say with --language what is to be learned after them")
    if isinstance(folder, str) and isinstance(language, str):
        check_languages(Path(folder).absolute(), [language])
    if (text := given(argv, "lm_text")) is not None and not Path(str(text)).is_file():
        raise FileNotFoundError(f"lm_text={text}: there is no such file")


if __name__ == "__main__":
    run(main)

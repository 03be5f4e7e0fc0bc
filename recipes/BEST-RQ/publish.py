#!/usr/bin/env python3
"""Puts a pretrained encoder and the record of its rounds into one folder with a model card.

> python publish.py FOLDER --rounds results/cepstra/1986/encoder results/states/1986/encoder \
>     --data_root /data --licences licences.json
"""

import argparse
import json
import shutil
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from hff_modules.cli import run  # noqa: E402

CARD = """---
library_name: transformers
license: {licence}
tags: [speech, self-supervised, wav2vec2-bert]
---
# {name}

A small speech encoder, {parameters:.1f} M parameters: {layers} Conformer blocks of width {width}
(`Wav2Vec2BertModel`, the shape of w2v-BERT 2.0), log-mel input at 16 kHz, {rate:.0f} states a
second. It learned from {hours:.1f} hours of speech without a look at a transcript. `AutoModel`
loads it; `AutoFeatureExtractor` makes its input.

It is for development, tests and comparisons of methods on small data, not a match for models of
thousands of hours.

## How it was made
`recipes/BEST-RQ` of this package: masked prediction of cluster numbers, on {cores};
rounds: {rounds}.

| round | targets | blocks | steps | hours heard | seconds | held-out loss | accuracy |
| --- | --- | --- | --- | --- | --- | --- | --- |
{table}

Loss and accuracy are at masked frames. Clusters of cepstra are of views of each frame, clusters of
states are of the encoder's of the round before, with whose weights a round goes on. Where it has
more blocks, fresh ones, at first the identity, follow each trained one.
Losses of different targets do not compare. `training.json` has all settings and curves,
`curves.png` shows them.

## Data
Besides, {valid:.2f} hours were held out, by speaker, for the curves. Skipped: {skipped}.

| source | licence |
| --- | --- |
{sources}

{remarks}
"""


def relative(settings, data_root):
    """Settings without the paths of the machine: sources below `data_root`, no folders."""
    kept = {}
    for key, value in settings.items():
        if key == "sources":
            value = [_below(data_root, source) for source in value]
        if key in ("init", "teacher") and value:
            value = "the round before"
        if not key.endswith("_folder") and key not in ("prepare", "config"):
            kept[key] = value
    return kept


def publish(folder, rounds, data_root, licences, cores):
    """Copies the last round's encoder to `folder`, with README.md, training.json and curves.png.

    Arguments
    ---------
    folder : str
        Where to write.
    rounds : list of str
        Encoder folders of all rounds, in their order.
    data_root : str
        Folder that all sources lie in; it is left out of what is written.
    licences : dict
        ``licence`` of the weights, as the Hugging Face hub spells it; ``sets``, a list of
        (beginning of the sources' names, what that set is, its licence), of which the longest
        beginning holds; ``remarks`` on the data, which end the card.
    cores : str
        What it was trained on.

    Raises
    ------
    ValueError
        A source lies elsewhere, or no set has its licence. Nothing is written then.
    """
    folder = Path(folder)
    reports = [json.loads((Path(r) / "training.json").read_text()) for r in rounds]
    config = json.loads((Path(rounds[-1]) / "config.json").read_text())
    data = reports[-1]["data"]
    for report in reports:
        report["config"] = relative(report["config"], data_root)
        report["data"] = {k: v for k, v in report["data"].items() if k != "settings"}

    described = {start: (what, licence) for start, what, licence in licences["sets"]}
    sets = {}
    for source in data["settings"]["sources"]:
        name = _below(data_root, source)
        start = max((s for s in described if name.startswith(s)), key=len, default=None)
        if start is None:
            raise ValueError(f"licences: none of the sets begins {name}")
        sets.setdefault(start, []).append(name)
    sources = [
        f"| {described[s][0]}: {_listed(names)} | {described[s][1]} |" for s, names in sets.items()
    ]
    table = []
    for number, report in enumerate(reports, 1):
        last, targets = report["history"][-1], report["targets"]
        layers = report["config"].get("teacher_layers")
        what = f"{len(targets['codebooks'])} × {report['config']['codes']} "
        parts = {"best_rq": "codes of random projections", "cepstra": "clusters of cepstra"}
        parts["states"] = f"clusters of states after blocks {layers}"
        what += " and ".join(parts[part] for part in targets["objective"].split("+"))
        table.append(
            f"| {number} | {what} | {report['config']['num_layers']} | {last['steps']} | "
            f"{last['hours']:.1f} | {last['seconds']:.0f} | {last['valid']['masked_loss']:.2f} | "
            f"{100 * last['valid']['masked_accuracy']:.1f} % |"
        )
    stride = reports[-1]["config"]["stride"]
    card = CARD.format(
        name=folder.name,
        licence=licences["licence"],
        parameters=(Path(rounds[-1]) / "model.safetensors").stat().st_size / 2e6,
        layers=config["num_hidden_layers"],
        width=config["hidden_size"],
        rate=100 / stride,
        hours=data["hours"]["train"],
        valid=data["hours"]["valid"],
        rounds=len(rounds),
        cores=cores,
        table="\n".join(table),
        skipped=", ".join(f"{count} {why}" for why, count in data["skipped"].items()) or "nothing",
        sources="\n".join(sources),
        remarks=licences["remarks"],
    )
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "preprocessor_config.json", "model.safetensors"):
        shutil.copyfile(Path(rounds[-1]) / name, folder / name)
    (folder / "training.json").write_text(json.dumps({"rounds": reports}, indent=1) + "\n")
    (folder / "README.md").write_text(card, encoding="utf-8")
    _plot(reports, folder / "curves.png")


def _below(data_root, source):
    if not Path(source).is_relative_to(data_root):
        raise ValueError(f"data_root: {source} is not in {data_root}")
    return str(Path(source).relative_to(data_root))


def _listed(names):
    if len(names) < 4:
        return ", ".join(names)
    return f"{names[0]} … {names[-1]} ({len(names)} sources)"


def _plot(reports, path):
    figure, axes = plt.subplots(1, len(reports), figsize=(4 * len(reports), 3), squeeze=False)
    for number, (report, axis) in enumerate(zip(reports, axes[0], strict=True), 1):
        hours = [row["hours"] for row in report["history"]]
        for part in ("train", "valid"):
            losses = [row[part]["masked_loss"] for row in report["history"]]
            axis.plot(hours, losses, marker=".", label=part)
        unigram = sum(book["entropy"] for book in report["targets"]["codebooks"])
        axis.axhline(unigram / len(report["targets"]["codebooks"]), ls=":", label="unigram")
        axis.set(title=f"round {number}", xlabel="hours heard", ylabel="masked loss")
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main(argv):
    """Publish what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--rounds", nargs="+", required=True)
    parser.add_argument("--data_root", required=True)
    parser.add_argument("--licences", required=True, help="JSON, see licences.json")
    parser.add_argument("--cores", default="2 CPU cores")
    given = parser.parse_args(argv)
    licences = json.loads(Path(given.licences).read_text(encoding="utf-8"))
    publish(given.folder, given.rounds, given.data_root, licences, given.cores)


if __name__ == "__main__":
    run(main)

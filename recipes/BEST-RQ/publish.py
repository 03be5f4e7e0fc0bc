#!/usr/bin/env python3
"""Puts a pretrained encoder and the record of its rounds into one folder with a model card.

> python publish.py FOLDER --rounds results/cepstra/1986/encoder results/states/1986/encoder \
>     --data_root /data --licences licences.json
"""

import argparse
import json
import shutil
from pathlib import Path

import numpy
from speech_prepare import learned_from

from hff_modules.cli import run
from hff_modules.plots import new_figure

CARD = """---
library_name: transformers
license: {licence}
tags: [speech, self-supervised, wav2vec2-bert]
---
# {name}

A small speech encoder, {parameters:.1f} M parameters: {layers} Conformer blocks of width {width}
(`Wav2Vec2BertModel`, the shape of w2v-BERT 2.0), log-mel input at 16 kHz, {rate:.0f} states a
second. It learned from {hours} hours of speech without a look at a transcript. `AutoModel`
loads it; `AutoFeatureExtractor` makes its input.

It is for development, tests and comparisons of methods on small data, not a match for models of
thousands of hours.

## How it was made
`recipes/BEST-RQ` of this package: masked prediction, on {cores}; rounds: {rounds}.

| round | begins with | targets | blocks | steps | hours | seconds | held-out loss | accuracy |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
{table}

Hours are those heard, again and again; loss and accuracy are at masked frames. Where a round has
more blocks than the encoder it begins with, fresh ones, at first the identity, follow each.
Losses of different targets do not compare. `training.json` has all settings and curves,
`curves.png` shows them.

## Data
{held_out}

| source | licence |
| --- | --- |
{sources}

{remarks}
"""


def relative(settings, data_root, made_in):
    """Settings without the paths of the machine: sources below `data_root`, no folders."""
    kept = {}
    for key, value in settings.items():
        if key == "sources":
            value = [_below(data_root, source) for source in value]
        if key in ("init", "teacher") and value:
            value = _named(value, made_in)
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
        Encoder folders of all rounds, in their order; one that was published stands for its own.
    data_root : str
        Folder that all sources of all rounds lie in; it is left out of what is written.
    licences : dict
        ``licence`` of the weights, as the Hugging Face hub spells it; ``sets``, a list of
        (beginning of the sources' names, what that set is, its licence), of which the longest
        beginning holds; ``remarks`` on the data, which end the card. An encoder that a round
        began with, and that this recipe did not make, needs a set with its full name.
    cores : str
        What it was trained on.

    Raises
    ------
    ValueError
        A source lies elsewhere, or no set has its licence. Nothing is written then.
    """
    folder = Path(folder)
    config = json.loads((Path(rounds[-1]) / "config.json").read_text())
    reports, heard, made_in, named = [], {}, {}, set()
    for encoder in rounds:
        report = json.loads((Path(encoder) / "training.json").read_text())
        made_in[Path(encoder).resolve()] = len(reports) + len(report.get("rounds", [report]))
        if "rounds" in report:  # without the machine's paths already
            reports += report["rounds"]
            sources = [source for r in report["rounds"] for source in r["config"]["sources"]]
            named |= {*report.get("learned_from", sources)}
            heard |= dict.fromkeys(sorted(named))
            continue
        own = report["targets"].pop("learned_from", None)  # not there before they were recorded
        own = own or learned_from(report["config"])
        heard |= dict.fromkeys(s for s in own if Path(s).resolve() not in made_in)
        report["config"] = relative(report["config"], data_root, made_in)
        report["data"] = {k: v for k, v in report["data"].items() if k != "settings"}
        reports.append(report)

    described = {start: (what, licence) for start, what, licence in licences["sets"]}
    sets, names = {}, []
    for source in heard:
        known = source in described or source in named
        name = source if known else _below(data_root, source)
        names.append(name)
        start = max((s for s in described if name.startswith(s)), key=len, default=None)
        if start is None:
            raise ValueError(f"licences: none of the sets begins {name}")
        if name not in sets.setdefault(start, []):
            sets[start].append(name)
    sources = [
        f"| {described[s][0]}: {_listed(names)} | {described[s][1]} |" for s, names in sets.items()
    ]
    table = []
    for number, report in enumerate(reports, 1):
        last, targets, settings = report["history"][-1], report["targets"], report["config"]
        teacher, layers, init = (settings.get(k) for k in ("teacher", "teacher_layers", "init"))
        what = f"{len(targets['codebooks'])} × {settings['codes']} "
        parts = {"best_rq": "codes of random projections"}
        parts["cepstra"] = "clusters of cepstra, views of each frame"
        parts["states"] = f"clusters of the states of {teacher} after blocks {layers}"
        what += " and ".join(parts[part] for part in targets["objective"].split("+"))
        table.append(
            f"| {number} | {init or 'fresh weights'} | {what} | {settings['num_layers']} | "
            f"{last['steps']} | {last['hours']:.1f} | {last['seconds']:.0f} | "
            f"{last['valid']['masked_loss']:.2f} | {100 * last['valid']['masked_accuracy']:.1f} % |"
        )
    stride = reports[-1]["config"]["stride"]
    card = CARD.format(
        name=folder.name,
        licence=licences["licence"],
        parameters=(Path(rounds[-1]) / "model.safetensors").stat().st_size / 2e6,
        layers=config["num_hidden_layers"],
        width=config["hidden_size"],
        rate=100 / stride,
        hours=" and ".join(dict.fromkeys(f"{r['data']['hours']['train']:.1f}" for r in reports)),
        held_out=_held_out(reports),
        rounds=len(reports),
        cores=cores,
        table="\n".join(table),
        sources="\n".join(sources),
        remarks=licences["remarks"],
    )
    curves = _curves(reports)  # needs matplotlib: said before anything is written
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "preprocessor_config.json", "model.safetensors"):
        shutil.copyfile(Path(rounds[-1]) / name, folder / name)
    (folder / "training.json").write_text(
        json.dumps({"rounds": reports, "learned_from": names}, indent=1) + "\n"
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    curves.savefig(folder / "curves.png")


def _named(encoder, made_in):
    number = made_in.get(Path(encoder).resolve())
    return f"round {number}" if number else "another encoder"


def _held_out(reports):
    said = {}
    for number, report in enumerate(reports, 1):
        data = report["data"]
        how = {"speakers": ", by speaker,", "recordings": ", single recordings,"}
        how = how.get(data.get("held_out"), "")
        skipped = ", ".join(f"{count} {why}" for why, count in data["skipped"].items())
        line = f"{data['hours']['valid']:.2f} hours were held out{how} for the curves. "
        said.setdefault(f"{line}Skipped: {skipped or 'nothing'}.", []).append(str(number))
    if len(said) == 1:
        return f"Besides, {next(iter(said))}"
    return "\n".join(
        f"Besides, in round {', '.join(which)}: {line}" for line, which in said.items()
    )


def _below(data_root, source):
    if not Path(source).is_relative_to(data_root):
        raise ValueError(
            f"data_root: {source} is not in {data_root}, and no set of the licences has its name"
        )
    return str(Path(source).relative_to(data_root))


def _listed(names):
    if len(names) < 4:
        return ", ".join(names)
    return f"{names[0]} … {names[-1]} ({len(names)} sources)"


def _curves(reports):
    figure, axes = new_figure(4 * len(reports), 3, len(reports))
    for number, (report, axis) in enumerate(zip(reports, numpy.atleast_1d(axes), strict=True), 1):
        hours = [row["hours"] for row in report["history"]]
        for part in ("train", "valid"):
            losses = [row[part]["masked_loss"] for row in report["history"]]
            axis.plot(hours, losses, marker=".", label=part)
        unigram = sum(book["entropy"] for book in report["targets"]["codebooks"])
        axis.axhline(unigram / len(report["targets"]["codebooks"]), ls=":", label="unigram")
        axis.set(title=f"round {number}", xlabel="hours heard", ylabel="masked loss")
        axis.legend()
    return figure


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

"""What an exported folder says: settings for SpeechBrain's interfaces, and the model card."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ruamel.yaml

from hff_modules.export_format import MANIFEST, TENSORS

COUNTS = ("trainable_encoder_parameters", "trainable_parameters", "total_parameters")

_SETTINGS = """\
# For SpeechBrain's {interface}. The pretrainer reads hff.json and trained.safetensors; no pickle.
base_encoder: null  # another place of the base encoder than hff.json names
sample_rate: 16000
{parts}pretrainer: !new:hff_modules.interfaces.FolderLoader
    loadables:
{loadables}"""

_ASR = """\
encoder: !new:hff_modules.interfaces.CTCEncoder
    base: !ref <base_encoder>
tokenizer: !new:{tokenizer}
modules:
    encoder: !ref <encoder>
{decoding}"""

_GREEDY = """\
decoding_function: !name:speechbrain.decoders.ctc_greedy_decode
    blank_id: 0
"""

_BEAM = """\
decoding_function: !name:speechbrain.decoders.ctc.CTCPrefixBeamSearcher
test_beam_search:
    blank_index: 0
    beam_size: 50
"""

_TOKENIZERS = {
    "char": "speechbrain.dataio.encoder.CTCTextEncoder",
    "unigram": "sentencepiece.SentencePieceProcessor",
    "bpe": "sentencepiece.SentencePieceProcessor",
}

# Waveforms pass through features and their norm unchanged: the embedding model reads them.
_EMBEDDINGS = """\
embedding_model: !new:hff_modules.interfaces.Embeddings
    base: !ref <base_encoder>
mean_var_norm_emb: !new:hff_modules.interfaces.Unchanged
modules:
    compute_features: !new:torch.nn.Identity
    mean_var_norm: !new:hff_modules.interfaces.Unchanged
    embedding_model: !ref <embedding_model>
    mean_var_norm_emb: !ref <mean_var_norm_emb>
"""

_CLASSES = """\
slot: null          # which slot of several is classified; the first by default
embedding_model: !new:hff_modules.interfaces.Embeddings
    base: !ref <base_encoder>
classifier: !new:hff_modules.interfaces.Classifier
    embedding_model: !ref <embedding_model>
    slot: !ref <slot>
label_encoder: !new:hff_modules.interfaces.SlotLabels
    slot: !ref <slot>
modules:
    compute_features: !new:torch.nn.Identity
    mean_var_norm: !new:hff_modules.interfaces.Unchanged
    embedding_model: !ref <embedding_model>
    classifier: !ref <classifier>
"""


def hyperparams(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Give the settings for SpeechBrain's interfaces: texts by file name."""
    task, name = manifest["task"], "hyperparams.yaml"
    if task == "speaker":
        return {name: _settings("SpeakerRecognition", _EMBEDDINGS, "embedding_model")}
    if task == "classification":
        parts = _settings("EncoderClassifier", _CLASSES, "embedding_model", "label_encoder")
        return {name: parts}
    tokenizer = _TOKENIZERS[manifest["units"]]
    return {
        name: _settings(
            "EncoderASR",
            _ASR.format(tokenizer=tokenizer, decoding=decoding),
            "encoder",
            "tokenizer",
        )
        for name, decoding in ((name, _GREEDY), ("hyperparams_beam.yaml", _BEAM))
    }


def _settings(interface: str, parts: str, *loadables: str) -> str:
    lines = "".join(f"        {name}: !ref <{name}>\n" for name in loadables)
    return _SETTINGS.format(interface=interface, parts=parts, loadables=lines)


_PIPELINES = {
    "asr": "automatic-speech-recognition",
    "classification": "audio-classification",
    "speaker": "feature-extraction",
}

_WITH_LM = """
`transcribe --lm` searches with the language model that is here, too, in `lm.arpa`.
"""

_USE = {
    "asr": """\
```python
from hff_modules.exported import load_exported

model = load_exported("my_model")
model(wavs, wav_lens)[0]["text"]        # wavs (batch, samples) at 16 kHz; words with times as well

from speechbrain.inference.ASR import EncoderASR

EncoderASR.from_hparams(source="my_model").transcribe_file("speech.wav")
EncoderASR.from_hparams(source="my_model", hparams_file="hyperparams_beam.yaml")   # beam search
```

    python -m hff_modules.transcribe my_model speech.wav
""",
    "classification": """\
```python
from hff_modules.exported import load_exported

model = load_exported("my_model")
model(wavs, wav_lens)        # wavs (batch, samples) at 16 kHz: label and probability by slot, each

from speechbrain.inference.classifiers import EncoderClassifier

EncoderClassifier.from_hparams(source="my_model").classify_file("speech.wav")
```
""",
    "speaker": """\
```python
from hff_modules.exported import load_exported

model = load_exported("my_model")
model(wavs, wav_lens)        # wavs (batch, samples) at 16 kHz: an embedding each

from speechbrain.inference.speaker import SpeakerRecognition

SpeakerRecognition.from_hparams(source="my_model").verify_files("one.wav", "other.wav")
```
""",
}


def card(manifest: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    """Write the model card.

    Arguments
    ---------
    manifest : Mapping[str, Any]
        As in ``hff.json``.
    about : Mapping[str, Any]
        ``license``, ``language``, ``dataset``, ``data_license``; unknown where it is not given.

    Returns
    -------
    str
        Markdown with the front matter that the hub reads.
    """
    encoder, results = manifest["encoder"], manifest["results"]
    dataset = about.get("dataset") or manifest["dataset"]
    front = {
        "license": about.get("license") or "unknown",
        "library_name": "speechbrain",
        "pipeline_tag": _PIPELINES[manifest["task"]],
        "tags": ["hff_modules", "speechbrain", manifest["task"], manifest["method"]],
    }
    if about.get("language"):
        front["language"] = about["language"]
    if encoder["source"].count("/") == 1 and not Path(encoder["source"]).is_absolute():
        front["base_model"] = encoder["source"]
        front["base_model_relation"] = "finetune" if encoder.get("merged") else "adapter"
    stream = io.StringIO()
    ruamel.yaml.YAML().dump(front, stream)
    shown = (
        encoder["source"]
        if not Path(encoder["source"]).is_absolute()
        else (f"a local folder called {Path(encoder['source']).name}")
    )
    rows = [
        ("task", manifest["task"]),
        ("method", manifest["method"]),
        (
            "base encoder",
            f"{shown}, revision {encoder['revision'] or 'not recorded'}, weights "
            f"{encoder['fingerprint']}",
        ),
        ("layers read", ", ".join(map(str, manifest["layers"]))),
        ("unchanged up to layer", manifest["horizon"]),
        ("adapters", ", ".join(a["method"] for a in manifest["adapters"]) or "none"),
        ("fusion, head", f"{manifest['fusion']['class']}, {manifest['head']['class']}"),
        ("trained in encoder, adapters and fusion", f"{results[COUNTS[0]]:,}"),
        ("trained in all", f"{results[COUNTS[1]]:,} of {results[COUNTS[2]]:,} parameters"),
    ]
    rows += [
        (f"test {test}", ", ".join(f"{key} {value:.4g}" for key, value in scores.items()))
        for test, scores in results.get("test", {}).items()
    ]
    rows += [
        ("trained on", f"{dataset} (licence: {about.get('data_license') or 'unknown'})"),
        ("licence of this model", front["license"]),
        ("versions", ", ".join(f"{k} {v}" for k, v in manifest["versions"].items())),
    ]
    table = "".join(f"| {key} | {value} |\n" for key, value in rows)
    packed = "The base encoder is not in this folder; it is fetched from where it is named."
    if encoder["packed"]:
        packed = "The base encoder is in `encoder/`, as a plain Hugging Face folder."
    elif encoder["source"] in ("builtin", "logmel"):
        packed = "The base encoder comes with the package hff-modules, in the same version."
    return (
        f"---\n{stream.getvalue()}---\n\n# {manifest['method']} for {manifest['task']}\n\n"
        f"| | |\n| --- | --- |\n{table}\n{packed}\n\n## Use\n\n"
        f"{_USE[manifest['task']]}{_WITH_LM if 'lm' in manifest else ''}\n"
        f"`{MANIFEST}` and `{TENSORS}` are data and execute nothing. `hyperparams.yaml` is for "
        "SpeechBrain's interfaces, which build whatever classes it names: look at it before you "
        "open it from strangers so, or use `load_exported`, which does not read it.\n"
    )

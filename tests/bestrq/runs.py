"""Small runs of the pretraining recipe, for its tests."""

import json
import sys
from pathlib import Path

import numpy as np
from transformers import Wav2Vec2BertConfig

from tests import corpora

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "BEST-RQ"
sys.path.insert(0, str(RECIPE))

LICENCES = RECIPE / "licences.json"
TINY = {
    "num_layers": 2,
    "hidden_size": 48,
    "intermediate_size": 96,
    "codebooks": 1,
    "codes": 16,
    "batch_frames": 150,
    "warmup_steps": 5,
    "lr_encoder": 0.005,
    "lr_head": 0.01,
    "epoch_hours": 0.03,
    "valid_seconds": 16,
    "workers": 1,
}


def recipe_main():
    return corpora.load_train(RECIPE).main


def arguments_for(speech, folder, **changes):
    settings = TINY | {"sources": f"[{speech}]", "output_folder": f"{folder}/run"}
    settings |= {"prepared_folder": f"{folder}/prepared"} | changes
    given = [str(RECIPE / "hparams" / "clusters.yaml")]
    for key, value in settings.items():
        given += [f"--{key}", str(value)]
    return given


def history_of(folder):
    return json.loads((folder / "run" / "encoder" / "training.json").read_text())["history"]


def prepared_parts(folder):
    """Columns wav and spk_id of both parts."""
    parts = []
    for part in ("train", "valid"):
        lines = (folder / f"{part}.csv").read_text().splitlines()[1:]
        parts.append([line.split(",")[2:4] for line in lines])
    return parts


def tiny_config(**changes):
    shape = {"hidden_size": 32, "output_hidden_size": 32, "intermediate_size": 48}
    shape |= {"num_attention_heads": 4, "feature_projection_input_dim": 320}
    shape |= {"position_embeddings_type": "rotary", "mask_time_prob": 0.0, "layerdrop": 0.0}
    return Wav2Vec2BertConfig(**shape | changes)


def utterance(rng, seconds=2.0):
    """Sounds of four kinds in a fixed order with random lengths: masked ones can be guessed."""
    parts, kind = [], rng.integers(4)
    while sum(map(len, parts)) < seconds * 16000:
        time = np.arange(rng.integers(3000, 5000)) / 16000
        pitch = (250, 600, 1300, 2900)[kind % 4]
        parts.append(0.2 * np.sin(2 * np.pi * pitch * time) + 0.01 * rng.standard_normal(len(time)))
        kind += 1
    return np.concatenate(parts)[: int(seconds * 16000)].astype(np.float32)

"""The model that learns: how it starts and grows; batches and their codes."""

import json
import logging
import random

import masked_speech
import numpy as np
import pytest
import torch
from transformers import Wav2Vec2BertModel

from tests.bestrq.runs import tiny_config


def test_pieces_shorter_than_a_mask_are_counted_and_nothing_but_them_is_refused(trained, caplog):
    prepared, codes = trained / "prepared", trained / "run" / "codes.npy"
    mask = {"share": 0.5, "frames": 17}
    with caplog.at_level(logging.WARNING):
        segments = masked_speech.SpeechSegments(prepared, "valid", codes, 17, mask)
    number = caplog.records[-1].getMessage().split()[0]
    assert f"{number} of " in caplog.messages[-1] and "mask.frames=17 and left out" in caplog.text
    assert len(segments) and int(number) > 0
    with pytest.raises(ValueError, match="shorter than mask.frames=99: nothing is left"):
        masked_speech.SpeechSegments(prepared, "valid", codes, 100, mask | {"frames": 99})


def test_a_collapsed_quantizer_is_reported(trained, tmp_path, caplog):
    prepared = tmp_path / "prepared"
    prepared.mkdir()
    for name in ("prepared.json", "train.csv", "valid.csv"):
        (prepared / name).write_text((trained / "prepared" / name).read_text())
    features = np.memmap(trained / "prepared" / "features.f16", np.float16, mode="r")
    np.ones_like(features).tofile(prepared / "features.f16")
    settings = {"objective": "best_rq", "codebooks": 1, "codes": 64, "seed": 0, "sources": []}
    settings |= {"output_folder": str(tmp_path), "prepared_folder": str(prepared)}
    with caplog.at_level(logging.WARNING):
        masked_speech.make_codes(settings)
    assert any("collapsed: 1.6 %" in message for message in caplog.messages)
    assert json.loads((tmp_path / "targets.json").read_text())["codebooks"][0]["used"] == 1 / 64


def test_an_epoch_has_its_hours_at_any_stride():
    class Segments(list):
        segments = [(0, 100)] * 360

    given, parts = Segments(Segments.segments), []
    for stride in (2, 4):
        hparams = {"epoch_hours": 0.1, "seed": 0, "stride": stride}
        parts.append(masked_speech.sampler(given, 1000, hparams).parts)
    assert parts == [2, 4]


def test_attention_starts_with_heads_that_look_ahead_and_around():
    sides = {"left_max_position_embeddings": 16, "right_max_position_embeddings": 16}
    config = tiny_config(
        num_hidden_layers=1, position_embeddings_type="relative_key", hidden_size=64, **sides
    )
    model = Wav2Vec2BertModel(config).eval()
    masked_speech.start_with_local_attention(model)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attention = model(torch.randn(1, 40, 320), output_attentions=True).attentions[0][0]
    away = torch.arange(40)[None] - torch.arange(40)[:, None]
    looked = (attention * away)[:, 10:30].sum(-1).mean(-1)
    assert 1 < looked[0] < 3 and 3 < looked[1] < 6 and -2 < looked[2] < 2


def test_a_grown_encoder_gives_the_same_output_as_the_small_one():
    torch.manual_seed(0)
    small = Wav2Vec2BertModel(tiny_config(num_hidden_layers=2)).eval()
    for param in small.parameters():  # as after training: scales and shifts too
        torch.nn.init.normal_(param, std=0.3)
    large = Wav2Vec2BertModel(tiny_config(num_hidden_layers=6)).eval()
    masked_speech.start_as_identity(large)
    masked_speech.grow_from(small, large)
    inputs = torch.randn(2, 9, 320)
    with torch.no_grad():
        expected = small(inputs).last_hidden_state
        assert expected.std() > 0.1
        torch.testing.assert_close(large(inputs).last_hidden_state, expected, rtol=1e-3, atol=1e-3)


def test_growing_to_a_depth_that_is_no_multiple_is_refused():
    small = Wav2Vec2BertModel(tiny_config(num_hidden_layers=2))
    large = Wav2Vec2BertModel(tiny_config(num_hidden_layers=3))
    with pytest.raises(ValueError, match="2 blocks.*3"):
        masked_speech.grow_from(small, large)


@pytest.mark.parametrize("changed", [{"warp": 0.2}, {"bands": {"count": 2, "width": 40}}])
def test_only_training_hears_what_is_changed_and_codes_and_masks_stay(trained, changed):
    prepared, codes = trained / "prepared", trained / "run" / "codes.npy"
    mask = {"share": 0.5, "frames": 4}
    for part in ("train", "valid"):
        batches = []
        for given in ({}, changed):
            segments = masked_speech.SpeechSegments(prepared, part, codes, 17, mask, **given)
            random.seed(0)
            torch.manual_seed(0)
            batches.append(segments.collate([0, 1, 2]))
        (plain, valid, _, named), (heard, same_valid, _, same_named) = batches
        assert (valid == same_valid).all() and (named == same_named).all()
        change = (heard - plain).square().mean() / plain.square().mean()
        assert change > 0.01 if part == "train" else change == 0


def test_dropout_stays_with_the_pretraining(tmp_path):
    config = tiny_config(**dict.fromkeys(masked_speech.DROPOUTS, 0.3))
    pretrainer = masked_speech.Pretrainer(config, 1, 4)
    pretrainer.export(tmp_path, 4, {})
    exported = Wav2Vec2BertModel.from_pretrained(tmp_path)
    for place in masked_speech.DROPOUTS:
        assert getattr(exported.config, place) == 0
        assert getattr(pretrainer.encoder.config, place) == 0.3

"""Learned frames and learned keys against references that are computed otherwise."""

import pytest
import torch

from hff_modules import SSLEncoder, adapters
from hff_modules.families import LayerCall, WhisperFamily
from tests.conftest import FAMILIES
from tests.test_adapters import small_options
from tests.test_encoder import SAMPLES, speech

every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture
def batch():
    return speech(SAMPLES, 9_000)


@torch.no_grad()
def whole_pass(family, batch):
    """What enters layer 1, and every layer's output with all of its frames."""
    wavs, wav_lens = batch
    hidden, lengths, call = family.enter(wavs, (wav_lens * wavs.shape[1]).round().long())
    states = [hidden]
    for number in range(1, len(family.layers) + 1):
        states.append(family.run_layer(number, states[-1], call))
    return states, lengths, call


@every_family
def test_layers_run_from_a_stored_state_as_in_the_whole_pass(family, make_encoder_folder, batch):
    encoder = SSLEncoder(make_encoder_folder(family)).eval()
    states, lengths, entered = whole_pass(encoder._family, batch)
    encoder(*speech(16_000))  # something else in between
    with torch.no_grad():
        for start in (0, 2):
            call = encoder._family.call_for(states[start], lengths)
            assert call.kwargs.keys() <= entered.kwargs.keys()
            hidden = states[start]
            for number in range(start + 1, 5):
                hidden = encoder._family.run_layer(number, hidden, call)
                assert torch.equal(hidden, states[number]), number


@pytest.mark.parametrize("method", ["prefix", "prompts", "p_adapter", "unipet"])
@pytest.mark.parametrize("family", ["wavlm-base", "wav2vec2-conformer-rotary", "w2v-bert-2"])
def test_stored_states_give_what_the_waveforms_give(method, family, make_encoder_folder, batch):
    encoder = SSLEncoder(make_encoder_folder(family), layers=[1, 4]).eval()
    adapters.attach(encoder, method, **small_options(method))
    with torch.no_grad():
        stored, lengths = encoder.encode(*batch)
        restored, _ = encoder(stored, lengths / lengths.max())
        assert torch.equal(restored, encoder(*batch)[0])


def test_a_stored_state_of_whisper_without_the_silence_is_refused(make_encoder_folder):
    family = SSLEncoder(make_encoder_folder("whisper"))._family
    with pytest.raises(ValueError, match="20 frames were given.*all 50"):
        family.call_for(torch.randn(1, 20, 24), torch.tensor([20]))


def test_call_for_runs_no_convolution_over_positions(make_encoder_folder):
    family = SSLEncoder(make_encoder_folder("wav2vec2-base"))._family
    convolution, ran = family.stack.pos_conv_embed, []
    convolution.register_forward_hook(lambda *_: ran.append(1))
    family.call_for(torch.randn(2, 9, 24), torch.tensor([9, 4]))
    assert not ran and family.stack.pos_conv_embed is convolution
    assert list(family.stack._modules) == ["pos_conv_embed", "layer_norm", "dropout", "layers"]


def call_of_longer_speech(family, more):
    """What the layers are called with for real speech that gives ``more`` frames more."""
    if isinstance(family, WhisperFamily):  # as many frames as its window, always
        return LayerCall((None,))
    num_samples = torch.tensor([SAMPLES + more * 320] * 2)
    return family.enter(torch.randn(2, int(num_samples[0])), num_samples)[2]


@every_family
def test_prompts_are_frames_in_front_of_each_layer(family, make_encoder_folder):
    encoder = SSLEncoder(make_encoder_folder(family), layers="all").eval()
    batch, trunk = speech(SAMPLES, SAMPLES), encoder._family
    prompts = adapters.attach(encoder, "prompts", layers=[2, 4], length=3)
    (hidden, *_), lengths, call = whole_pass(trunk, batch)
    longer, expected = call_of_longer_speech(trunk, 3), []
    with torch.no_grad():
        for number in range(1, 5):
            if number in (2, 4):
                frames = prompts.parts[str(number)].frames.expand(2, -1, -1)
                hidden = trunk.run_layer(number, torch.cat([frames, hidden], dim=1), longer)[:, 3:]
            else:
                hidden = trunk.run_layer(number, hidden, call)
            expected.append(hidden)
        if trunk.final_norm is not None:
            expected[-1] = trunk.final_norm(expected[-1])
        states, _ = encoder(*batch)
    for state, reference in zip(states[1:], expected, strict=True):
        torch.testing.assert_close(state, reference[:, : int(lengths.max())])


@every_family
def test_a_p_adapter_goes_through_all_layers_and_leaves_the_states(family, make_encoder_folder):
    encoder = SSLEncoder(make_encoder_folder(family), layers="all").eval()
    batch, trunk = speech(SAMPLES, SAMPLES), encoder._family
    p_adapter = adapters.attach(encoder, "p_adapter", length=3)
    (entering, *_), lengths, _ = whole_pass(trunk, batch)
    longer, frames = call_of_longer_speech(trunk, 3), int(lengths.max())
    with torch.no_grad():
        hidden = torch.cat([p_adapter.parts["1"].frames.expand(2, -1, -1), entering], dim=1)
        for number in range(1, 5):
            hidden = trunk.run_layer(number, hidden, longer)
        if trunk.final_norm is not None:
            hidden = trunk.final_norm(hidden)
        states, _ = encoder(*batch)
    assert torch.equal(states[0], entering[:, :frames])
    torch.testing.assert_close(states[-1], hidden[:, 3 : 3 + frames])


@every_family
def test_a_prefix_is_attended_to_like_any_key_without_position(family, make_encoder_folder, batch):
    """One attention against softmax(q k + bias) v, written out, on a padded batch."""
    encoder = SSLEncoder(make_encoder_folder(family), layers=4).eval()
    seen = {}

    def look(key, value, mask, bias):
        seen.update(key=key, value=value, mask=mask, bias=bias)
        return key, value, mask, bias

    recorder = encoder.hook_keys_and_values(3, look)
    prefix = adapters.attach(encoder, "prefix", layers=[3], length=5).parts["3"]
    parts = encoder.parts(3)
    parts.query.register_forward_hook(lambda m, args, out: seen.update(query=out))
    parts.output.register_forward_hook(lambda m, args, out: seen.update(attended=args[0]))
    with torch.no_grad():
        prefix.keys.mul_(50), prefix.values.mul_(50)  # so that they matter
        encoder(*batch)
        batch_size, heads, frames, width = seen["key"].shape
        split = (batch_size, frames, heads, width)
        query = seen["query"].view(split).transpose(1, 2)
        if hasattr(parts.attention, "pos_bias_u"):
            query = query + parts.attention.pos_bias_u[:, None]
        keys = prefix.keys.view(1, 5, heads, width).transpose(1, 2)
        values = prefix.values.view(1, 5, heads, width).transpose(1, 2)
        scores = query @ seen["key"].mT * width**-0.5
        if seen["bias"] is not None:
            scores = scores + seen["bias"]
        if seen["mask"] is not None:
            scores = scores.masked_fill(~seen["mask"], -torch.inf)
        weights = torch.cat([query @ keys.mT * width**-0.5, scores], dim=-1).softmax(-1)
        expected = weights[..., :5] @ values + weights[..., 5:] @ seen["value"]
    assert (seen["mask"] is None) == (family == "whisper")
    assert 0.05 < weights[..., :5].sum(-1).mean() < 0.95
    attended = seen["attended"].view(split).transpose(1, 2)
    torch.testing.assert_close(attended, expected, rtol=1e-4, atol=1e-5)
    recorder.remove()


def test_prefixes_of_two_adapters_are_taken_off_one_by_one(make_encoder_folder, batch):
    encoder = SSLEncoder(make_encoder_folder("hubert-base"), layers=4).eval()
    with torch.no_grad():
        plain = encoder(*batch)[0]
        adapters.attach(encoder, "prefix", name="one", length=2)
        one = encoder(*batch)[0]
        adapters.attach(encoder, "prefix", name="two", length=2)
        assert not torch.equal(encoder(*batch)[0], one)
        adapters.remove(encoder, "two")
        assert torch.equal(encoder(*batch)[0], one)
        assert encoder.model.config._attn_implementation == "hooked_sdpa"
        adapters.remove(encoder, "one")
        assert encoder.model.config._attn_implementation == "sdpa"
        assert torch.equal(encoder(*batch)[0], plain)


def test_prompts_and_a_p_adapter_take_no_part_in_each_others_frames(encoder_folder, batch):
    encoder = SSLEncoder(encoder_folder, layers="all").eval()
    adapters.attach(encoder, "p_adapter", length=2)
    with torch.no_grad():
        one = encoder(*batch)[0]
        adapters.attach(encoder, "prompts", layers=[3], length=4)
        both = encoder(*batch)[0]
    assert both.shape == one.shape and torch.equal(both[:3], one[:3])
    assert not torch.equal(both[3], one[3])


@every_family
def test_frames_in_front_do_not_depend_on_those_of_other_utterances(family, make_encoder_folder):
    encoder = SSLEncoder(make_encoder_folder(family), layers="all").eval()
    with torch.no_grad():  # so that positions and neighbours count
        for weight in encoder.model.parameters():
            weight.mul_(3 if weight.dim() == 2 else 1)
    for name, method, length in (("a", "prompts", 3), ("b", "unipet", 5), ("p", "p_adapter", 2)):
        adapters.attach(encoder, method, name=name, length=length)
    choices = ["a", None, ["p"], ["a", "p"], "b"]
    wavs, wav_lens = speech(9_000, SAMPLES, 8_000, 10_000, 7_000)
    lengths = (wav_lens * wavs.shape[1]).round().long()
    with torch.no_grad():
        mixed, frames = encoder(wavs, wav_lens, adapters=choices)
        for row, choice in enumerate(choices):
            alone, _ = encoder(wavs[row : row + 1, : lengths[row]], adapters=[choice])
            torch.testing.assert_close(
                mixed[:, row, : frames[row]], alone[:, 0], rtol=1e-3, atol=1e-3
            )


@pytest.mark.parametrize("family", ["wav2vec2-conformer-rotary", "wav2vec2-conformer-rel"])
def test_positions_made_in_inference_mode_can_be_trained_with(family, make_encoder_folder):
    encoder = SSLEncoder(make_encoder_folder(family), layers="all")
    positions = encoder._family.stack.embed_positions
    if family.endswith("rel"):  # as before an utterance that is longer than all so far
        positions.pe = positions.pe[:, :1]
    adapters.attach(encoder, "full")
    with torch.inference_mode():
        encoder.eval()(torch.randn(1, 16000))
    encoder.train()(torch.randn(1, 16000))[0].sum().backward()


def test_a_frozen_p_adapter_still_keeps_the_horizon_at_what_enters_layer_one(encoder_folder):
    # Its frames are in no stored state, so a run from a higher one would lose them.
    encoder = SSLEncoder(encoder_folder, layers="all")
    adapters.attach(encoder, "p_adapter").requires_grad_(False)
    assert encoder.horizon == 0

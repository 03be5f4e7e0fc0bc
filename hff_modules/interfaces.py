"""What an exported folder's ``hyperparams.yaml`` is made of, for SpeechBrain's own interfaces.

``EncoderASR.from_hparams(source="my_model")`` builds the empty parts below; its pretrainer, which
knows the source, fills them from JSON and safetensors. No pickle is read.
"""

from pathlib import Path

import sentencepiece
import torch
from speechbrain.dataio.encoder import CategoricalEncoder, CTCTextEncoder
from speechbrain.utils.fetching import FetchConfig, FetchFrom, LocalStrategy, guess_source
from speechbrain.utils.parameter_transfer import Pretrainer
from torch import nn

from hff_modules.data.text import MODEL_FILE, CharUnits
from hff_modules.export_format import LABELS, TOKENIZER, ExportError, find_folder, read_json
from hff_modules.exported import Exported, load_exported

CERTAIN = -1e4  # log probability of what is ruled out


class FolderLoader(Pretrainer):
    """SpeechBrain's ``Pretrainer`` for exported models: gives the source's folder to each loadable.

    Arguments are those of ``Pretrainer``. From the hub, files go to its cache; ``savedir`` holds
    ``hyperparams.yaml`` alone.
    """

    def collect_files(
        self,
        default_source=None,
        local_strategy: LocalStrategy = LocalStrategy.SYMLINK,
        fetch_config: FetchConfig = FetchConfig(),  # noqa: B008
    ) -> dict:
        """Find the folder; arguments as in ``Pretrainer``."""
        kind, source = guess_source(default_source)
        if kind == FetchFrom.URI:
            raise ExportError(f"{source}: expected a folder or a name on the hub, not an address")
        self.folder = find_folder(
            source,
            fetch_config.revision,
            token=fetch_config.token,
            local_files_only=not fetch_config.allow_network,
            cache_dir=fetch_config.huggingface_cache_dir,
        )
        return {}

    def load_collected(self) -> None:
        """Fill every loadable."""
        for loadable in self.loadables.values():
            if isinstance(loadable, CTCTextEncoder):
                fill_characters(loadable, CharUnits.load(self.folder / TOKENIZER))
            elif isinstance(loadable, sentencepiece.SentencePieceProcessor):
                loadable.load(str(self.folder / TOKENIZER / MODEL_FILE))
            else:
                loadable.fill(self.folder)


def fill_characters(tokenizer: CTCTextEncoder, units: CharUnits) -> None:
    """Put characters into SpeechBrain's tokenizer, under the same indices."""
    blank, *characters = units.vocab_list
    tokenizer.insert_blank(blank, units.blank_index)
    tokenizer.update_from_iterable(characters, sequence_input=False)
    tokenizer.expect_len(units.size)


class Filled(nn.Module):
    """A part that is empty until its folder is known.

    Arguments
    ---------
    base : str, optional
        Another place of the base encoder than the model names.
    """

    def __init__(self, base: str | None = None):
        super().__init__()
        self.base = base

    def fill(self, folder: Path) -> None:
        """Load the exported model."""
        self.model: Exported = load_exported(folder, base=self.base)


class CTCEncoder(Filled):
    """The ``encoder`` of ``EncoderASR``: waveforms to log probabilities."""

    def forward(self, wavs: torch.Tensor, wav_lens: torch.Tensor) -> torch.Tensor:
        """Give log probabilities (batch, frames, units), nothing but blanks behind an utterance.

        ``EncoderASR`` decodes by relative lengths, which may be off by a frame. There are as many
        more frames as it takes for none of an utterance's own to be cut.
        """
        states, lengths = self.model.states(wavs, wav_lens)
        log_probs = self.model.outputs(states, lengths)
        frames = log_probs.shape[1]
        while bool(((wav_lens * frames).long() < lengths.to(wav_lens.device)).any()):
            frames += 1
        log_probs = nn.functional.pad(log_probs, (0, 0, 0, frames - log_probs.shape[1]))
        behind = torch.arange(frames, device=log_probs.device) >= lengths[:, None].to(
            log_probs.device
        )
        blank = log_probs.new_full(log_probs.shape[-1:], CERTAIN)
        blank[self.model.units.blank_index] = 0.0
        return torch.where(behind.unsqueeze(-1), blank, log_probs)


class Unchanged(nn.Module):
    """What SpeechBrain calls between steps that here are one: gives back what it is given."""

    def forward(self, features: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        """Give ``features``."""
        return features


class Embeddings(Filled):
    """The ``embedding_model`` of ``EncoderClassifier`` and ``SpeakerRecognition``.

    From waveforms to what a classifier pools, or to a speaker's embedding.
    """

    def forward(self, wavs: torch.Tensor, wav_lens: torch.Tensor) -> torch.Tensor:
        """From waveforms (batch, samples), 16 kHz, to (batch, 1, width)."""
        states, lengths = self.model.states(wavs, wav_lens)
        if self.model.task == "speaker":
            return self.model.outputs(states, lengths).float().unsqueeze(1)
        head, features = self.model.head, self.model.features(states, lengths)
        return head.pooling(head.projection(features), lengths).unsqueeze(1)


class Classifier(nn.Module):
    """The ``classifier`` of ``EncoderClassifier``: one slot's log probabilities.

    Arguments
    ---------
    embedding_model : Embeddings
        Whose head has the slot.
    slot : str, optional
        The first by default.
    """

    def __init__(self, embedding_model: Embeddings, slot: str | None = None):
        super().__init__()
        self.slot = slot
        self._embedding_model = [embedding_model]  # in a list: no part of this one

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        """From (batch, 1, width) to log probabilities (batch, 1, classes)."""
        head = self._embedding_model[0].model.head
        number = _slot_number(list(head.slots), self.slot)
        return head.outputs[number](embeddings).float().log_softmax(-1)


class SlotLabels(CategoricalEncoder):
    """The ``label_encoder`` of ``EncoderClassifier``: the names of one slot's classes.

    Arguments
    ---------
    slot : str, optional
        The first by default.
    """

    def __init__(self, slot: str | None = None):
        super().__init__()
        self.slot = slot

    def fill(self, folder: Path) -> None:
        """Read the names."""
        labels = read_json(folder / LABELS)
        names = labels[list(labels)[_slot_number(list(labels), self.slot)]]
        self.update_from_iterable(names)
        self.expect_len(len(names))


def _slot_number(slots: list[str], slot: str | None) -> int:
    if slot is not None and slot not in slots:
        raise ExportError(f"slot={slot!r}: expected one of {', '.join(slots)}")
    return 0 if slot is None else slots.index(slot)

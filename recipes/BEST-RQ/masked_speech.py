"""Parts of the pretraining: model and head, masked batches of stored log-mels, codes on disk."""

import copy
import csv
import hashlib
import json
import logging
import os
import random
import time
from pathlib import Path

import numpy as np
import targets
import torch
from safetensors.torch import load_file, save_file
from speech_prepare import learned_from
from speechbrain.dataio.sampler import DynamicBatchSampler
from speechbrain.lobes.models.BESTRQ import compute_mask
from speechbrain.utils.checkpoints import (
    mark_as_loader,
    mark_as_saver,
    register_checkpoint_hooks,
)
from torch import nn
from transformers import SeamlessM4TFeatureExtractor, Wav2Vec2BertModel

from hff_modules.files import write_atomically

logger = logging.getLogger(__name__)

# What an encoder and the one that it starts from have to share.
SHAPE = (
    "hidden_size intermediate_size num_attention_heads conv_depthwise_kernel_size "
    "feature_projection_input_dim position_embeddings_type left_max_position_embeddings "
    "right_max_position_embeddings"
).split()
DROPOUTS = "hidden_dropout activation_dropout attention_dropout conformer_conv_dropout".split()


@register_checkpoint_hooks
class Pretrainer(nn.Module):
    """The encoder and a linear head that scores the codes of every codebook.

    Arguments
    ---------
    config : transformers.Wav2Vec2BertConfig
        Shape of the encoder.
    codebooks : int
        Codes that each frame has.
    codes : int
        Size of a codebook.
    init : str, optional
        Hugging Face folder to take the encoder's weights from (a second round).
    local_attention : bool
        Start with `start_with_local_attention`.

    Raises
    ------
    ValueError
        The width cannot be divided among the heads, or `init` does not fit.
    """

    def __init__(self, config, codebooks, codes, init=None, local_attention=True):
        super().__init__()
        if config.hidden_size % config.num_attention_heads:
            raise ValueError(
                f"hidden_size={config.hidden_size}: expected a multiple of the "
                f"{config.num_attention_heads} attention heads"
            )
        config._attn_implementation = "eager"
        targets.with_cheap_positions()
        self.encoder = Wav2Vec2BertModel(config)
        start_as_identity(self.encoder)
        if local_attention:
            start_with_local_attention(self.encoder)
        if init:
            targets.encoder_config(init, "init")  # else other models' weights are left out silently
            grow_from(Wav2Vec2BertModel.from_pretrained(init, dtype=torch.float32), self.encoder)
        self.codebooks = codebooks
        self.head = nn.Linear(config.hidden_size, codebooks * codes)

    def forward(self, features, valid, mask):
        """Scores of the codes, the masked frames' input being zero.

        Zero is what the input's LayerNorm turns into a learned vector: no silence gives it, and the
        exported encoder needs no mask embedding.

        Arguments
        ---------
        features : torch.Tensor
            (batch, frames, stride * mels)
        valid, mask : torch.Tensor
            (batch, frames), bool.

        Returns
        -------
        torch.Tensor
            (batch, frames, codebooks, codes)
        """
        features = features.masked_fill(mask.unsqueeze(-1), 0.0)
        hidden = self.encoder(input_features=features, attention_mask=valid.long())
        return self.head(hidden.last_hidden_state).unflatten(-1, (self.codebooks, -1))

    @mark_as_saver
    def save(self, path):
        """Checkpoint without pickle."""
        save_file({k: v.contiguous() for k, v in self.state_dict().items()}, path)

    @mark_as_loader
    def load(self, path, end_of_epoch):
        """Counterpart of `save`."""
        self.load_state_dict(load_file(path))

    def export(self, folder, stride, report):
        """Half-precision encoder as a Hugging Face folder; `report` goes to training.json."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        config = copy.deepcopy(self.encoder.config)
        for place in DROPOUTS:  # this run's: whoever tunes the encoder has another task and data
            setattr(config, place, 0.0)
        half = Wav2Vec2BertModel(config).half()
        half.load_state_dict(self.encoder.state_dict())
        half.save_pretrained(folder)
        mels = config.feature_projection_input_dim // stride
        SeamlessM4TFeatureExtractor(
            feature_size=mels, num_mel_bins=mels, stride=stride, padding_value=0.0
        ).save_pretrained(folder)
        # Last and in one step: by it a run that goes on knows that all was written.
        write_atomically(Path(folder) / "training.json", json.dumps(report, indent=1))


def start_as_identity(encoder):
    """Sets the last projection of every residual branch to zero.

    With Hugging Face's initialisation twelve Conformer blocks hardly train in a small budget: their
    output loses its spread over time, and a classification that a two-layer perceptron learns to
    50 % in 200 steps stands at 10 % after 100; from here it reaches 50 % in 100.
    """
    for block in encoder.encoder.layers:
        attention, convolution = block.self_attn.linear_out, block.conv_module.pointwise_conv2
        for last in (block.ffn1.output_dense, block.ffn2.output_dense, attention, convolution):
            nn.init.zeros_(last.weight)
            if last.bias is not None:
                nn.init.zeros_(last.bias)


def start_with_local_attention(encoder, strength=3.0):
    """Lets three of four heads look at nearby frames from the first step on; the fourth at all.

    The convolutions look only back, and attention that starts flat finds the frames after a mask
    late (after 200 steps it was still flat). The heads share one embedding of distances: each gets
    a direction of its own in it, which the bias of its queries asks for.

    Arguments
    ---------
    encoder : Wav2Vec2BertModel
        With relative_key positions; others are left as they are.
    strength : float
        Length of the queries' bias.
    """
    if encoder.config.position_embeddings_type != "relative_key":
        return
    for block in encoder.encoder.layers:
        attention = block.self_attn
        left, right = (
            attention.left_max_position_embeddings,
            attention.right_max_position_embeddings,
        )
        distance = torch.arange(-left, right + 1, dtype=torch.float32)
        with torch.no_grad():
            query_bias = attention.linear_q.bias.view(attention.num_heads, attention.head_size)
            # Centre and width in frames: just ahead, further ahead, around.
            for head, (centre, width) in enumerate([(1.5, 1.0), (4.0, 1.5), (0.0, 6.0)]):
                if head < attention.num_heads:
                    score = (-0.5 * ((distance - centre) / width) ** 2).clamp(min=-6)
                    query_bias[head, head] = strength
                    embedded = score / (strength * attention.scaling)
                    attention.distance_embedding.weight[:, head] = embedded


def grow_from(small, encoder):
    """Copies a trained encoder into one of the same width with as many blocks or a multiple.

    Fresh blocks, still the identity, follow each trained one. A trained block ends with a
    LayerNorm; its scale and shift move to the last fresh block behind it, so that the output stays
    the same.
    """
    for key in SHAPE:
        given, wanted = getattr(small.config, key), getattr(encoder.config, key)
        if given != wanted:
            raise ValueError(f"init has {key}={given}, expected {wanted}")
    times, rest = divmod(len(encoder.encoder.layers), len(small.encoder.layers))
    if rest:
        raise ValueError(
            f"init has {len(small.encoder.layers)} blocks, of which "
            f"{len(encoder.encoder.layers)} are no multiple"
        )
    encoder.feature_projection.load_state_dict(small.feature_projection.state_dict())
    for index, block in enumerate(small.encoder.layers):
        grown = encoder.encoder.layers[index * times : (index + 1) * times]
        plain = {k: v.clone() for k, v in grown[0].final_layer_norm.state_dict().items()}
        grown[0].load_state_dict(block.state_dict())
        grown[0].final_layer_norm.load_state_dict(plain)
        grown[-1].final_layer_norm.load_state_dict(block.final_layer_norm.state_dict())


@register_checkpoint_hooks
class Progress:
    """Seconds and hours of speech spent, and the curve; kept in checkpoints as JSON."""

    def __init__(self):
        self.seconds, self.hours, self.history = 0.0, 0.0, []
        self._last = None

    def tick(self, budget, device="cpu"):
        """Share of `budget` (seconds) that is spent; in all processes that of the first one."""
        now = time.monotonic()
        # A long gap is validation, not training; it counts all the same, since the budget is what
        # the user waits for.
        self.seconds += now - (self._last or now)
        self._last = now
        share = torch.tensor([self.seconds / budget], device=device)
        if torch.distributed.is_initialized():
            torch.distributed.broadcast(share, 0)
        return share.item()

    @mark_as_saver
    def save(self, path):
        """Writes the JSON."""
        kept = {"seconds": self.seconds, "hours": self.hours, "history": self.history}
        Path(path).write_text(json.dumps(kept))

    @mark_as_loader
    def load(self, path, end_of_epoch):
        """Counterpart of `save`."""
        vars(self).update(json.loads(Path(path).read_text()))


class SpeechSegments(torch.utils.data.Dataset):
    """Stored log-mels with their codes, in segments of bounded length.

    Arguments
    ---------
    prepared : str
        Folder that `prepare_speech` has written.
    part : str
        "train" or "valid"; masks of "valid" are the same every time.
    codes : str
        Codes of all frames, (N, codebooks).
    max_frames : int
        Longer utterances are cut evenly.
    mask : dict
        `share` of the frames that is masked, in spans of `frames`; pieces that are shorter than a
        span are left out, and their number is logged.
    warp : float
        Each piece of "train" is heard with frequencies times 1 - `warp` to 1 + `warp`
        (vocal tract length perturbation, Jaitly & Hinton, 2013); its codes stay what they are.
    bands : dict
        Each piece of "train" is heard without `count` bands of up to `width` mels.
    """

    def __init__(self, prepared, part, codes, max_frames, mask, warp=0.0, bands=None):
        self.features, rows = load_prepared(prepared, part)
        self.codes = np.load(codes, mmap_mode="r")
        self.part, self.mask, self.warp = part, mask, warp
        self.bands = bands or {"count": 0, "width": 0}
        pieces = targets.cut_evenly(rows, max_frames)
        self.segments = [piece for piece in pieces if piece[1] >= mask["frames"]]
        short = len(pieces) - len(self.segments)
        said = f"{short} of {len(pieces)} pieces of {part} speech are shorter than mask.frames"
        if not self.segments:
            raise ValueError(f"{said}={mask['frames']}: nothing is left")
        if short:
            logger.warning("%s=%d and left out", said, mask["frames"])

    def __len__(self):
        return len(self.segments)

    def __getitem__(self, index):
        return index

    def collate(self, indices):
        """Features (B,T,F), valid frames (B,T), masked frames (B,T), codes (B,T,codebooks)."""
        chosen = [self.segments[i] for i in indices]
        shape = len(chosen), max(count for _, count in chosen)
        features = torch.zeros(*shape, self.features.shape[1])
        codes = torch.zeros(*shape, self.codes.shape[1], dtype=torch.long)
        valid, mask = torch.zeros(2, *shape, dtype=torch.bool)
        with torch.random.fork_rng(devices=[], enabled=self.part == "valid"):
            before = random.getstate()
            if self.part == "valid":
                torch.manual_seed(indices[0])
                random.seed(indices[0])
            for row, (start, count) in enumerate(chosen):
                span = slice(start, start + count)
                frames = self.features[span].astype(np.float32)
                if self.part == "train" and self.warp:
                    factor = random.uniform(1 - self.warp, 1 + self.warp)
                    frames = targets.warped(frames, factor)
                if self.part == "train" and self.bands["count"]:
                    frames = targets.without_bands(frames, **self.bands)
                features[row, :count] = torch.from_numpy(frames)
                codes[row, :count] = torch.from_numpy(self.codes[span].astype(np.int64))
                valid[row, :count] = True
                # One utterance at a time: SpeechBrain's mask is the same for all of a batch.
                starts = self.mask["share"] / self.mask["frames"]
                mask[row, compute_mask((1, count), [count], starts, self.mask["frames"])] = True
            if self.part == "valid":
                random.setstate(before)
        return features, valid, mask, codes


def load_prepared(prepared, part):
    """Memory-mapped frames (N, stride * mels); (first frame, frames) of the part's utterances."""
    prepared = Path(prepared)
    report = json.loads((prepared / "prepared.json").read_text())
    width = report["settings"]["stride"] * 80
    path = prepared / "features.f16"
    shape = path.stat().st_size // (2 * width), width
    features = np.memmap(path, np.float16, mode="r", shape=shape)
    with open(prepared / f"{part}.csv", newline="", encoding="utf-8") as table:
        rows = [(int(row["offset"]), int(row["frames"])) for row in csv.DictReader(table)]
    return features, rows


class PartSampler(DynamicBatchSampler):
    """SpeechBrain's dynamic batches; an epoch is one of `parts` equal parts of all batches."""

    def __init__(self, *args, parts=1, **kwargs):
        self.parts = parts
        super().__init__(*args, **kwargs)

    def _generate_batches(self):
        epoch = self._epoch
        self._epoch = epoch // self.parts
        super()._generate_batches()
        self._epoch = epoch
        self._batches = self._batches[epoch % self.parts :: self.parts] or self._batches


def sampler(segments, batch_frames, hparams=None):
    """Batches of `batch_frames` of similar lengths; shuffled when `hparams` are given."""
    lengths = [count for _, count in segments.segments]
    edges = sorted({int(edge) for edge in np.quantile(lengths, np.linspace(0, 1, 25)[1:])})
    parts = 1
    if hparams:
        parts = max(1, round(sum(lengths) / (hparams["epoch_hours"] * 360000 / hparams["stride"])))
    return PartSampler(
        segments,
        batch_frames,
        lengths_list=lengths,
        bucket_boundaries=edges,
        shuffle=hparams is not None,
        batch_ordering="random" if hparams else "ascending",
        seed=hparams["seed"] if hparams else 0,
        parts=parts,
    )


def views_and_layers(hparams):
    """Number of cepstral views and list of the teacher's layers that are to be clustered.

    Raises
    ------
    ValueError
        `objective` is none of those that `make_codes` knows, or does not fit `codebooks` or
        `teacher`.
    """
    books, objective = hparams["codebooks"], hparams["objective"]
    if objective == "best_rq":
        return 0, []
    kinds = objective.split("+")
    if not set(kinds) <= {"cepstra", "states"}:
        raise ValueError(
            f"objective={objective!r}: expected best_rq, cepstra, states or cepstra+states"
        )
    layers = hparams["teacher_layers"] or [] if "states" in kinds else []
    if not isinstance(layers, list):
        raise ValueError(f"teacher_layers={layers!r}: expected a list such as [3, 5]")
    views = max(0, books - len(layers)) if "cepstra" in kinds else 0
    if views > 3 or books != views + len(layers):
        raise ValueError(
            f"codebooks={books}: with objective={objective} it is one for each of "
            f"teacher_layers={layers}, and one for each cepstral view, at most three"
        )
    if layers:
        width = hparams["encoder"].feature_projection_input_dim
        targets.check_teacher(hparams["teacher"], layers, width)
    return views, layers


def make_codes(hparams, device="cpu"):
    """Writes codes.npy and targets.json for all prepared frames, unless they are there.

    `objective` is "best_rq" (random projections), "cepstra" (clusters of as many cepstral views as
    `codebooks` asks, at most three), "states" (of the teacher's layers `teacher_layers`) or
    "cepstra+states", whose codebooks are those of both. The teacher computes on `device`.
    """
    folder, done = Path(hparams["output_folder"]), Path(hparams["output_folder"], "targets.json")
    prepared = (Path(hparams["prepared_folder"]) / "prepared.json").read_bytes()
    digest = hashlib.sha256(prepared).hexdigest()[:16]
    if done.exists():
        if json.loads(done.read_text()).get("prepared", digest) != digest:
            raise ValueError(
                f"{done} is of other speech than {hparams['prepared_folder']} holds now; take "
                "another --output_folder"
            )
        return
    features, rows = load_prepared(hparams["prepared_folder"], "train")
    rows = rows + load_prepared(hparams["prepared_folder"], "valid")[1]
    books, size, objective = hparams["codebooks"], hparams["codes"], hparams["objective"]
    views, layers = views_and_layers(hparams)
    if objective == "best_rq":
        codes = targets.random_projection(features, books, size, seed=hparams["seed"])
    else:
        codes = _cluster_codes(hparams, features, rows, views, layers, device)
    report = targets.usage(codes, size)
    for book, use in enumerate(report):
        logger.info("codebook %d: %s", book, use)
        if use["used"] < 0.1:
            logger.warning(
                "codebook %d has collapsed: %.1f %% of its %d codes are used; take another seed, "
                "fewer codes, or look at the features",
                book,
                100 * use["used"],
                size,
            )
    np.save(folder / "codes.part.npy", codes)
    os.replace(folder / "codes.part.npy", folder / "codes.npy")
    found = {"objective": objective, "prepared": digest, "codebooks": report}
    found["learned_from"] = learned_from(hparams)  # now, as its encoders may be gone later
    write_atomically(done, json.dumps(found, indent=1))


def _cluster_codes(hparams, features, rows, views, layers, device):
    size, codes = hparams["codes"], []
    if views:
        views_at = targets.cepstral_views(features, rows, views)
        codes.append(targets.cluster(views_at, len(features), size))
    if layers:
        path = Path(hparams["output_folder"]) / "states.f16"
        teacher, cut, workers = (hparams[k] for k in ("teacher", "max_frames", "workers"))
        bf16 = hparams["precision"] == "bf16"
        options = (cut, workers, bf16, device)
        for states in targets.states_of(teacher, features, rows, layers, path, *options):
            # Bound now, as the loop goes on to the next layer's states.
            codes.append(targets.cluster(lambda a, b, s=states: [s[a:b]], len(features), size))
        path.unlink()
    return np.concatenate(codes, axis=1)


def build_optimizers(pretrainer, weight_decay=0.01, betas=(0.9, 0.98)):
    """AdamW for the encoder and, with a learning rate of its own, for the head.

    Returns
    -------
    dict
        By the name that `lr_<name>` has in the hyper-parameters.
    """
    common = {"lr": 1e-3, "betas": betas, "weight_decay": weight_decay, "fused": True}
    return {
        name: torch.optim.AdamW(part.parameters(), **common)
        for name, part in (("encoder", pretrainer.encoder), ("head", pretrainer.head))
    }

"""What is predicted at masked frames: codes of a random projection, or of clusters.

BEST-RQ: Chiu et al., arXiv 2202.01855. Clusters of cepstra, then of the model's own states: HuBERT,
Hsu et al., arXiv 2106.07447.
"""

import functools
import math
import os
import random

import numpy as np
import torch
from scipy.fft import dct
from speechbrain.nnet.quantisers import RandomProjectionQuantizer
from transformers import AutoConfig, Wav2Vec2BertModel
from transformers.models.wav2vec2_bert import modeling_wav2vec2_bert
from worker_pool import in_order

from hff_modules.families.attention import relative_key_bias

BLOCK = 20000  # frames at a time: bounds the memory of distances, cepstra and features


def cut_evenly(bounds, max_frames):
    """Utterances of more than `max_frames` frames in pieces of about the same length.

    Arguments
    ---------
    bounds : list of (int, int)
        First frame and number of frames of every utterance.
    max_frames : int
        Longest piece.

    Returns
    -------
    list of (int, int)
        The same of the pieces.

    Example
    -------
    >>> cut_evenly([(0, 5), (5, 2)], 3)
    [(0, 2), (2, 3), (5, 2)]
    """
    pieces = []
    for start, count in bounds:
        number = math.ceil(count / max_frames)
        cuts = [start + count * i // number for i in range(number + 1)]
        pieces += [(a, b - a) for a, b in zip(cuts, cuts[1:], strict=False)]
    return pieces


def blocks_of(frames):
    """(start, stop) of all blocks of at most BLOCK frames."""
    return [(start, min(start + BLOCK, frames)) for start in range(0, frames, BLOCK)]


def kmeans(points, clusters, iterations=25, seed=0):
    """Lloyd's algorithm from randomly drawn points; empty clusters are drawn anew.

    Arguments
    ---------
    points : torch.Tensor
        (N, D), N at least `clusters`.
    clusters : int
        Number of centres.
    iterations : int
        Rounds of assignment and averaging.
    seed : int
        Draws the first centres.

    Returns
    -------
    torch.Tensor
        (clusters, D)

    Example
    -------
    >>> kmeans(torch.tensor([[0.0], [1.0], [10.0], [11.0]]), 2).flatten().sort().values
    tensor([ 0.5000, 10.5000])
    """
    if len(points) < clusters:
        raise ValueError(f"{clusters} clusters need as many frames, there are {len(points)}")
    draw = torch.Generator().manual_seed(seed)
    centres = points[torch.randperm(len(points), generator=draw)[:clusters]].clone()
    for _ in range(iterations):
        nearest = assign(points, centres)
        counts = torch.bincount(nearest, minlength=clusters)[:, None]
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        spare = points[torch.randint(len(points), (clusters,), generator=draw)]
        centres = torch.where(counts > 0, sums / counts.clamp(min=1), spare)
    return centres


def assign(points, centres):
    """Index of the nearest centre: (N, D), (K, D) -> (N,)."""
    half = centres.square().sum(1) / 2
    return torch.cat([(half - block @ centres.T).argmin(1) for block in points.split(BLOCK)])


def cepstral_views(features, bounds, number=3, num_mels=80, num_cepstra=13):
    """Up to three views of the spectrum around each frame, each to be clustered for itself.

    Cepstra with first and second differences; cepstra at -2, 0, +2 frames; cepstra of the two
    halves of the frame. Several clusterings name more of a frame than one can. Views are made
    when they are asked for, as those of all frames take more memory than there may be.

    Arguments
    ---------
    features : np.ndarray
        (N, stride * num_mels) stacked log-mels of all utterances, one after the other.
    bounds : list of (int, int)
        First frame and number of frames of every utterance; differences do not cross them.
    number : int
        Views.

    Returns
    -------
    callable
        (start, stop) -> list of `number` np.ndarray (stop - start, ·), float32, each kind of value
        with variance 1 over all N frames.
    """
    starts, counts = np.array(sorted(bounds)).T

    def unscaled(start, stop):
        # Differences of differences look two frames to either side.
        low, high = max(0, start - 2), min(len(features), stop + 2)
        mels = features[low:high].astype(np.float32).reshape(high - low, -1, num_mels)
        cepstra = dct(mels, axis=-1, norm="ortho")[..., :num_cepstra]
        at = np.arange(low, high)
        utterance = np.searchsorted(starts, at, side="right") - 1
        first = np.maximum(starts[utterance], low)
        last = np.minimum(starts[utterance] + counts[utterance], high) - 1

        def shifted(values, by):
            return values[np.clip(at + by, first, last) - low]

        middle = cepstra.mean(1)
        delta = shifted(middle, 1) - shifted(middle, -1)
        half = cepstra.shape[1] // 2 or 1
        views = [
            [middle, delta, shifted(delta, 1) - shifted(delta, -1)],
            [shifted(middle, -2), middle, shifted(middle, 2)],
            [cepstra[:, :half].mean(1), cepstra[:, -half:].mean(1)],
        ]
        inside = slice(start - low, stop - low)
        return [np.concatenate(view, axis=1)[inside] for view in views[:number]]

    sums, squares = [0.0] * number, [0.0] * number
    for block in blocks_of(len(features)):
        for index, view in enumerate(unscaled(*block)):
            sums[index] += view.sum(0, dtype=np.float64)
            squares[index] += np.square(view, dtype=np.float64).sum(0)
    spreads = [
        np.sqrt(np.maximum(square / len(features) - (total / len(features)) ** 2, 0))
        for total, square in zip(sums, squares, strict=True)
    ]

    def views_at(start, stop):
        views = zip(unscaled(start, stop), spreads, strict=True)
        return [view / (spread + 1e-5).astype(np.float32) for view, spread in views]

    return views_at


def cluster(views_at, frames, clusters, sample=150000, seed=0):
    """Codes by one k-means per view; the views are read block by block.

    Arguments
    ---------
    views_at : callable
        (start, stop) -> list of np.ndarray (stop - start, ·), one for each view.
    frames : int
        Of all, N.
    clusters : int
        Codes of each view.
    sample : int
        Frames, drawn at random, on which the centres are found.

    Returns
    -------
    np.ndarray
        (N, views) int16
    """
    drawn = np.random.default_rng(seed).permutation(frames)[:sample].copy()
    centres = [kmeans(points, clusters, seed=seed) for points in _points(views_at, frames, drawn)]
    codes = np.empty((frames, len(centres)), np.int16)
    for start, stop in blocks_of(frames):
        for book, view in enumerate(views_at(start, stop)):
            points = torch.from_numpy(view.astype(np.float32))
            codes[start:stop, book] = assign(points, centres[book]).numpy()
    return codes


def _points(views_at, frames, drawn):
    """Views of the drawn frames, in the order in which they were drawn: list of (drawn, ·)."""
    order = np.argsort(drawn)
    ascending = drawn[order]
    points = [torch.empty(len(drawn), view.shape[1]) for view in views_at(0, 1)]
    for start, stop in blocks_of(frames):
        first, last = np.searchsorted(ascending, (start, stop))
        for kept, view in zip(points, views_at(start, stop), strict=True):
            chosen = view[ascending[first:last] - start].astype(np.float32)
            kept[order[first:last]] = torch.from_numpy(chosen)
    return points


def warped(features, factor, num_mels=80, low=20.0, high=8000.0):
    """Log-mels of a voice whose frequencies are multiplied: another length of the vocal tract.

    Arguments
    ---------
    features : np.ndarray
        (N, stride * num_mels), float32
    factor : float
        Above 1 for higher frequencies; what comes from beyond the highest filter is that filter.
    low, high : float
        Of the filterbank, in Hz.

    Returns
    -------
    np.ndarray
        (N, stride * num_mels)
    """
    spread = np.log1p(np.array([low, high]) / 700)
    edges = np.linspace(*spread, num_mels + 2)
    centres = 700 * np.expm1(edges[1:-1]) / factor
    at = (np.log1p(centres / 700) - edges[1]) / (edges[1] - edges[0])
    mels = features.reshape(-1, num_mels)
    below = np.clip(np.floor(at), 0, num_mels - 2).astype(int)
    share = np.clip(at - below, 0, 1).astype(np.float32)
    mixing = np.zeros((num_mels, num_mels), np.float32)
    mixing[below, np.arange(num_mels)] += 1 - share
    mixing[below + 1, np.arange(num_mels)] += share
    return (mels @ mixing).reshape(features.shape)


def without_bands(features, count, width, num_mels=80):
    """Log-mels with bands set to zero, the mean: SpecAugment's frequency masks (Park et al., 2019).

    Arguments
    ---------
    features : np.ndarray
        (N, stride * num_mels), float32
    count : int
        Bands, which may overlap.
    width : int
        Of each from 0 to this many mels, drawn anew.

    Returns
    -------
    np.ndarray
        (N, stride * num_mels)
    """
    mels = features.reshape(-1, num_mels).copy()
    for _ in range(count):
        wide = random.randint(0, width)
        first = random.randint(0, num_mels - wide)
        mels[:, first : first + wide] = 0.0
    return mels.reshape(features.shape)


def random_projection(features, codebooks, codes, width=16, seed=0):
    """Codes of SpeechBrain's `RandomProjectionQuantizer`, one per codebook.

    Returns
    -------
    np.ndarray
        (N, codebooks) int16
    """
    found = np.empty((len(features), codebooks), np.int16)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for book in range(codebooks):
            quantizer = RandomProjectionQuantizer(features.shape[1], width, codes)
            # The nearest of normalised codes is the one with the largest product; the quantizer's
            # own forward takes every difference and with it 16 times the memory.
            for start, stop in blocks_of(len(features)):
                block = torch.from_numpy(features[start:stop].astype(np.float32))
                nearest = (block @ quantizer.P @ quantizer.CB.T).argmax(1)
                found[start:stop, book] = nearest.numpy()
    return found


def encoder_config(folder, key):
    """Configuration of an encoder that the setting `key` names; ValueError for another model."""
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:  # what is no folder is taken for a name on the hub
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(
            f"{key}={folder}: there is no encoder, of an earlier round say ({reason})"
        ) from None
    if config.model_type != "wav2vec2-bert":
        raise ValueError(f"{key}={folder}: expected a wav2vec2-bert, it is a {config.model_type}")
    return config


def check_teacher(teacher, layers, width):
    """Refuses an encoder without these layers, or that does not read `width` values a frame."""
    if not teacher:
        raise ValueError("teacher: for clusters of states, expected the folder of an encoder")
    config = encoder_config(teacher, "teacher")
    blocks, reads = config.num_hidden_layers, config.feature_projection_input_dim
    if not all(isinstance(layer, int) and 1 <= layer <= blocks for layer in layers):
        raise ValueError(f"teacher_layers={layers}: {teacher} has 1 to {blocks}")
    if reads != width:
        raise ValueError(f"teacher={teacher}: reads {reads} values a frame, expected {width}")


def states_of(
    teacher, features, bounds, layers, path, max_frames, workers=2, bf16=False, device="cpu"
):
    """States of some layers for all utterances, in a file that worker processes fill.

    The teacher hears utterances in the pieces in which it was trained: those of recordings of
    minutes as a whole would not fit into memory.

    Arguments
    ---------
    teacher : str
        Hugging Face folder of a `Wav2Vec2BertModel`.
    features : np.memmap
        (N, stride * num_mels), half precision.
    bounds : list of (int, int)
        As for `cepstral_views`.
    layers : list of int
        1 is the first block's output.
    path : str
        The file, (len(layers), N, hidden_size) float16; to be removed by the caller.
    max_frames : int
        Longer utterances are cut as by `cut_evenly`.
    workers : int
        Processes of one thread each. On a GPU this one does the work.
    bf16 : bool
        The teacher computes in it.
    device : str
        Where it computes.

    Returns
    -------
    np.memmap
        The file's content.
    """
    shape = len(layers), len(features), encoder_config(teacher, "teacher").hidden_size
    _allocate(path, 2 * math.prod(shape))
    states = np.memmap(path, np.float16, mode="r+", shape=shape)
    batches = [[]]
    for piece in sorted(cut_evenly(bounds, max_frames), key=lambda piece: piece[1]):
        if batches[-1] and piece[1] * (len(batches[-1]) + 1) > BLOCK // 10:
            batches.append([])
        batches[-1].append(piece)
    load = (teacher, features.filename, features.shape, tuple(layers), path, shape, device)
    _loaded.cache_clear()  # a file of this name may be another one now
    workers = workers if device == "cpu" else 1
    for _ in in_order(functools.partial(_keep_states, load, bf16), batches, workers):
        pass
    _loaded.cache_clear()  # nor is the teacher's memory needed
    return states


def _allocate(path, size):
    """A file with its place on the disk: one that is full later kills who writes to a mapping."""
    with open(path, "wb") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            os.unlink(path)
            what = f"{size / 1e9:.1f} GB for the teacher's states ({error.strerror})"
            raise OSError(error.errno, what, str(path)) from None


def relative_key_scores(module, query, key):
    """The query and its position scores, as Transformers' own function gives them; less work."""
    return query, relative_key_bias(module, query, key)


def with_cheap_positions():
    """Has Transformers' w2v-BERT of this process take `relative_key_scores`."""
    modeling_wav2vec2_bert._apply_relative_key_position_encoding = relative_key_scores


@functools.lru_cache(maxsize=1)  # once per process
def _loaded(teacher, features, features_shape, layers, path, shape, device):
    with_cheap_positions()
    model = Wav2Vec2BertModel.from_pretrained(teacher, dtype=torch.float32).eval()
    del model.encoder.layers[max(layers) :]
    model.to(device)
    features = np.memmap(features, np.float16, mode="r", shape=features_shape)
    return model, features, layers, np.memmap(path, np.float16, mode="r+", shape=shape)


@torch.inference_mode()
def _keep_states(load, bf16, batch):
    model, features, layers, states = _loaded(*load)
    size = len(batch), max(count for _, count in batch), features.shape[1]
    inputs, mask = torch.zeros(size), torch.zeros(size[:2], dtype=torch.long)
    for row, (start, count) in enumerate(batch):
        frames = features[start : start + count].astype(np.float32)
        inputs[row, :count] = torch.from_numpy(frames)
        mask[row, :count] = 1
    inputs, mask = inputs.to(model.device), mask.to(model.device)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
        outputs = model(input_features=inputs, attention_mask=mask, output_hidden_states=True)
    for index, layer in enumerate(layers):
        of_layer = outputs.hidden_states[layer].half().cpu().numpy()
        for row, (start, count) in enumerate(batch):
            states[index, start : start + count] = of_layer[row, :count]


def usage(codes, size):
    """Share of the codes that occur, and the entropy of their use in nats, per codebook.

    Arguments
    ---------
    codes : np.ndarray
        (N, codebooks)
    size : int
        Codes of each codebook.

    Returns
    -------
    list of dict
    """
    report = []
    for column in codes.T:
        share = np.bincount(column, minlength=size) / len(column)
        present = share[share > 0]
        entropy = -float((present * np.log(present)).sum())
        report.append({"used": len(present) / size, "entropy": round(entropy, 3)})
    return report

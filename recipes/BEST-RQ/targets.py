"""What is predicted at masked frames: codes of a random projection, or of clusters.

BEST-RQ: Chiu et al., arXiv 2202.01855. Clusters of cepstra, then of the model's own states: HuBERT,
Hsu et al., arXiv 2106.07447.
"""

import multiprocessing

import numpy as np
import torch
from scipy.fft import dct
from speechbrain.nnet.quantisers import RandomProjectionQuantizer
from transformers import Wav2Vec2BertConfig, Wav2Vec2BertModel

BLOCK = 20000  # frames at a time: bounds the memory of distances
_LOADED = {}  # what a worker process of states_of works with


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


def cepstral_views(features, bounds, num_mels=80, num_cepstra=13):
    """Three views of the spectrum around each frame, each to be clustered for itself.

    Cepstra with first and second differences; cepstra at -2, 0, +2 frames; cepstra of the two
    halves of the frame. Several clusterings name more of a frame than one can.

    Arguments
    ---------
    features : np.ndarray
        (N, stride * num_mels) stacked log-mels of all utterances, one after the other.
    bounds : list of (int, int)
        First frame and number of frames of every utterance; differences do not cross them.

    Returns
    -------
    list of np.ndarray
        (N, ·) float32, each kind of value with variance 1.
    """

    def cepstra_of(block):  # one block at a time in float32, and nothing of it kept but these
        mels = block.astype(np.float32).reshape(len(block), -1, num_mels)
        return dct(mels, axis=-1, norm="ortho")[..., :num_cepstra].copy()

    blocks = np.array_split(features, max(1, len(features) // BLOCK))
    cepstra = np.concatenate([cepstra_of(block) for block in blocks])
    first, last = np.zeros((2, len(features)), np.int64)
    for start, count in bounds:
        first[start : start + count] = start
        last[start : start + count] = start + count - 1
    at = np.arange(len(features))

    def shifted(values, by):
        return values[np.clip(at + by, first, last)]

    middle = cepstra.mean(1)
    delta = shifted(middle, 1) - shifted(middle, -1)
    half = cepstra.shape[1] // 2 or 1
    views = [
        [middle, delta, shifted(delta, 1) - shifted(delta, -1)],
        [shifted(middle, -2), middle, shifted(middle, 2)],
        [cepstra[:, :half].mean(1), cepstra[:, -half:].mean(1)],
    ]
    return [np.concatenate([v / (v.std(0) + 1e-5) for v in view], axis=1) for view in views]


def cluster(views, clusters, sample=150000, seed=0):
    """Codes by one k-means per view.

    Arguments
    ---------
    views : list of np.ndarray
        (N, ·) each.
    clusters : int
        Codes of each view.
    sample : int
        Frames, drawn at random, on which the centres are found.

    Returns
    -------
    np.ndarray
        (N, len(views)) int16
    """
    codes = []
    for view in views:
        points = torch.from_numpy(np.ascontiguousarray(view, dtype=np.float32))
        drawn = np.random.default_rng(seed).permutation(len(points))[:sample]
        codes.append(assign(points, kmeans(points[drawn], clusters, seed=seed)).numpy())
    return np.stack(codes, axis=1).astype(np.int16)


def random_projection(features, codebooks, codes, width=16, seed=0):
    """Codes of SpeechBrain's `RandomProjectionQuantizer`, one per codebook.

    Returns
    -------
    np.ndarray
        (N, codebooks) int16
    """
    found = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for _ in range(codebooks):
            quantizer = RandomProjectionQuantizer(features.shape[1], width, codes)
            # The nearest of normalised codes is the one with the largest product; the quantizer's
            # own forward takes every difference and with it 16 times the memory.
            blocks = np.array_split(features, max(1, len(features) // BLOCK))
            found.append(
                torch.cat(
                    [
                        (
                            torch.from_numpy(b.astype(np.float32)) @ quantizer.P @ quantizer.CB.T
                        ).argmax(1)
                        for b in blocks
                    ]
                )
            )
    return torch.stack(found, 1).numpy().astype(np.int16)


def states_of(teacher, features, bounds, layers, path, workers=2):
    """States of some layers for all utterances, in a file that worker processes fill.

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
    workers : int
        Processes of one thread each.

    Returns
    -------
    np.memmap
        The file's content.
    """
    config = Wav2Vec2BertConfig.from_pretrained(teacher)
    if not all(1 <= layer <= config.num_hidden_layers for layer in layers):
        raise ValueError(f"teacher_layers={layers}: {teacher} has {config.num_hidden_layers}")
    shape = len(layers), len(features), config.hidden_size
    states = np.memmap(path, np.float16, mode="w+", shape=shape)
    batches = [[]]
    for bound in sorted(bounds, key=lambda bound: bound[1]):
        if batches[-1] and bound[1] * (len(batches[-1]) + 1) > BLOCK // 10:
            batches.append([])
        batches[-1].append(bound)
    load = (teacher, features.filename, features.shape, layers, path, shape)
    if workers > 1:
        with multiprocessing.get_context("spawn").Pool(workers, _load_teacher, load) as pool:
            pool.map(_keep_states, batches, chunksize=8)
    else:
        _load_teacher(*load)
        for batch in batches:
            _keep_states(batch)
    return states


def _load_teacher(teacher, features, features_shape, layers, path, shape):
    if multiprocessing.parent_process() is not None:
        torch.set_num_threads(1)
    model = Wav2Vec2BertModel.from_pretrained(teacher, dtype=torch.float32).eval()
    del model.encoder.layers[max(layers) :]
    _LOADED["model"], _LOADED["layers"] = model, layers
    _LOADED["features"] = np.memmap(features, np.float16, mode="r", shape=features_shape)
    _LOADED["states"] = np.memmap(path, np.float16, mode="r+", shape=shape)


@torch.inference_mode()
def _keep_states(batch):
    size = len(batch), max(count for _, count in batch), _LOADED["features"].shape[1]
    inputs, mask = torch.zeros(size), torch.zeros(size[:2], dtype=torch.long)
    for row, (start, count) in enumerate(batch):
        frames = _LOADED["features"][start : start + count].astype(np.float32)
        inputs[row, :count] = torch.from_numpy(frames)
        mask[row, :count] = 1
    outputs = _LOADED["model"](
        input_features=inputs, attention_mask=mask, output_hidden_states=True
    )
    for index, layer in enumerate(_LOADED["layers"]):
        for row, (start, count) in enumerate(batch):
            state = outputs.hidden_states[layer][row, :count]
            _LOADED["states"][index, start : start + count] = state.half().numpy()


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

"""What is predicted at masked frames: codes of a random projection, or of clusters.

BEST-RQ: Chiu et al., arXiv 2202.01855. Clusters of cepstra, then of the model's own states: HuBERT,
Hsu et al., arXiv 2106.07447.
"""

import numpy as np
import torch
from scipy.fft import dct
from speechbrain.nnet.quantisers import RandomProjectionQuantizer

BLOCK = 20000  # frames at a time: bounds the memory of distances


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
    blocks = np.array_split(features, max(1, len(features) // BLOCK))
    mels = [block.astype(np.float32).reshape(len(block), -1, num_mels) for block in blocks]
    cepstra = np.concatenate([dct(b, axis=-1, norm="ortho")[..., :num_cepstra] for b in mels])
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


@torch.inference_mode()
def states_of(model, features, bounds, layer, max_frames=3000):
    """The states of one layer for all utterances, as half precision.

    Arguments
    ---------
    model : transformers.Wav2Vec2BertModel
        The teacher; in eval mode.
    features, bounds
        As for `cepstral_views`.
    layer : int
        1 is the first block's output.

    Returns
    -------
    np.ndarray
        (N, hidden_size) float16
    """
    states = np.zeros((len(features), model.config.hidden_size), np.float16)
    blocks = model.encoder.layers
    model.encoder.layers = blocks[:layer]
    batch = []
    for index, bound in enumerate(sorted(bounds, key=lambda bound: bound[1])):
        batch.append(bound)
        longest = batch[-1][1]
        if longest * (len(batch) + 1) <= max_frames and index < len(bounds) - 1:
            continue
        inputs = torch.zeros(len(batch), longest, features.shape[1])
        mask = torch.zeros(len(batch), longest, dtype=torch.long)
        for row, (start, count) in enumerate(batch):
            frames = features[start : start + count].astype(np.float32)
            inputs[row, :count] = torch.from_numpy(frames)
            mask[row, :count] = 1
        hidden = model(input_features=inputs, attention_mask=mask).last_hidden_state
        for row, (start, count) in enumerate(batch):
            states[start : start + count] = hidden[row, :count].half().numpy()
        batch = []
    model.encoder.layers = blocks
    return states


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

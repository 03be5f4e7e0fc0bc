"""Light probes: what a linear layer can read from sets of states, all sets trained at once.

Probing layers one by one: Alain & Bengio, arXiv 1610.01644; of speech encoders: Pasad et al., ASRU
2021. Here every set of states has a linear map of its own, and all of them are trained on the same
batches, in one pass over stored states.
"""

import random
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from speechbrain.decoders import ctc_greedy_decode
from torch import nn

from hff_modules.data.batches import by_length
from hff_modules.data.loading import needed_frames
from hff_modules.data.text import Units, error_rates

Batch = tuple[torch.Tensor, torch.Tensor, list]  # states (L, B, T, D), lengths (B,), rows


class ProbeBank(nn.Module):
    """A linear map for each of several sets of states; all start at zero.

    The states of a set of ``n`` count ``n ** -0.5`` each, so that large sets learn as fast as small
    ones.

    Arguments
    ---------
    sets : Sequence[Sequence[int]]
        Positions of the states that each probe reads.
    width : int
        Of a state.
    outputs : int

    Example
    -------
    >>> bank = ProbeBank([[0], [0, 2]], width=8, outputs=5)
    >>> bank(torch.randn(3, 4, 6, 8)).shape
    torch.Size([2, 4, 6, 5])
    """

    def __init__(self, sets: Sequence[Sequence[int]], width: int, outputs: int):
        super().__init__()
        longest = max(len(chosen) for chosen in sets)
        index = torch.zeros(len(sets), longest, dtype=torch.long)
        there = torch.zeros(len(sets), longest, 1, 1)
        for row, chosen in enumerate(sets):
            index[row, : len(chosen)] = torch.tensor(list(chosen))
            there[row, : len(chosen)] = len(chosen) ** -0.5
        self.register_buffer("index", index)
        self.register_buffer("there", there)
        self.weight = nn.Parameter(torch.zeros(len(sets), longest, width, outputs))
        self.bias = nn.Parameter(torch.zeros(len(sets), 1, outputs))

    def start_from(self, other: "ProbeBank", row: int) -> None:
        """Let every probe begin with another bank's, whose states are the first of its own."""
        slots, scale = other.weight.shape[1], other.there[row, 0] / self.there[:, :1]
        with torch.no_grad():
            self.weight[:, :slots] = scale * other.weight[row]
            self.bias.copy_(other.bias[row].expand_as(self.bias))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Apply every probe.

        Arguments
        ---------
        states : torch.Tensor
            (num_states, batch, frames, width).

        Returns
        -------
        torch.Tensor
            (probes, batch, frames, outputs).
        """
        _, batch, frames, width = states.shape
        flat, outputs = states.reshape(len(states), batch * frames, width), self.bias
        for slot in range(self.index.shape[1]):
            weight = self.weight[:, slot] * self.there[:, slot]
            outputs = outputs + torch.bmm(flat[self.index[:, slot]], weight)
        return outputs.view(len(self.index), batch, frames, -1)


class WeightedSumProbe(nn.Module):
    """One linear map on a weighted sum of all states (SUPERB, arXiv 2105.01051); as a bank of one.

    Arguments
    ---------
    num_states, width, outputs : int
    """

    def __init__(self, num_states: int, width: int, outputs: int):
        super().__init__()
        self.scores = nn.Parameter(torch.zeros(num_states))
        self.map = nn.Linear(width, outputs)
        nn.init.zeros_(self.map.weight)
        nn.init.zeros_(self.map.bias)

    def layer_weights(self) -> list[float]:
        """What each state counts; they sum to one."""
        return self.scores.detach().softmax(0).tolist()

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """As for :class:`ProbeBank`, with one probe."""
        return self.map(torch.einsum("l,lbtd->btd", self.scores.softmax(0), states)).unsqueeze(0)


class CTCTask:
    """What probes learn for speech recognition.

    Arguments
    ---------
    units : CharUnits | SentencePieceUnits
    """

    name, scores = "asr", ("cer", "wer")

    def __init__(self, units: Units):
        self.units, self.outputs = units, units.size
        self.content = list(units.vocab_list)  # what tells it from another task on the same speech

    def usable(self, row: Mapping, frames: int) -> bool:
        """Whether an utterance has enough frames for its targets."""
        return 0 < needed_frames(self.units.encode(row["wrd"])) <= frames

    def read(self, states: torch.Tensor) -> torch.Tensor:
        """All frames of an utterance (frames, num_states, width)."""
        return states

    def losses(
        self, outputs: torch.Tensor, lengths: torch.Tensor, rows: Sequence[Mapping]
    ) -> tuple[torch.Tensor, int]:
        """Sum of each probe's CTC losses (probes,), and over how many units."""
        probes, batch, frames, _ = outputs.shape
        targets = [torch.tensor(self.units.encode(row["wrd"])) for row in rows]
        sizes = torch.tensor([len(target) for target in targets])
        padded = nn.utils.rnn.pad_sequence(targets, batch_first=True)
        total = nn.functional.ctc_loss(
            outputs.flatten(0, 1).log_softmax(-1).transpose(0, 1),
            padded.repeat(probes, 1).to(outputs.device),
            lengths.repeat(probes),
            sizes.repeat(probes),
            blank=self.units.blank_index,
            reduction="none",
            zero_infinity=True,
        )
        return total.view(probes, batch).sum(1), int(sizes.sum())

    def answers(self, outputs: torch.Tensor, lengths: torch.Tensor) -> list[list[str]]:
        """What each probe reads from each utterance, by the best path."""
        relative = lengths.to(outputs.device) / outputs.shape[2]
        blank = self.units.blank_index
        return [
            [self.units.decode(ids) for ids in ctc_greedy_decode(probe, relative, blank_id=blank)]
            for probe in outputs
        ]

    def score(self, answers: Sequence[str], rows: Sequence[Mapping]) -> dict[str, float]:
        """CER and WER in percent."""
        return error_rates([row["wrd"] for row in rows], answers)


class LabelTask:
    """What probes learn for classes of utterances: softmax on the mean of the frames.

    Arguments
    ---------
    labels : Mapping[str, Sequence[str]]
        Classes of each column of the manifest.
    """

    name, scores = "classification", ("accuracy",)

    def __init__(self, labels: Mapping[str, Sequence[str]]):
        self.labels = {slot: {name: n for n, name in enumerate(v)} for slot, v in labels.items()}
        self.sizes = [len(names) for names in self.labels.values()]
        self.outputs = sum(self.sizes)
        self.content = self.labels

    def usable(self, row: Mapping, frames: int) -> bool:
        """Whether all classes of an utterance are known."""
        return all(row[slot] in names for slot, names in self.labels.items())

    def read(self, states: torch.Tensor) -> torch.Tensor:
        """The mean of an utterance's frames, as one frame (1, num_states, width)."""
        return states.float().mean(0, keepdim=True)

    def _targets(self, rows: Sequence[Mapping]) -> torch.Tensor:
        return torch.tensor([[names[r[slot]] for slot, names in self.labels.items()] for r in rows])

    def losses(
        self, outputs: torch.Tensor, lengths: torch.Tensor, rows: Sequence[Mapping]
    ) -> tuple[torch.Tensor, int]:
        """Sum of each probe's cross-entropies (probes,), and over how many utterances."""
        del lengths
        targets = self._targets(rows).to(outputs.device)
        parts = outputs[:, :, 0].split(self.sizes, dim=-1)
        total = sum(
            nn.functional.cross_entropy(
                part.transpose(1, 2), targets[:, n].expand(len(part), -1), reduction="none"
            )
            for n, part in enumerate(parts)
        )
        return total.sum(1), len(rows)

    def answers(self, outputs: torch.Tensor, lengths: torch.Tensor) -> list[list[tuple[int, ...]]]:
        """The classes that each probe finds for each utterance."""
        del lengths
        best = [part.argmax(-1) for part in outputs[:, :, 0].split(self.sizes, dim=-1)]
        return [[tuple(row) for row in probe] for probe in torch.stack(best, -1).tolist()]

    def score(self, answers: Sequence[tuple[int, ...]], rows: Sequence[Mapping]):
        """Share of utterances with all classes right, in percent."""
        truth = [tuple(row) for row in self._targets(rows).tolist()]
        right = sum(a == t for a, t in zip(answers, truth, strict=True))
        return {"accuracy": 100 * right / len(truth)}


Task = CTCTask | LabelTask


class StoredSpeech:
    """Utterances of a data set as standardised states, in batches of similar length.

    Arguments
    ---------
    rows : Sequence[Mapping]
        Of a manifest, with ``wav`` and ``duration``.
    read : Callable
        Gives the states of an audio file, (frames, num_states, width).
    task : CTCTask | LabelTask
    batch_seconds : float
    device : torch.device | str

    Raises
    ------
    ValueError
        No utterance is usable.
    """

    def __init__(
        self,
        rows: Sequence[Mapping],
        read: Callable[[str], torch.Tensor],
        task: Task,
        batch_seconds: float = 10.0,
        device: torch.device | str = "cpu",
    ):
        self.task, self.device, self.read = task, device, read
        self.shift = self.scale = None
        self._means: dict[str, torch.Tensor] = {}
        rows = [row for row in rows if task.usable(row, len(read(row["wav"])))]
        if not rows:
            raise ValueError(f"no utterance can be used to probe layers for {task.name}")
        self.batches = list(by_length(rows, lambda row: row["duration"], batch_seconds))

    def standardise_like(self, other: "StoredSpeech") -> None:
        """Shift and scale every dimension of every state as in another set."""
        self.shift, self.scale = other.shift, other.scale

    def standardise(self, frames: int = 20000) -> None:
        """Find out mean and deviation of every dimension of every state, on some utterances."""
        some = self.some_frames(frames)
        self.shift = some.mean(1)[:, None, None].to(self.device)
        self.scale = some.std(1)[:, None, None].clamp(min=1e-4).to(self.device)

    def some_frames(self, least: int) -> torch.Tensor:
        """States (num_states, frames, width) of batches drawn evenly; always the same."""
        found, count = [], 0
        for states, lengths, _ in self.epoch(seed=0):
            valid = torch.arange(states.shape[2]).unsqueeze(0) < lengths.unsqueeze(1)
            found.append(states.cpu()[:, valid])
            count += int(lengths.sum())
            if count >= least:
                break
        return torch.cat(found, dim=1)

    def load(self, rows: Sequence[Mapping]) -> Batch:
        """Read a batch."""
        states = [self._states(row["wav"]) for row in rows]
        lengths = torch.tensor([len(one) for one in states])
        padded = nn.utils.rnn.pad_sequence(states, batch_first=True).to(self.device)
        padded = padded.permute(2, 0, 1, 3)
        if self.shift is not None:
            padded = (padded - self.shift) / self.scale
        return padded, lengths, list(rows)

    def _states(self, wav: str) -> torch.Tensor:
        if wav in self._means:
            return self._means[wav]
        states = self.task.read(self.read(wav)).float()
        if isinstance(self.task, LabelTask):
            self._means[wav] = states  # small, and reading the frames is all the work there is
        return states

    def epoch(self, seed: int | None = None) -> Iterable[Batch]:
        """All batches, shuffled with a seed."""
        order = list(range(len(self.batches)))
        if seed is not None:
            random.Random(seed).shuffle(order)
        for number in order:
            yield self.load(self.batches[number])


def train_probes(
    probes: Sequence[nn.Module], train: StoredSpeech, epochs: int, lr: float = 0.01
) -> None:
    """Train banks of probes, all on the same batches.

    Arguments
    ---------
    probes : Sequence[torch.nn.Module]
        Banks; (num_states, batch, frames, width) -> (probes, batch, frames, outputs).
    train : StoredSpeech
        Standardised.
    epochs : int
    lr : float
        Of Adam; falls to a twentieth. Layer weights learn three times faster.
    """
    groups = [{"params": [], "lr": lr}, {"params": [], "lr": 3 * lr}]
    for probe in probes:
        for name, parameter in probe.to(train.device).named_parameters():
            groups[name == "scores"]["params"].append(parameter)
    optimizer = torch.optim.Adam([group for group in groups if group["params"]])
    steps = epochs * len(train.batches)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: max(1 - n / steps, 0.05))
    for epoch in range(epochs):
        for states, lengths, rows in train.epoch(seed=epoch):
            outputs = torch.cat([probe(states) for probe in probes])
            total, count = train.task.losses(outputs, lengths, rows)
            optimizer.zero_grad()
            # A sum over probes: each gets the gradient that it would get alone.
            (total.sum() / count).backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def score_probes(probes: Sequence[nn.Module], dev: StoredSpeech) -> list[dict[str, float]]:
    """Loss (per unit, or per utterance) and scores in percent of every probe of every bank."""
    losses, counts, answers, truth = 0, 0, None, []
    for states, lengths, rows in dev.epoch():
        outputs = torch.cat([probe(states) for probe in probes])
        total, count = dev.task.losses(outputs, lengths, rows)
        losses, counts = losses + total, counts + count
        found = dev.task.answers(outputs, lengths)
        answers = found if answers is None else [a + f for a, f in zip(answers, found, strict=True)]
        truth += rows
    return [
        {"loss": float(loss) / counts, **dev.task.score(answer, truth)}
        for loss, answer in zip(losses, answers, strict=True)
    ]


@torch.no_grad()
def linear_cka(states: torch.Tensor) -> list[list[float]]:
    """Linear centred kernel alignment between states: 1 for the same up to rotation and scale.

    Kornblith et al., ICML 2019 (arXiv 1905.00414). Not debiased: independent states have about
    width / (width + frames), which is much where a task has one state for each utterance.

    Arguments
    ---------
    states : torch.Tensor
        (num_states, frames, width).

    Returns
    -------
    list[list[float]]
        Symmetric, num_states x num_states.
    """
    centred = states - states.mean(1, keepdim=True)
    # In double precision: the norms of later layers differ by orders of magnitude.
    centred = centred.double() / centred.double().norm(dim=(1, 2), keepdim=True).clamp(min=1e-12)
    count = len(centred)
    shared = torch.zeros(count, count, dtype=torch.float64)
    for i in range(count):
        for j in range(i, count):
            shared[i, j] = shared[j, i] = (centred[i].T @ centred[j]).square().sum()
    own = shared.diagonal().sqrt().clamp(min=1e-12)
    return (shared / own / own.unsqueeze(1)).tolist()

"""One pass of an encoder for many exported models: what they have in common is computed once.

Models without adapters read the states of one pass. A model whose adapters begin above layer ``h``
starts from state ``h`` of that pass, and only the layers above are run for it once more.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hff_modules import adapters
from hff_modules.cache import as_stored
from hff_modules.encoder import SSLEncoder
from hff_modules.export_format import ExportError, describe_encoder, find_folder, read_manifest
from hff_modules.exported import Exported, base_encoder, load_exported, only


class MultiTask:
    """Exported models that share an encoder, by the names of their tasks.

    Gives what each of them gives alone. One call at a time: not to be called from two threads.

    Arguments
    ---------
    encoder : SSLEncoder, optional
        What the models were made on; it selects at least their layers. None: it is loaded from
        where the models say that it is. Their adapters are attached to it, switched off.
    tasks : Mapping[str, str | Path]
        Folder, or name on the Hugging Face hub, of each exported model.
    device : str
        Where to run.
    base : str, optional
        Another place of their encoder than the models name: hub name or folder.

    Raises
    ------
    ExportError
        Not an exported model, or models that were made on different encoders.

    Example
    -------
    >>> model = MultiTask(None, {"asr": "my_model", "emotion": "other"})     # doctest: +SKIP
    >>> model(wavs, wav_lens)["asr"][0]["text"]                              # doctest: +SKIP
    'HELLO WORLD'
    >>> model(wavs, wav_lens, tasks=[["asr"], ["asr", "emotion"]])           # doctest: +SKIP
    """

    def __init__(
        self,
        encoder: SSLEncoder | None,
        tasks: Mapping[str, str | Path],
        device: str = "cpu",
        base: str | None = None,
    ):
        wrong = [name for name in tasks if not re.fullmatch(r"[A-Za-z0-9_-]+", name)]
        if wrong or not tasks:
            raise ExportError(
                f"tasks are named {sorted(tasks)}: expected one or more names of letters, digits, "
                "- and _"
            )
        self.device = torch.device(device)
        folders = {task: find_folder(source) for task, source in tasks.items()}
        manifests = {task: read_manifest(folder) for task, folder in folders.items()}
        given = encoder is not None or base is not None
        if encoder is None:
            encoder = _shared_encoder(folders, manifests, base, self.device)
        self.encoder = encoder.to(self.device).eval()
        self.tasks: dict[str, Exported] = {}
        for task, folder in folders.items():
            if not given:
                _check_base(encoder, task, folders, manifests)
            model = load_exported(folder, device, self.encoder, name=task)
            for name in model.adapters:  # on only while its task is at work
                adapters.disable(self.encoder, name)
            self.tasks[task] = model

    @torch.no_grad()
    def __call__(
        self,
        wavs: torch.Tensor,
        wav_lens: torch.Tensor | None = None,
        tasks: str | Sequence[str] | Sequence[Sequence[str]] | None = None,
    ) -> dict[str, list[Any]]:
        """Give results by task.

        Arguments
        ---------
        wavs : torch.Tensor
            (batch, samples), 16 kHz, -1 to 1.
        wav_lens : torch.Tensor, optional
            (batch,), valid share of each row; all valid by default.
        tasks : str | Sequence[str] | Sequence[Sequence[str]], optional
            Name of a task, names for all utterances, or a list of names for each utterance; all
            tasks by default.

        Returns
        -------
        dict[str, list]
            For each task what :meth:`hff_modules.exported.Exported.finish` gives for each
            utterance; None for those that it was not asked for.

        Raises
        ------
        KeyError
            For a task that is not there.
        ValueError
            For lists of tasks that are not as many as the utterances, or an utterance too short.
        """
        rows = self._rows(tasks, len(wavs))
        wavs = wavs.to(self.device)
        if wav_lens is None:
            wav_lens = torch.ones(len(wavs))
        wav_lens = wav_lens.to(self.device)
        found: dict[str, list[Any]] = {task: [None] * len(wavs) for task in rows}
        for task, answers in self._answers(wavs, wav_lens, rows):
            for row, answer in zip(rows[task], answers, strict=True):
                found[task][row] = answer
        return found

    def _rows(self, tasks, batch: int) -> dict[str, list[int]]:
        """Utterances that each task is asked for."""
        if tasks is None:
            tasks = list(self.tasks)
        tasks = [tasks] if isinstance(tasks, str) else list(tasks)
        if all(isinstance(task, str) for task in tasks):
            tasks = [tasks] * batch
        if len(tasks) != batch:
            raise ValueError(f"{len(tasks)} lists of tasks were given for {batch} utterances")
        rows: dict[str, list[int]] = {}
        for row, names in enumerate(tasks):
            for task in dict.fromkeys([names] if isinstance(names, str) else names):
                if task not in self.tasks:
                    raise KeyError(f"there is no task {task!r}; there are {', '.join(self.tasks)}")
                rows.setdefault(task, []).append(row)
        return rows

    def _answers(
        self, wavs: torch.Tensor, wav_lens: torch.Tensor, rows: Mapping[str, list[int]]
    ) -> Iterator[tuple[str, list[Any]]]:
        shared = [task for task in rows if self.tasks[task].horizon >= 0]
        for task in rows.keys() - shared:  # not even what enters layer 1 is the plain encoder's
            yield task, self.tasks[task](wavs[rows[task]], wav_lens[rows[task]])
        if not shared:
            return
        needed = {number for task in shared for number in self._needed(task)}
        states, lengths = self.encoder.base_states(wavs, wav_lens, sorted(needed))
        for group in self._groups(shared, rows, len(wavs)):
            upper = self._go_on(group, rows, states, lengths)
            for task in group:
                every = len(rows[task]) == len(wavs)
                chosen = slice(None) if every else torch.tensor(rows[task], device=self.device)
                model, own_lengths = self.tasks[task], lengths[chosen]
                frames = int(own_lengths.max())
                own = [
                    (states[number][chosen] if number <= model.horizon else upper[task][number])
                    for number in model.layers
                ]
                own = torch.stack([state[:, :frames] for state in own])
                yield task, model.finish(model.outputs(own, own_lengths), own_lengths)

    def _needed(self, task: str) -> list[int]:
        """States of the plain encoder that a task reads or starts from."""
        model = self.tasks[task]
        below = [number for number in model.layers if number <= model.horizon]
        return below if len(below) == len(model.layers) else [*below, model.horizon]

    def _groups(
        self, tasks: Sequence[str], rows: Mapping[str, list[int]], most: int
    ) -> list[list[str]]:
        """Tasks that go on in one pass, with adapters that differ by utterance.

        No more than ``most`` utterances in a pass, so that it needs no more memory than the first.
        """
        groups: list[list[str]] = []
        for task in tasks:
            for group in groups:
                size = sum(len(rows[other]) for other in [*group, task])
                if self._kind(task) == self._kind(group[0]) is not None and size <= most:
                    group.append(task)
                    break
            else:
                groups.append([task])
        return groups

    def _kind(self, task: str) -> int | None:
        """The horizon of tasks that can go on together; None for those that cannot."""
        model = self.tasks[task]
        by_row = all(self.encoder.adapters[name].switched_by_row for name in model.adapters)
        return model.horizon if by_row and max(model.layers) > model.horizon else None

    def _go_on(
        self,
        group: Sequence[str],
        rows: Mapping[str, list[int]],
        states: Mapping[int, torch.Tensor],
        lengths: torch.Tensor,
    ) -> dict[str, dict[int, torch.Tensor]]:
        """States above the horizon by task and layer, for the utterances of each task."""
        horizon = self.tasks[group[0]].horizon
        layers = sorted({n for task in group for n in self.tasks[task].layers if n > horizon})
        if not layers:
            return {}
        start = []
        for task in group:
            state, stored_as = states[horizon][rows[task]], self.tasks[task].stored_as
            start.append(state if stored_as is None else as_stored(state, stored_as))
        everyone = [row for task in group for row in rows[task]]
        names = [self.tasks[task].adapters for task in group for _ in rows[task]]
        with only(self.encoder, {name for own in names for name in own}):
            upper = self.encoder.go_on(torch.cat(start), lengths[everyone], horizon, layers, names)
        sizes = [len(rows[task]) for task in group]
        parts = {number: state.split(sizes) for number, state in upper.items()}
        return {task: {n: parts[n][i] for n in layers} for i, task in enumerate(group)}


def _shared_encoder(
    folders: Mapping[str, Path],
    manifests: Mapping[str, dict],
    base: str | None,
    device: torch.device,
) -> SSLEncoder:
    """The encoder of the model that reads the highest layer, with the layers of all of them."""
    layers = sorted({number for manifest in manifests.values() for number in manifest["layers"]})
    highest = next(task for task in manifests if max(manifests[task]["layers"]) == layers[-1])
    one, precision = highest, manifests[highest]["encoder"]["precision"]
    for other, manifest in manifests.items():
        if manifest["encoder"]["precision"] != precision:
            raise ExportError(
                f"{one!r} ({folders[one]}) was made with the encoder in {precision}, {other!r} "
                f"({folders[other]}) in {manifest['encoder']['precision']}; give the encoder to use"
            )
    return base_encoder(folders[highest], {**manifests[highest], "layers": layers}, base, device)


def _check_base(
    encoder: SSLEncoder, task: str, folders: Mapping[str, Path], manifests: Mapping[str, dict]
) -> None:
    """Refuse a model that was not made on the encoder of the others."""
    base = manifests[task]["encoder"]
    if encoder.fingerprint_up_to(max(manifests[task]["layers"])) == base["fingerprint"]:
        return
    highest = max(manifests, key=lambda other: max(manifests[other]["layers"]))
    raise ExportError(
        f"{task!r} ({folders[task]}) and {highest!r} ({folders[highest]}) were made on different "
        f"encoders: {describe_encoder(base)} and {describe_encoder(manifests[highest]['encoder'])}"
    )

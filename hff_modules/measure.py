"""What was trained, how fast, with how much memory, how well: results and the short table."""

import importlib.metadata
import json
import platform
import resource
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from speechbrain.utils.distributed import is_distributed_initialized
from torch import nn

from hff_modules.files import write_atomically
from hff_modules.tables import SCORES, score_title, unit


def count_parameters(modules: Mapping[str, nn.Module]) -> dict[str, int]:
    """Count parameters; one that several modules share counts once.

    Arguments
    ---------
    modules : Mapping[str, nn.Module]
        Everything that runs, with the head under the name ``head``; what is behind it and left
        after training under the name ``classifier``.

    Returns
    -------
    dict[str, int]
        ``trainable_encoder_parameters`` (encoder, adapters and fusion, not the head, as the papers
        count), ``trainable_parameters``, ``total_parameters``.
    """
    everything = {id(p): p for m in modules.values() for p in m.parameters()}
    behind = [modules[name] for name in ("head", "classifier") if name in modules]
    head = {id(p) for module in behind for p in module.parameters()}
    trained = {key: p.numel() for key, p in everything.items() if p.requires_grad}
    return {
        "trainable_encoder_parameters": sum(n for key, n in trained.items() if key not in head),
        "trainable_parameters": sum(trained.values()),
        "total_parameters": sum(p.numel() for p in everything.values()),
    }


class Meter:
    """Time, speech and memory of training; survives a resumed run as part of the checkpoint.

    Example
    -------
    >>> meter = Meter("cpu")
    >>> meter.add_step(0.5, audio_seconds=30.0)
    >>> meter.train_seconds = 0.6
    >>> meter.summary()["audio_seconds_per_second"]
    50.0
    """

    def __init__(self, device: str):
        self.on_cuda = str(device).startswith("cuda")
        self.device = torch.cuda.get_device_name() if self.on_cuda else "cpu"  # the GPU's name
        distributed = is_distributed_initialized()
        self.processes = torch.distributed.get_world_size() if distributed else 1
        self.steps: list[float] = []
        self.audio_seconds = 0.0
        self.train_seconds = 0.0
        self.alone_seconds = 0.0  # of them, those of fusion and head alone
        self.peak_memory_mb = 0.0
        self.epochs = 0
        self.history: list[dict[str, float]] = []  # of each epoch: time so far, scores on dev

    def add_step(self, seconds: float, audio_seconds: float) -> None:
        """Note one training step (forward, backward, update; without loading) and its speech."""
        self.steps.append(round(seconds, 6))
        self.audio_seconds += audio_seconds

    def join(self) -> None:
        """What is trained in the encoder joins: steps from now on are those of the method."""
        self.steps.clear()
        self.audio_seconds, self.alone_seconds = 0.0, self.train_seconds

    def reset_peak(self) -> None:
        """Forget memory peaks from before, so that training's own is measured."""
        if self.on_cuda:
            torch.cuda.reset_peak_memory_stats()
            return
        try:
            Path("/proc/self/clear_refs").write_text(
                "5"
            )  # Linux: peak resident set := the present one
        except OSError:
            pass  # then the peak of the whole process counts

    def read_peak(self) -> None:
        """Keep the highest peak seen so far."""
        if self.on_cuda:
            peak = torch.cuda.max_memory_allocated() / 2**20
        else:
            peak = _peak_resident_mb()
        self.peak_memory_mb = max(self.peak_memory_mb, peak)

    def synchronize(self) -> None:
        """Wait for the GPU, so that a step's time is its own."""
        if self.on_cuda:
            torch.cuda.synchronize()

    def summary(self) -> dict[str, float | None]:
        """Give the fields of ``results.json`` that are measured in training."""
        seconds = self.train_seconds - self.alone_seconds
        speed = self.audio_seconds / seconds if seconds else None
        return {
            "train_seconds": round(self.train_seconds, 2),
            "step_seconds": round(statistics.median(self.steps), 5) if self.steps else None,
            "audio_seconds_per_second": round(speed, 2) if speed is not None else None,
            "peak_memory_mb": round(self.peak_memory_mb, 1),
            "processes": self.processes,
            "device": self.device,
        }

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint."""
        return {k: v for k, v in vars(self).items() if k != "on_cuda"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        vars(self).update(state)


def _peak_resident_mb() -> float:
    # Not getrusage first: its ru_maxrss starts at that of the process that started this one.
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


PACKAGES = ("torch", "torchaudio", "speechbrain", "transformers")


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that decide about results."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def write_results(path: str | Path, results: Mapping[str, Any]) -> None:
    """Write ``results.json``."""
    write_atomically(path, json.dumps(results, indent=2, ensure_ascii=False) + "\n")


def table(results: Mapping[str, Any]) -> str:
    """Say in a few lines what was trained, how fast, with how much memory and how well.

    Arguments
    ---------
    results : Mapping[str, Any]
        As in ``results.json``.

    Returns
    -------
    str
    """
    encoder = f"{results['encoder']}, layers {', '.join(map(str, results['layers']))}"
    total = results["total_parameters"] or 1
    rows = [
        ("method", results["method"]),
        ("encoder", encoder),
        ("horizon", f"layer {results['horizon']}: nothing at or below it is trained"),
        ("trained, encoder + fusion", f"{results['trainable_encoder_parameters']:,}"),
        (
            "trained, with the head",
            f"{results['trainable_parameters']:,} of {total:,} parameters"
            f" ({100 * results['trainable_parameters'] / total:.2f} %)",
        ),
        ("training", f"{results['train_seconds']:.1f} s, {results['epochs']} epochs"),
    ]
    if results["step_seconds"]:
        speed = results["audio_seconds_per_second"]
        step = f"{results['step_seconds'] * 1000:.1f} ms median"
        rows.append(("step", f"{step}, {speed:.1f} s of speech per second"))
    rows.append(("peak memory", f"{results['peak_memory_mb']:.0f} MB"))
    for name, scores in results["test"].items():
        numbers = ", ".join(
            f"{score_title(key)} {value:.{2 if unit(key) else 4}f}{unit(key)}"
            for key, value in scores.items()
            if key in SCORES
        )
        rows.append((f"test {name}", numbers))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)

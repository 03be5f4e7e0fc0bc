"""Features of a data set on disk, for others: fused ones of an exported model, or chosen states.

    python -m hff_modules.dump my_model data.csv features/                       # fused
    python -m hff_modules.dump facebook/wav2vec2-base speech/ features/ --layers 3,6,9
    python -m hff_modules.dump my_model speech/ features.h5 --states --dtype fp16

One NumPy file for each utterance, or one HDF5 archive (needs h5py: the extra ``features``) if the
target ends in ``.h5``. Each has an utterance's own frames and no padding: (frames, width), or
(num_states, frames, width). ``features.json`` in the folder, or the archive's attribute
``features``, says what they are. What is there is not computed again: a run that was stopped goes
on with the same command.
"""

import argparse
import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from tqdm import tqdm
from transformers.utils import cached_file

from hff_modules.cli import default_device, run, usable_device
from hff_modules.data.audio import AudioError, audio_info, read_audio
from hff_modules.data.batches import by_length, padded
from hff_modules.data.manifest import read_rows
from hff_modules.encoder import SSLEncoder
from hff_modules.export_format import MANIFEST
from hff_modules.exported import load_exported
from hff_modules.files import read_json, write_atomically
from hff_modules.frontend import SAMPLE_RATE
from hff_modules.layers import LayerSpec
from hff_modules.recordings import (
    STDIN,
    Failure,
    Recording,
    find_recordings,
)
from hff_modules.source import hash_tensors

ABOUT = "features.json"
DTYPES = {"fp32": numpy.float32, "fp16": numpy.float16}
Compute = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class DumpError(ValueError):
    """Features that cannot be written as asked."""


def features_of(
    source: str, states: bool = False, layers: LayerSpec = "all", **options: Any
) -> tuple[Compute, dict[str, Any], SSLEncoder]:
    """Give what computes features, and what they are.

    Arguments
    ---------
    source : str
        Exported model (a folder, or a name on the hub), or an encoder as :class:`SSLEncoder` takes
        it.
    states : bool
        Of an exported model, its states instead of the fused features.
    layers : str | int | Sequence[int]
        Of an encoder.
    **options
        ``device``; ``base`` and ``revision`` as for :func:`load_exported`; ``precision``.

    Returns
    -------
    tuple[Callable, dict[str, Any], SSLEncoder]
        A function from waveforms (batch, samples) and relative lengths to features (batch, ...,
        frames, width) and valid frames; a description, JSON-able; the encoder.
    """
    device = usable_device(options.get("device", "cpu"))
    if _is_exported(source):
        if layers != "all":
            raise DumpError(f"layers={layers!r}: the layers of an exported model are its own")
        model = load_exported(
            source, device, base=options.get("base"), revision=options.get("revision")
        )
        encoder, chosen = model.encoder, model.layers
        what = "states" if states else "fused"
        about = {"model": model.manifest["method"], "task": model.task}
        about |= {"trained": hash_tensors(model.tensors())[:16], "stored_as": model.stored_as}

        def compute(wavs, wav_lens):
            found, lengths = model.states(wavs.to(device), wav_lens.to(device))
            return (found.transpose(0, 1) if states else model.features(found, lengths)), lengths

    else:
        encoder = SSLEncoder(
            source,
            layers=layers,
            precision=options.get("precision", "fp32"),
            revision=options.get("revision"),
        )
        encoder = encoder.to(device).eval()
        chosen, what, about = encoder.layers, "states", {}

        @torch.no_grad()
        def compute(wavs, wav_lens):
            found, lengths = encoder(wavs.to(device), wav_lens.to(device))
            return found.transpose(0, 1), lengths

    manifest = encoder.manifest()
    about |= {
        "what": what,
        "layers": chosen,
        "frame_rate": encoder.frame_rate,
        "encoder": {k: manifest[k] for k in ("source", "revision", "fingerprint")},
        "precision": encoder.precision,
        "axes": ["frames", "width"] if what == "fused" else ["num_states", "frames", "width"],
    }
    return compute, about, encoder


def _is_exported(source: str) -> bool:
    if Path(source).is_dir():
        return (Path(source) / MANIFEST).is_file()
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        return False  # builtin, logmel, or a folder that is not there
    try:  # a name on the hub may be of either kind
        found = cached_file(
            source,
            MANIFEST,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        return found is not None
    except (OSError, ValueError):  # said by whoever loads it
        return False


class Folder:
    """One NumPy file for each utterance, written whole or not at all."""

    def __init__(self, path: Path, about: dict[str, Any]):
        self.path, file = path, path / ABOUT
        if file.is_file():
            _check_same(file, read_json(file), about)
        elif path.is_dir() and any(path.iterdir()):
            raise DumpError(f"{path} is not empty and has no {ABOUT}; give another folder")
        write_atomically(file, json.dumps(about, indent=2, ensure_ascii=False) + "\n")

    def _file(self, name: str) -> Path:
        return self.path / f"{name}.npy"  # with_suffix would cut a name with a dot

    def frames(self, name: str) -> int | None:
        """Frames of an utterance that is done; None if it is not."""
        path = self._file(name)
        return numpy.load(path, mmap_mode="r").shape[-2] if path.is_file() else None

    def write(self, name: str, features: numpy.ndarray) -> None:
        """Write one utterance's."""
        content = io.BytesIO()
        numpy.save(content, features)
        write_atomically(self._file(name), content.getvalue())

    def __enter__(self) -> "Folder":
        return self

    def __exit__(self, *error) -> None:
        pass


class Archive:
    """One HDF5 file with a data set for each utterance; under its name when all of it is there.

    Until then each utterance is a file in the folder ``<name>.unfinished``: a kill cannot damage
    what is done, and the next run goes on from there. Both together take twice the space at the
    end.
    """

    def __init__(self, path: Path, about: dict[str, Any]):
        try:
            import h5py
        except ImportError:
            raise DumpError(
                f"{path}: HDF5 needs h5py; pip install 'hff-modules[features]', or give a folder"
            ) from None
        self.h5py, self.path, self.about = h5py, path, about
        self.there: dict[str, int] = {}  # frames by name
        if path.exists():
            self._look()
        folder = path.with_name(f"{path.name}.unfinished")
        if folder.is_file():
            raise DumpError(f"{folder} is a file, of an older version perhaps; delete or rename it")
        self.folder = Folder(folder, about)

    def _look(self) -> None:
        try:
            with self.h5py.File(self.path) as file:
                written = file.attrs.get("features")
                if written is None:
                    raise DumpError(f"{self.path} holds no features; give another target")
                _check_same(self.path, json.loads(written), self.about)
                file.visititems(self._note)
        except OSError as error:
            raise DumpError(f"{self.path} is no HDF5 file ({error}); give another target") from None

    def _note(self, name: str, thing: Any) -> None:
        if hasattr(thing, "shape"):
            self.there[name] = thing.shape[-2]

    def frames(self, name: str) -> int | None:
        """Frames of an utterance that is done."""
        return self.there.get(name, self.folder.frames(name))

    def write(self, name: str, features: numpy.ndarray) -> None:
        """Write one utterance's."""
        self.folder.write(name, features)

    def __enter__(self) -> "Archive":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is None:
            if not self.path.exists() or any(self.folder.path.rglob("*.npy")):
                self._pack()
            for path in self.folder.path.iterdir():
                if path.name != ABOUT:  # last: it says whose folder it is
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            shutil.rmtree(self.folder.path)

    def _pack(self) -> None:
        handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}.")
        os.close(handle)
        try:
            if self.path.exists():
                shutil.copyfile(self.path, name)
            else:
                os.unlink(name)
            with self.h5py.File(name, "a") as file:
                file.attrs["features"] = json.dumps(self.about, ensure_ascii=False)
                for path in sorted(self.folder.path.rglob("*.npy")):
                    key = str(path.relative_to(self.folder.path).with_suffix(""))
                    if key not in file:
                        file.create_dataset(key, data=numpy.load(path))
            os.chmod(name, 0o644)
            os.replace(name, self.path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


def _check_same(path: Path, written: dict[str, Any], about: dict[str, Any]) -> None:
    # Where an encoder lies may change: the fingerprint tells what it is.
    what, there = (
        {**one, "encoder": one.get("encoder", {}).get("fingerprint")} for one in (about, written)
    )
    differing = [key for key in {**what, **there} if there.get(key) != what.get(key)]
    if differing:
        key = differing[0]
        raise DumpError(
            f"{path} holds other features: {key} is {written.get(key)!r} there and "
            f"{about.get(key)!r} now; give another target"
        )


def dump(
    source: str,
    data: str,
    target: str | Path,
    data_root: str | Path | None = None,
    dtype: str = "fp32",
    batch_seconds: float = 60.0,
    progress: bool = True,
    **options: Any,
) -> list[Failure]:
    """Write the features of a data set.

    Arguments
    ---------
    source, **options
        As for :func:`features_of`.
    data : str
        Manifest (``.csv``), whose IDs name the utterances; or a folder, file or pattern: then they
        are named by their path without its ending.
    target : str | Path
        Folder, or a file that ends in ``.h5`` or ``.hdf5``.
    data_root : str | Path, optional
        What ``$data_root`` stands for in the manifest; its own folder by default.
    dtype : str
        "fp32" or "fp16".
    batch_seconds : float
        Longest batch, padding included.
    progress : bool
        Show a bar, on standard error if that is a terminal.

    Returns
    -------
    list[Failure]
        What could not be read; each has been said on standard error.
    """
    if dtype not in DTYPES:
        raise DumpError(f"dtype={dtype!r}: expected one of {', '.join(DTYPES)}")
    found = list(_utterances(data, data_root))
    failures = [one for one in found if isinstance(one, Failure)]
    found = [one for one in found if isinstance(one, Recording)]
    target = Path(target)
    kind = Archive if target.suffix in (".h5", ".hdf5") else Folder
    _check_names(found, nested=kind is Archive)
    compute, about, encoder = features_of(source, **options)
    most = encoder.maximum_samples
    for one in [one for one in found if most and one.seconds * SAMPLE_RATE > most]:
        found.remove(one)
        said = f"{one.seconds:.1f} s, but this encoder reads {most / SAMPLE_RATE:.0f} s at most"
        failures.append(Failure(one.name, said))
    hidden = None if progress else True  # None: a bar in a terminal, nothing in a log file
    with kind(target, about | {"dtype": dtype}) as place:
        todo = [one for one in found if not _is_done(one, place, target, encoder)]
        seconds = round(sum(one.seconds for one in todo))
        with tqdm(total=seconds, unit=" s", desc="features", disable=hidden) as bar:
            for batch in by_length(todo, lambda one: one.seconds, batch_seconds):
                signals = {}
                for one in batch:
                    try:
                        signals[one] = read_audio(one.path)
                    except AudioError as error:
                        failures.append(Failure(one.name, str(error)))
                for one, features in _computed(compute, signals, encoder.minimum_samples):
                    place.write(str(one.place), _as(dtype, features))
                bar.update(round(sum(one.seconds for one in batch)))
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    return failures


def _utterances(data: str, data_root: str | Path | None) -> Iterator[Recording | Failure]:
    if data == STDIN:
        raise DumpError("data: expected a manifest, a folder, a file or a pattern, not -")
    if not data.endswith(".csv"):
        yield from find_recordings([data])
        return
    root = Path(data).parent if data_root is None else data_root
    for name, row in read_rows(data, root, columns=("ID", "duration", "wav")).items():
        try:
            yield Recording(name, Path(row["wav"]), Path(name), audio_info(row["wav"]).duration)
        except AudioError as error:
            yield Failure(name, str(error))


def _is_done(one: Recording, place: Folder | Archive, target: Path, encoder: SSLEncoder) -> bool:
    frames = place.frames(str(one.place))
    if frames is None:
        return False
    samples = max(round(one.seconds * SAMPLE_RATE), encoder.minimum_samples)
    expected = int(encoder.count_frames(torch.tensor([samples]))[0])
    if abs(frames - expected) > 2 + 0.02 * expected:  # headers of lossy files only estimate
        raise DumpError(
            f"{target} has {one.place} with {frames} frames, but {one.path} gives {expected}: "
            "other audio of the same name; give another target"
        )
    return True


def _check_names(recordings: Sequence[Recording], nested: bool) -> None:
    seen: dict[Path, Recording] = {}
    for one in recordings:
        if one.place.is_absolute() or ".." in one.place.parts:
            raise DumpError(
                f"{one.place}: a name that leads out of the target; give a manifest with other IDs"
            )
        if one.place in seen:
            raise DumpError(
                f"{seen[one.place].name} and {one.name} would both be called {one.place}; give a "
                "manifest with an ID for each"
            )
        seen[one.place] = one
    for place, one in seen.items() if nested else ():
        for parent in place.parents:
            if parent in seen:
                raise DumpError(
                    f"{seen[parent].name} and {one.name}: in an archive nothing can be called "
                    f"{parent} and hold {place}, too; give a folder as target"
                )


def _as(dtype: str, features: numpy.ndarray) -> numpy.ndarray:
    if dtype == "fp16":  # an overflow would come back as infinity
        features = features.clip(-65504, 65504)
    return features.astype(DTYPES[dtype])


def _computed(
    compute: Compute, signals: dict[Recording, torch.Tensor], minimum: int
) -> Iterator[tuple[Recording, numpy.ndarray]]:
    if not signals:
        return
    features, frames = compute(*padded(list(signals.values()), minimum))
    for one, row, count in zip(signals, features.cpu(), frames.tolist(), strict=True):
        yield one, row[..., :count, :].numpy()


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m hff_modules.dump", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("source", help="exported model, or an encoder: a folder or hub name")
    parser.add_argument("data", help="manifest (.csv), folder, file or pattern")
    parser.add_argument("target", help="folder, or a file that ends in .h5")
    parser.add_argument("--states", action="store_true", help="a model's states, not fused")
    parser.add_argument("--layers", default="all", help="of an encoder, such as 3,6,9 or last:4")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--data-root", help="what $data_root stands for in the manifest")
    parser.add_argument("--batch-seconds", type=float, default=60.0)
    parser.add_argument("--device", default=default_device(), help="such as cpu or cuda:0")
    parser.add_argument("--encoder", dest="base", help="another place of a model's base encoder")
    parser.add_argument("--revision", help="on the hub")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    options = vars(parser.parse_args(argv))
    options["progress"] = not options.pop("quiet")
    if dump(**options):
        sys.exit(1)


if __name__ == "__main__":
    run(main)

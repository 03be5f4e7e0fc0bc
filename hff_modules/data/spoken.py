"""The built-in corpus: real English sentences, spoken by espeak-ng in many voices; no network.

It is there so that everything can be tried and tested in minutes on any machine. The speech is
synthetic: error rates on it say nothing about real speech. Voices and sentences are disjoint
between train, dev and test.
"""

import contextlib
import hashlib
import importlib.util
import json
import logging
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hff_modules.data.manifest import summarize_manifest, write_manifest

logger = logging.getLogger(__name__)

VERSION = 1
SAMPLE_RATE = 16000
STAMP = "corpus.json"
SPLITS = ("train", "dev", "test")
SENTENCES = Path(__file__).with_name("sentences.txt")

# (accent, variant) of espeak-ng. Left out: variants with breath noise (f2, f3, whisper, ...), which
# differ from run to run, and effects and robots. Variants that sound alike (m5 and m6; Reed and
# david; Nguyen and m7) are all in train.
VOICES = {
    "train": (
        ("en-us", "f1"),
        ("en-us", "m1"),
        ("en", "f4"),
        ("en", "m2"),
        ("en-us", "linda"),
        ("en-us", "m3"),
        ("en", "Andrea"),
        ("en-gb-x-rp", "m4"),
        ("en-us", "aunty"),
        ("en-gb-scotland", "m5"),
        ("en-us", "grandma"),
        ("en-us", "m6"),
        ("en", "zac"),
        ("en-us", "m7"),
        ("en-gb-x-rp", "m8"),
        ("en-us", "Mike"),
        ("en-us", "Reed"),
        ("en", "david"),
        ("en-us", "Denis"),
        ("en", "quincy"),
        ("en-us", "Nguyen"),
        ("en-us", "boris"),
    ),
    "dev": (
        ("en-us", "belinda"),
        ("en-us", "robert"),
        ("en", "anika"),
        ("en", "miguel"),
    ),
    "test": (
        ("en-us", "steph"),
        ("en-us", "gustave"),
        ("en", "Annie"),
        ("en", "norbert"),
        ("en-us", "shelby"),
        ("en-us", "ian"),
    ),
}


def read_sentences() -> list[str]:
    """The sentences of the corpus, in the order of the file."""
    lines = SENTENCES.read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def transcript(sentence: str) -> str:
    """A sentence as LibriSpeech writes it: capitals, apostrophes, single spaces.

    Example
    -------
    >>> transcript("A good night's sleep, please.")
    "A GOOD NIGHT'S SLEEP PLEASE"
    """
    return " ".join(re.sub(r"[^A-Z' ]", " ", sentence.upper()).split())


def plan(seed: int, counts: dict[str, int]) -> list[dict]:
    """Who says what, and how: one job per voice.

    Arguments
    ---------
    seed : int
        Seed of everything that is drawn.
    counts : dict
        Utterances of each split.

    Returns
    -------
    list of dict
        ``split``, ``speaker``, ``accent``, ``variant``, ``parameters`` and ``items``.
    """
    sentences = read_sentences()
    random.Random(seed).shuffle(sentences)
    tenth = len(sentences) // 10
    pools = {"dev": sentences[:tenth], "test": sentences[tenth : 3 * tenth]}
    pools["train"] = sentences[3 * tenth :]
    jobs = []
    for split in SPLITS:
        # A generator for each split: another size of one leaves the others as they are.
        generator = random.Random(f"{seed} {split}")
        voices = [
            {
                "split": split,
                "speaker": f"{split}-{number:02d}-{variant.lower()}",
                "accent": accent,
                "variant": variant,
                "parameters": {
                    "rate": generator.randint(110, 150),
                    "pitch": generator.randint(35, 65),
                    "range": generator.randint(35, 70),
                    "volume": 60,  # well below espeak's own clipping
                },
                "sample_rate": SAMPLE_RATE,
                "items": [],
            }
            for number, (accent, variant) in enumerate(VOICES[split])
        ]
        pool: list[str] = []
        for index in range(counts[split]):
            if not pool:
                pool = generator.sample(pools[split], len(pools[split]))
            voice = voices[index % len(voices)]
            voice["items"].append(
                {
                    "id": f"{voice['speaker']}-{index:04d}",
                    "text": pool.pop(),
                    "level_db": round(generator.uniform(-30, -20), 2),
                    "snr_db": round(generator.uniform(20, 45), 2),
                    "noise_seed": generator.getrandbits(32),
                }
            )
        jobs += [voice for voice in voices if voice["items"]]
    return jobs


def prepare_spoken(
    folder: str | os.PathLike,
    seed: int = 1234,
    train: int = 660,
    dev: int = 54,
    test: int = 90,
    num_workers: int | None = None,
) -> dict[str, Path]:
    """Make the built-in corpus, unless it is there already.

    The folder gets ``{train,dev,test}.csv``, ``wavs/`` and ``corpus.json``. It appears in one step
    when all is spoken; an older or half-made corpus is replaced.

    Arguments
    ---------
    folder : str or path
        Where the corpus is or shall be; it is the ``data_root`` of the manifests.
    seed : int
        Seed of who says what, and how. The same seed gives the same bytes on a machine.
    train, dev, test : int
        Number of utterances of each split, about 3.4 s each.
    num_workers : int, optional
        Processes that speak at the same time; default: one per available core.

    Returns
    -------
    dict
        Manifest of each split: ``{"train": folder/train.csv, ...}``.

    Raises
    ------
    ImportError
        The package espeakng-loader is not installed.
    FileExistsError
        The folder holds something else than a corpus of ours.
    RuntimeError
        espeak-ng failed; the message has what it said.

    Example
    -------
    >>> folder = getfixture("tmpdir") / "spoken"
    >>> manifests = prepare_spoken(folder, train=2, dev=1, test=1)
    >>> print(manifests["train"].read_text().splitlines()[0])
    ID,duration,wav,spk_id,wrd
    """
    folder = Path(folder).absolute()
    counts = {"train": train, "dev": dev, "test": test}
    if min(counts.values()) < 1:
        raise ValueError(f"every split needs an utterance, got {counts}")
    options = {
        "version": VERSION,
        "seed": seed,
        "utterances": counts,
        "content": hashlib.sha256(SENTENCES.read_bytes() + repr(VOICES).encode()).hexdigest()[:16],
    }
    manifests = {split: folder / f"{split}.csv" for split in SPLITS}
    if _is_complete(folder, options):
        return manifests
    _check_ours(folder)
    if importlib.util.find_spec("espeakng_loader") is None:
        raise ImportError("the built-in corpus is spoken by espeak-ng: pip install espeakng-loader")
    logger.info("Speaking the built-in corpus into %s, once; it takes some seconds", folder)
    start = time.monotonic()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        prefix=f".{folder.name}.", dir=folder.parent, ignore_cleanup_errors=True
    ) as temporary:
        made = Path(temporary) / "made"
        _speak_into(made, seed, counts, num_workers)
        options["bytes"] = _sizes(made)
        (made / STAMP).write_text(json.dumps(options, indent=1) + "\n", encoding="utf-8")
        # Another process may have been faster; then its corpus, equal to ours, stays.
        if folder.exists() and not _is_complete(folder, options):
            os.rename(folder, Path(temporary) / "old")
        with contextlib.suppress(OSError):
            os.rename(made, folder)
    if not _is_complete(folder, options):
        raise RuntimeError(f"{folder}: the spoken corpus could not be put there")
    logger.info(
        "Spoke the built-in corpus into %s in %.1f s; train: %s",
        folder,
        time.monotonic() - start,
        summarize_manifest(manifests["train"]),
    )
    return manifests


def _speak_into(made: Path, seed: int, counts: dict[str, int], num_workers: int | None) -> None:
    (made / "wavs").mkdir(parents=True)
    jobs = plan(seed, counts)
    for job in jobs:
        (made / "wavs" / job["speaker"]).mkdir()
        for item in job["items"]:
            item["path"] = str(made / "wavs" / job["speaker"] / f"{item['id']}.wav")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with ThreadPoolExecutor(num_workers or cores or 1) as pool:
        lengths = list(pool.map(_speak, jobs))
    for split in SPLITS:
        rows = [
            {
                "ID": item["id"],
                "duration": samples / SAMPLE_RATE,
                "wav": f"$data_root/wavs/{job['speaker']}/{item['id']}.wav",
                "spk_id": job["speaker"],
                "wrd": transcript(item["text"]),
            }
            for job, counted in zip(jobs, lengths, strict=True)
            if job["split"] == split
            for item, samples in zip(job["items"], counted, strict=True)
        ]
        write_manifest(made / f"{split}.csv", rows)


def _speak(job: dict) -> list[int]:
    script = Path(__file__).with_name("espeak.py")
    # By its path, not as a module: importing the whole package would take longer than speaking.
    done = subprocess.run(
        [sys.executable, "-P", str(script)],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )
    if done.returncode != 0:
        raise RuntimeError(
            f"espeak-ng failed for the voice {job['accent']}+{job['variant']} "
            f"(exit status {done.returncode}):\n{done.stderr.strip()}"
        )
    return json.loads(done.stdout.splitlines()[-1])


def _sizes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("wavs/*/*.wav")) + sum(
        (folder / f"{split}.csv").stat().st_size for split in SPLITS
    )


def _is_complete(folder: Path, options: dict) -> bool:
    try:
        stamp = json.loads((folder / STAMP).read_text(encoding="utf-8"))
        return stamp.pop("bytes") == _sizes(folder) and stamp == {
            key: value for key, value in options.items() if key != "bytes"
        }
    except (OSError, ValueError, KeyError):
        return False


def _check_ours(folder: Path) -> None:
    if folder.is_dir():
        strange = {path.name for path in folder.iterdir()} - {
            "wavs", STAMP, *(f"{split}.csv" for split in SPLITS)
        }  # fmt: skip
        if not strange:
            return
        found = ", ".join(sorted(strange)[:5])
        raise FileExistsError(f"{folder}: not a spoken corpus, it holds {found}; choose another")
    if folder.exists():
        raise FileExistsError(f"{folder}: this is a file; the spoken corpus needs a folder")

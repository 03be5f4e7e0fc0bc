"""Time and memory of one training step: our methods, full fine-tuning, and peers, in one run.

python benchmarks/training_step.py [--shape wav2vec2-base] [--batch 2] [--seconds 5] [--device cpu]

Every row is a process of its own that builds the encoder with random weights (speed does not depend
on them), takes steps of forward, CTC loss, backward and AdamW, and reports the median step; on a
CPU another process, in which freed memory is given back at once, reports the peak of memory above
that of the loaded model. Ratios are against full fine-tuning as SpeechBrain's own recipes do it:
its wrapper with ``freeze_feature_extractor=True``. Peers are used as their documentation shows,
with AdamW's defaults; our rows have the fused one of ``hparams/base/common.yaml``. w2v-BERT's log-
mels are given to peers that do not compute them.
"""

import argparse
import gc
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
import transformers
from torch import nn

from hff_modules import HierarchicalFusion, SSLEncoder, WeightedSum, adapters, plots
from hff_modules.cli import run
from hff_modules.files import write_atomically
from hff_modules.frontend import KaldiLogMel
from hff_modules.measure import Meter, versions, write_results

CONFIGS = {
    "wav2vec2-base": lambda: transformers.Wav2Vec2Config(),
    "wav2vec2-large": lambda: transformers.Wav2Vec2Config(
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
        conv_bias=True,
    ),
    "w2v-bert-2": lambda: transformers.Wav2Vec2BertConfig(),
}
UNITS = 32
BASELINE = "SpeechBrain full fine-tuning"
# glibc otherwise keeps some of what is freed, and the peak depends on chance.
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


class Step(nn.Module):
    """Encoder, fusion and a linear head; calling it gives a CTC loss."""

    def __init__(self, encoder: nn.Module, fusion: nn.Module, size: int):
        super().__init__()
        self.encoder, self.fusion, self.head = encoder, fusion, nn.Linear(size, UNITS)

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Loss for whatever the encoder reads."""
        log_probs = self.head(self.fusion(self.encoder(*inputs))).log_softmax(-1).transpose(0, 1)
        frames, batch = log_probs.shape[:2]
        targets = torch.randint(1, UNITS, (batch, frames // 5), device=log_probs.device)
        full = torch.full((batch,), frames), torch.full((batch,), targets.shape[1])
        return nn.functional.ctc_loss(log_probs, targets, *full)


class Fused(nn.Module):
    """A fusion of what ``SSLEncoder`` gives; the highest state without one."""

    def __init__(self, fusion: nn.Module | None = None):
        super().__init__()
        self.fusion = fusion

    def forward(self, given: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:  # noqa: D102
        states, lengths = given
        return states[-1] if self.fusion is None else self.fusion(states, lengths)


class OfHuggingFace(nn.Module):
    """A Hugging Face model by its last state or the stack of all; under ``no_grad`` if frozen."""

    def __init__(self, model: nn.Module, every_state: bool = False, frozen: bool = False):
        super().__init__()
        self.model, self.every_state, self.frozen = model, every_state, frozen
        if frozen:
            model.requires_grad_(False)

    def train(self, mode: bool = True) -> "OfHuggingFace":  # noqa: D102
        return super().train(mode and not self.frozen)  # no dropout in what is frozen

    def forward(self, wavs: torch.Tensor) -> torch.Tensor:  # noqa: D102
        with torch.set_grad_enabled(not self.frozen):
            out = self.model(wavs, output_hidden_states=self.every_state)
        return torch.stack(out.hidden_states) if self.every_state else out.last_hidden_state


def ours(
    layers="last:1", attached: dict | None = None, fused=False, precision="fp32", warm=False
) -> Callable:
    """A row of ours: adapters by method, hierarchical fusion or the last state, trunk precision."""

    def build(folder: Path, wavs: torch.Tensor):
        encoder = SSLEncoder(str(folder), layers, precision, pretrained=False).to(wavs.device)
        for method, options in (attached or {}).items():
            adapters.attach(encoder, method, **options)
        inputs = (wavs,)
        if warm:
            stored, _ = encoder.encode(wavs)
            inputs = (stored.half(), wavs.new_ones(len(wavs)))
        size = encoder.hidden_size
        fusion = HierarchicalFusion(len(encoder.layers), size, 256) if fused else None
        return Step(encoder, Fused(fusion), size), inputs

    return build


def trunk_alone(layers) -> Callable:
    """The truncated encoder's forward pass by Hugging Face itself, nothing trained."""

    def build(folder: Path, wavs: torch.Tensor):
        model = transformers.AutoModel.from_pretrained(with_weights(folder)).eval()
        model.requires_grad_(False)
        model.encoder.layers = model.encoder.layers[: max(layers)]
        return OfHuggingFace(model, frozen=True), inputs_for(folder, wavs)

    return build


def speechbrain_full(folder: Path, wavs: torch.Tensor):
    """SpeechBrain's wrapper as its wav2vec 2.0 recipes use it."""
    encoder = _speechbrain_wrapper(folder)
    return Step(encoder, nn.Identity(), encoder.config.hidden_size), (wavs,)


def speechbrain_houlsby(folder: Path, wavs: torch.Tensor):
    """SpeechBrain's Houlsby adapters on the feed-forwards and attention outputs."""
    from speechbrain.nnet.adapters import HoulsbyAdapterLinear

    layers = ["*.output_dense", "*.out_proj", "*.ffn*.output_dense", "*.linear_out"]
    return _speechbrain_adapted(
        folder, wavs, HoulsbyAdapterLinear, layers, {"projection_size": 256}
    )


def speechbrain_lora(folder: Path, wavs: torch.Tensor):
    """SpeechBrain's LoRA on queries and values, rank 8."""
    from speechbrain.nnet.adapters import LoRA

    layers = ["*.q_proj", "*.v_proj", "*.linear_q", "*.linear_v"]
    return _speechbrain_adapted(folder, wavs, LoRA, layers, {"rank": 8})


def speechbrain_weighted_sum(folder: Path, wavs: torch.Tensor):
    """SpeechBrain's ``WeightedSSLModel``, frozen."""
    from speechbrain.integrations.huggingface.weighted_ssl import WeightedSSLModel

    encoder = WeightedSSLModel(str(with_weights(folder)), str(folder), freeze=True)
    return Step(encoder, nn.Identity(), encoder.config.hidden_size), inputs_for(folder, wavs)


def peft_lora(folder: Path, wavs: torch.Tensor):
    """PEFT's LoRA on queries and values, rank 8."""
    from peft import LoraConfig, get_peft_model

    model = transformers.AutoModel.from_pretrained(with_weights(folder))
    targets = ["q_proj", "v_proj", "linear_q", "linear_v"]
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=8, target_modules=targets))
    step = Step(OfHuggingFace(model), nn.Identity(), model.config.hidden_size)
    return step, inputs_for(folder, wavs)


def s3prl_weighted_sum(folder: Path, wavs: torch.Tensor):
    """A frozen encoder under no_grad, all states, weighted sum: s3prl's way."""
    model = transformers.AutoModel.from_pretrained(with_weights(folder)).eval()
    size = model.config.hidden_size
    fusion = WeightedSum(model.config.num_hidden_layers + 1, size)
    step = Step(OfHuggingFace(model, every_state=True, frozen=True), fusion, size)
    return step, inputs_for(folder, wavs)


def inputs_for(folder: Path, wavs: torch.Tensor) -> tuple[torch.Tensor]:
    """What a Hugging Face model reads: samples, or the log-mels of its feature extractor."""
    if transformers.AutoConfig.from_pretrained(folder).model_type != "wav2vec2-bert":
        return (wavs,)
    num_samples = torch.full((len(wavs),), wavs.shape[1], device=wavs.device)
    return (KaldiLogMel().to(wavs.device)(wavs, num_samples)[0],)


def _speechbrain_wrapper(folder: Path):
    from speechbrain.integrations.huggingface.w2v_bert import W2VBert
    from speechbrain.integrations.huggingface.wav2vec2 import Wav2Vec2

    names = str(with_weights(folder)), str(folder)
    if transformers.AutoConfig.from_pretrained(folder).model_type == "wav2vec2-bert":
        return W2VBert(*names, freeze=False)  # there is no CNN to freeze
    return Wav2Vec2(*names, freeze=False, freeze_feature_extractor=True)


def _speechbrain_adapted(folder, wavs, kind, layers, settings):
    from speechbrain.nnet.adapters import AdaptedModel

    encoder = _speechbrain_wrapper(folder)
    size = encoder.config.hidden_size
    adapted = AdaptedModel(encoder, kind, target_layers=layers, adapter_kwargs=settings)
    return Step(adapted, nn.Identity(), size), (wavs,)


def with_weights(folder: Path) -> Path:
    """The peers load weights from disk: make them, random ones."""
    if not (folder / "model.safetensors").exists():
        config = transformers.AutoConfig.from_pretrained(folder)
        transformers.AutoModel.from_config(config).save_pretrained(folder)
    return folder


TPA, HOULSBY = {"bottleneck": 256}, {"bottleneck": 256}
ROWS: dict[str, Callable] = {
    BASELINE: speechbrain_full,
    "SpeechBrain Houlsby (r=256)": speechbrain_houlsby,
    "SpeechBrain LoRA (r=8)": speechbrain_lora,
    "SpeechBrain weighted sum, frozen": speechbrain_weighted_sum,
    "PEFT LoRA (r=8)": peft_lora,
    "s3prl-style weighted sum, frozen": s3prl_weighted_sum,
    "trunk forward alone, cut at 9": trunk_alone([3, 6, 9]),
    "fusion [3,6,9]": ours([3, 6, 9], fused=True),
    "fusion [3,6,9], trunk in bf16": ours([3, 6, 9], fused=True, precision="bf16"),
    "fusion [3,6,9], warm cache": ours([3, 6, 9], fused=True, warm=True),
    "TPA everywhere": ours("last:1", {"tpa": TPA}),
    "TPA everywhere + fusion": ours("every:3", {"tpa": TPA}, fused=True),
    "Houlsby everywhere": ours("last:1", {"houlsby": HOULSBY}),
    "TPA in 1-9, cut at 9": ours([9], {"tpa": TPA}),
    "TPA in 7-9, cut at 9": ours([9], {"tpa": {**TPA, "layers": "last:3"}}),
    "TPA in 7-9, warm cache": ours([9], {"tpa": {**TPA, "layers": "last:3"}}, warm=True),
    "LoRA (r=8)": ours("last:1", {"lora": {}}),
    "prefix (n=16)": ours("last:1", {"prefix": {}}),
    "BitFit": ours("last:1", {"bitfit": {}}),
    "our full fine-tuning": ours("last:1", {"full": {}}),
}

# Whose place a row of ours takes, not always with the same work: see README.md. A dash where no
# peer can: the prefixes of PEFT need a cache of past keys, which encoders do not have.
PEERS = {
    "fusion [3,6,9]": ["SpeechBrain weighted sum, frozen", "s3prl-style weighted sum, frozen"],
    "Houlsby everywhere": ["SpeechBrain Houlsby (r=256)"],
    "LoRA (r=8)": ["SpeechBrain LoRA (r=8)", "PEFT LoRA (r=8)"],
    "prefix (n=16)": [],
    "our full fine-tuning": [BASELINE],
}


def is_ours(row: str) -> bool:
    """Whether a row runs our code."""
    return ROWS[row].__qualname__.startswith("ours.")


def prepare(build: Callable, folder: Path, batch: int, seconds: float, device: str):
    """Model, inputs, and a meter that has seen the loaded model; how it is used is not seen yet."""
    meter = Meter(device)
    torch.manual_seed(0)
    model, inputs = build(folder, 0.1 * torch.randn(batch, int(16000 * seconds), device=device))
    model = model.to(device)
    for parameter in model.parameters():  # mapped files are not in memory until they are touched
        parameter.data = parameter.data.clone()
    gc.collect()
    meter.reset_peak()
    meter.read_peak()
    return model, inputs, meter


def median_seconds(call: Callable, steps: int, meter: Meter) -> float:
    """Of so many calls, and one more before them that warms up."""
    times = []
    for _ in range(steps + 1):
        meter.synchronize()
        start = time.perf_counter()
        call()
        meter.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def measure(row: str, folder: Path, batch: int, seconds: float, device: str, steps: int) -> dict:
    """Run one row in this process.

    Returns
    -------
    dict
        ``step_seconds`` (median) and ``memory_mb`` (peak of the steps above the loaded model).
    """
    model, inputs, meter = prepare(ROWS[row], folder, batch, seconds, device)
    loaded = meter.peak_memory_mb
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    fused = {"fused": True} if is_ours(row) else {}
    optimizer = torch.optim.AdamW(trained, lr=1e-4, **fused) if trained else None

    def step() -> None:
        out = model(*inputs)
        if optimizer is not None:
            optimizer.zero_grad()
            out.backward()
            optimizer.step()

    middle = median_seconds(step, steps, meter)
    meter.read_peak()
    return {
        "step_seconds": middle,
        "memory_mb": meter.peak_memory_mb - loaded,
        "trainable_parameters": sum(p.numel() for p in trained),
    }


def table(rows: dict[str, dict]) -> str:
    """Markdown: speed and memory against the baseline and peers; a row that failed says why."""
    heads = [
        "what",
        "step ms",
        "speed",
        "memory MB",
        "memory",
        "trained",
        "speed / memory of peers",
    ]
    lines = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for name, row in rows.items():
        if "error" in row:
            lines.append(f"| {name} | failed: {row['error']} |{' |' * (len(heads) - 2)}")
            continue
        speed, memory = _against(row, rows.get(BASELINE))
        beside = []
        for peer in PEERS.get(name, ()):
            faster, smaller = _against(row, rows.get(peer))
            beside += [f"{peer}: {faster} / {smaller}"] if faster else []
        if PEERS.get(name) == []:
            beside = ["—"]
        lines.append(
            f"| {name} | {1000 * row['step_seconds']:.0f} | {speed} | {row['memory_mb']:.0f} | "
            f"{memory} | {row['trainable_parameters']:,} | {'; '.join(beside)} |"
        )
    return "\n".join(lines)


def _against(row: dict, base: dict | None) -> tuple[str, str]:
    if base is None or "error" in base:
        return "", ""
    speed, memory = base["step_seconds"] / row["step_seconds"], row["memory_mb"] / base["memory_mb"]
    return f"× {speed:.2f}", f"{memory:.3f}"


def draw(rows: dict[str, dict], path: Path) -> None:
    """Plot memory over time of a step (needs matplotlib)."""
    points = [
        plots.Point(name, 1000 * row["step_seconds"], row["memory_mb"])
        for name, row in rows.items()
        if "error" not in row
    ]
    plots.scatter(points, path, "training step (ms)", "peak memory above the model (MB)")


def fill(readme: Path, name: str, text: str) -> None:
    """Put a table into the block of a Markdown file that names its JSON file, if there is one."""
    if readme.is_file():
        block = rf"(<!-- benchmark: {re.escape(name)} -->\n).*?(<!-- end of benchmark -->)"
        old = readme.read_text()
        new = re.sub(block, lambda found: f"{found[1]}\n{text}\n\n{found[2]}", old, flags=re.DOTALL)
        write_atomically(readme, new)


def in_own_process(script: str, row: str, folder: Path, settings: dict) -> dict:
    """Measure one row by ``script``, its memory apart; an error becomes a row."""
    result = _run(script, row, folder, settings, {})
    if settings["device"] == "cpu" and "error" not in result:
        apart = _run(script, row, folder, {**settings, "steps": 1}, GIVE_BACK)
        result = apart if "error" in apart else {**result, "memory_mb": apart["memory_mb"]}
    return result


def _add_round(row: dict, measured: dict) -> None:
    """Let the step be the median of the rounds so far: a busy minute spoils one of them."""
    if "error" not in measured:  # a round that failed is none; their number is in the results
        row["rounds"] = [*row.get("rounds", []), measured["step_seconds"]]
        row["step_seconds"] = statistics.median(row["rounds"])


def _run(script, row, folder, settings, variables):
    command = [sys.executable, script, "--one", row, "--folder", str(folder)]
    for key in ("batch", "seconds", "device", "steps"):
        command += [f"--{key}", str(settings[key])]
    environment = {**os.environ, **variables}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode == 0 and lines:
        return json.loads(lines[-1])
    return {"error": (done.stderr.strip().splitlines() or ["no output"])[-1][:120]}


def write_shape(shape: str, folder: Path) -> None:
    """Write configuration and feature extractor of an encoder; weights are made where needed."""
    config = CONFIGS[shape]()
    config.layerdrop = 0.0  # all of them compute all layers
    config.save_pretrained(folder)
    kind = transformers.Wav2Vec2FeatureExtractor
    if shape == "w2v-bert-2":
        kind = transformers.SeamlessM4TFeatureExtractor
    kind().save_pretrained(folder)


def parser_for(doc: str) -> argparse.ArgumentParser:
    """What the benchmarks of single rows are told."""
    parser = argparse.ArgumentParser(description=doc)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--shape", choices=list(CONFIGS), default="wav2vec2-base")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rows", nargs="*", help="names of the rows to measure, or parts of them")
    parser.add_argument("--output", default=None, help="JSON file; by default in results/")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    return parser


def chosen_rows(known: Iterable[str], asked: list[str] | None) -> list[str]:
    """Rows of these names, or with these parts in their names.

    Raises
    ------
    ValueError
        Nothing is called so.
    """
    known = list(known)
    wanted = asked or [""]
    unknown = [w for w in wanted if not any(w in row for row in known)]
    if unknown:
        raise ValueError(f"--rows {unknown[0]!r}: no such row; there are {', '.join(known)}")
    return [r for r in known if r in wanted or any(w not in known and w in r for w in wanted)]


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = parser_for(__doc__)
    parser.add_argument(
        "--rounds", type=int, default=1, help="times that all rows are gone through"
    )
    parser.add_argument("--draw", metavar="JSON", help="only draw, print and put into README.md")
    options = parser.parse_args(argv)
    if options.draw:
        path = Path(options.draw)
        rows = json.loads(path.read_text())["rows"]
        draw(rows, path.with_suffix(".png"))
        fill(path.with_name("README.md"), path.name, table(rows))
        print(table(rows))
        return
    settings = {key: getattr(options, key) for key in ("batch", "seconds", "device", "steps")}
    if options.one:
        print(json.dumps(measure(options.one, Path(options.folder), **settings)))
        return
    output = Path(options.output or f"results/{options.shape}-{options.device}.json")
    about = {"shape": options.shape, **settings, "threads": torch.get_num_threads()}
    rows: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as name:
        write_shape(options.shape, Path(name))
        for turn in range(options.rounds):
            for row in chosen_rows(ROWS, options.rows):
                if turn == 0:
                    rows[row] = in_own_process(__file__, row, Path(name), settings)
                    _add_round(rows[row], rows[row])
                elif "error" not in rows[row]:
                    _add_round(rows[row], _run(__file__, row, Path(name), settings, {}))
                print(f"{row}: {rows[row]}", flush=True)
                write_results(output, {**about, "rows": rows, "versions": versions()})
    if plots.available():
        draw(rows, output.with_suffix(".png"))
    if rows.keys() == ROWS.keys():
        fill(output.with_name("README.md"), output.name, table(rows))
    print(f"\n{table(rows)}\n\nin {output}")


if __name__ == "__main__":
    run(main)

import contextlib
import gc
import json
import math
import threading
import time

import numpy
import pytest
import ruamel.yaml
import soundfile
import torch

from hff_modules import analyze, plots
from hff_modules.auto_layers import Analysis, Limits, parse_auto, some
from hff_modules.brains import CTCBrain, train_ctc
from hff_modules.cache import CacheError, StateCache
from hff_modules.config import load_config
from hff_modules.data.text import CharUnits
from hff_modules.encoder import SSLEncoder
from hff_modules.heads import LinearHead
from hff_modules.probes import (
    CTCTask,
    LabelTask,
    ProbeBank,
    StoredSpeech,
    WeightedSumProbe,
    linear_cka,
    score_probes,
    train_probes,
)
from tests.test_classification import job as classification_job  # noqa: F401
from tests.test_classification import tones  # noqa: F401
from tests.test_speaker import job as speaker_job  # noqa: F401
from tests.test_speaker import voices  # noqa: F401
from tests.test_training import arguments, make_speech

LABELS = {"sort": ["a", "b", "c"]}


def classes(count=60, states=4, width=6, informative=2, noise=0.1):
    """Utterances whose class only one state tells, and each class in a direction of its own."""
    generator = torch.Generator().manual_seed(0)
    stored, rows = {}, []
    for number in range(count):
        frames = 3 + number % 4
        values = torch.randn(frames, states, width, generator=generator)
        values[:, informative] *= noise
        values[:, informative, number % 3] += 2
        stored[f"u{number}"] = values
        rows.append({"wav": f"u{number}", "duration": frames, "sort": "abc"[number % 3]})
    return rows, stored


def test_a_bank_gives_what_each_linear_map_gives_alone():
    torch.manual_seed(0)
    bank, states = ProbeBank([[0, 2], [1], [2, 0]], 5, 3), torch.randn(3, 2, 4, 5)
    with torch.no_grad():
        bank.weight.normal_()
        bank.bias.normal_()
    outputs = bank(states)
    for row, chosen in enumerate(([0, 2], [1], [2, 0])):
        expected = sum(states[k] @ bank.weight[row, slot] for slot, k in enumerate(chosen))
        expected = expected / len(chosen) ** 0.5 + bank.bias[row]
        torch.testing.assert_close(outputs[row], expected)


def test_probes_trained_together_are_those_trained_alone():
    rows, stored = classes()
    task = LabelTask(LABELS)

    def trained(*sets):
        speech = StoredSpeech(rows, stored.get, task, batch_seconds=20)
        speech.standardise()
        bank = ProbeBank(sets, 6, task.outputs)
        train_probes([bank], speech, epochs=2, lr=0.1)
        return bank.weight.detach()

    together = trained([0], [2], [3])
    torch.testing.assert_close(together[1:2], trained([2]))


def test_a_longer_bank_that_starts_from_another_gives_the_same_at_first():
    short, longer = ProbeBank([[1], [0]], 4, 2), ProbeBank([[0], [0, 2], [0, 1]], 4, 2)
    torch.manual_seed(0)
    with torch.no_grad():
        short.weight.normal_()
        short.bias.normal_()
    longer.start_from(short, 1)
    states = torch.randn(3, 2, 5, 4)
    for outputs in longer(states):
        torch.testing.assert_close(outputs, short(states)[1])


def test_the_informative_layer_has_the_best_probe_and_the_highest_weight():
    rows, stored = classes()
    task = LabelTask(LABELS)
    train = StoredSpeech(rows[:45], stored.get, task, batch_seconds=20)
    dev = StoredSpeech(rows[45:], stored.get, task, batch_seconds=20)
    train.standardise()
    dev.standardise_like(train)
    bank, total = ProbeBank([[0], [1], [2], [3]], 6, 3), WeightedSumProbe(4, 6, 3)
    train_probes([bank, total], train, epochs=20, lr=0.05)
    *scores, of_sum = score_probes([bank, total], dev)
    assert scores[2]["accuracy"] == 100 and of_sum["accuracy"] > 90
    assert max(s["accuracy"] for n, s in enumerate(scores) if n != 2) < 70
    weights = total.layer_weights()
    assert weights.index(max(weights)) == 2 and math.isclose(sum(weights), 1, rel_tol=1e-5)


def test_losses_and_scores_are_those_of_torch_on_each_utterance_alone():
    units = CharUnits.from_texts(["ABC"])
    task = CTCTask(units)
    rows = [{"wrd": "AB", "wav": "x"}, {"wrd": "C", "wav": "y"}]
    lengths = torch.tensor([6, 4])
    torch.manual_seed(0)
    outputs = torch.randn(3, 2, 6, units.size)
    total, count = task.losses(outputs, lengths, rows)
    assert count == 3
    for probe in range(3):
        expected = sum(
            torch.nn.functional.ctc_loss(
                outputs[probe, n, : lengths[n]].log_softmax(-1),
                torch.tensor(units.encode(row["wrd"])),
                lengths[n : n + 1].squeeze(),
                torch.tensor(len(row["wrd"])),
                blank=units.blank_index,
                reduction="sum",
            )
            for n, row in enumerate(rows)
        )
        torch.testing.assert_close(total[probe], expected)
    certain = torch.full((1, 1, 3, units.size), -9.0)
    for frame, unit in enumerate([*units.encode("AB"), units.blank_index]):
        certain[0, 0, frame, unit] = 9
    answers = task.answers(certain, torch.tensor([3]))
    assert answers == [["AB"]] and task.score(answers[0], rows[:1]) == {"cer": 0, "wer": 0}
    assert not task.usable({"wrd": "AAB"}, 3) and task.usable({"wrd": "AAB"}, 4)


def test_cka_is_one_for_rotations_and_scales_and_small_for_independent_states():
    torch.manual_seed(0)
    state = torch.randn(400, 8)
    rotation, _ = torch.linalg.qr(torch.randn(8, 8))
    cka = linear_cka(torch.stack([state, 3 * state @ rotation + 5, torch.randn(400, 8)]))
    assert cka[0][1] == pytest.approx(1) and cka[2][2] == pytest.approx(1)
    assert cka[0][2] == cka[2][0] < 0.1
    # The definition, with Gram matrices of the frames.
    x, y = state - state.mean(0), torch.tensor(cka[0][2])
    other = torch.stack([state, torch.relu(state)])
    z = torch.relu(state) - torch.relu(state).mean(0)
    gram, gram_z = x @ x.T, z @ z.T
    expected = (gram * gram_z).sum() / gram.norm() / gram_z.norm()
    assert linear_cka(other)[0][1] == pytest.approx(float(expected), rel=1e-4) and y < 1


@pytest.fixture(scope="module")
def analysis(encoder_folder, tmp_path_factory):
    """All layers of a tiny encoder on tones."""
    folder = tmp_path_factory.mktemp("speech")
    make_speech(folder, 12)
    lines = (folder / "train.csv").read_text().splitlines()[1:]
    rows = [
        {"wav": f"{folder}/{name}.wav", "duration": float(duration), "wrd": text}
        for name, duration, _, _, text in (line.split(",") for line in lines)
    ]
    encoder, task = SSLEncoder(encoder_folder), CTCTask(CharUnits.from_texts(["ABC A"]))
    settings = {"epochs": 4, "train_minutes": 1, "dev_minutes": 1}
    return Analysis(encoder, task, rows[:9], rows[9:], settings, folder / "cache")


def test_probes_are_made_where_the_states_are(analysis, monkeypatch):
    monkeypatch.setattr(analysis.train, "device", torch.device("meta"))  # in place of a GPU
    assert {t.device.type for t in analysis.bank([[1], [1, 2]]).state_dict().values()} == {"meta"}


def test_a_report_has_every_layer_and_is_drawn_in_a_picture_and_a_page(analysis, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    report = analysis.report()
    assert report["layers"] == [0, 1, 2, 3, 4]
    assert [probe.keys() for probe in report["probes"]] == [{"layer", "loss", "cer", "wer"}] * 5
    assert len(report["cka"]) == 5 and sum(report["weighted_sum"]["weights"]) == pytest.approx(1)
    report["auto"] = analysis.choose("auto:2")
    analyze.write_report(report, tmp_path)
    assert json.loads((tmp_path / "layers.json").read_text()) == json.loads(json.dumps(report))
    page = (tmp_path / "layers.html").read_text()
    assert page.count("data:image/png;base64,") == 1 and "weight in a sum" in page
    verdict = report["auto"]["verdict"].removeprefix("on dev")
    assert verdict in page and verdict in capsys.readouterr().out


def test_without_matplotlib_a_report_has_no_picture(analysis, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plots, "available", lambda: False)
    analyze.write_report(analysis.report(), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"layers.json", "layers.html"}
    assert plots.MISSING in capsys.readouterr().out


def test_a_choice_says_what_each_layer_would_have_gained_and_how_fixed_ones_do(analysis):
    choice = analysis.choose("auto:3")
    assert len(choice["chosen"]) == 3 and choice["chosen"] == sorted(set(choice["chosen"]))
    assert [len(step["losses"]) for step in choice["steps"]] == [5, 4, 3]
    for step in choice["steps"]:
        losses = {int(layer): loss for layer, loss in step["losses"].items()}
        assert step["added"] == min(losses, key=losses.get) and step["loss"] == min(losses.values())
    assert {step["added"] for step in choice["steps"]} == set(choice["chosen"])
    assert choice["compared"][0]["layers"] == choice["chosen"]
    assert [c["name"] for c in choice["compared"]][1] == "every third layer"
    better = [c for c in choice["compared"][1:] if c["loss"] > choice["compared"][0]["loss"]]
    assert all(c["name"] in choice["verdict"].split(";")[0] for c in better)


def test_a_budget_on_disk_or_in_time_keeps_the_choice_small(analysis):
    each = analysis.costs(Limits(), "fp16")["gigabytes_per_layer"]
    seconds = sum(r["duration"] for b in analysis.train.batches + analysis.dev.batches for r in b)
    assert each == pytest.approx(seconds * analysis.encoder.frame_rate * 24 * 2 / 1e9)
    assert len(analysis.choose(f"auto:{1.5 * each:.10f}GB")["chosen"]) == 1
    assert len(analysis.choose(f"auto:2,{5 * each:.10f}GB")["chosen"]) == 2
    with pytest.raises(ValueError, match="not even one layer is within that"):
        analysis.choose(f"auto:{0.5 * each:.12f}GB")
    analysis.costs = lambda limits, dtype: {"seconds_below": 1.0, "seconds_per_layer": 2.0}
    try:
        assert max(analysis.choose("auto:2,5.5s")["chosen"]) <= 2
    finally:
        del analysis.costs


def test_more_layers_than_there_are_cannot_be_chosen(analysis):
    with pytest.raises(ValueError, match="auto:9.*has 5 states to choose from"):
        analysis.choose("auto:9")


@pytest.mark.parametrize(
    "spec", ["auto:x", "auto:0", "auto:-1", "auto:1.5", "auto:2,3", "auto:2TB"]
)
def test_what_auto_does_not_understand_is_refused(spec):
    with pytest.raises(ValueError, match=r"expected auto, auto:4 \(layers\)"):
        parse_auto(spec)


def test_the_forms_of_auto():
    assert parse_auto("auto") == Limits() and parse_auto("auto").most == 4
    assert parse_auto("auto:3") == Limits(number=3)
    assert parse_auto("auto:0.5GB, 90s") == Limits(gigabytes=0.5, seconds=90.0)
    assert parse_auto("auto:90s").most > 1000


def test_a_part_of_a_data_set_is_drawn_from_all_of_it_and_always_the_same():
    rows = [{"wav": f"{n:03d}", "duration": 6.0} for n in range(100)]
    part = some(rows, 2)
    assert len(part) == 20 and part == some(rows[::-1], 2)
    assert min(int(row["wav"]) for row in part) < 20 < 80 < max(int(row["wav"]) for row in part)
    assert len(some(rows, 0)) == 1


def test_a_recipe_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nosuch.py is not there; expected a train.py"):
        analyze.main([str(tmp_path / "nosuch.py")])


def test_a_linear_probe_has_the_shape_of_a_linear_head():
    bank, head = ProbeBank([[0]], 6, 4), LinearHead(6, 4)
    with torch.no_grad():
        bank.weight[0, 0] = head.output.weight.T
        bank.bias[0, 0] = head.output.bias
    states = torch.randn(1, 2, 5, 6)
    torch.testing.assert_close(bank(states)[0], head(states[0], torch.tensor([5, 5])))


@pytest.fixture
def job(tmp_path, encoder_folder):
    """Run a job on tones; gives its results."""
    (tmp_path / "base.yaml").write_text("extends: base/ctc.yaml\ndataset: tones\n")
    csv = make_speech(tmp_path, 12)["train"]

    def run(name, *options, method="fusion"):
        given = arguments(tmp_path / name, encoder_folder, method, *options)
        given += ["--probes", "{epochs: 2}", "--number_of_epochs", "1"]
        hparams, run_opts = load_config(given, tmp_path / "base.yaml")
        return train_ctc(hparams, run_opts, tmp_path, [csv], [csv], {"tones": csv})

    return run


def test_a_run_with_auto_is_the_run_with_the_layers_that_were_chosen(job, tmp_path):
    store = ["--cache", str(tmp_path / "store")]
    auto = job("auto", "--layers", "auto:2", *store)
    choice = json.loads((tmp_path / "auto" / "layers.json").read_text())
    assert auto["layers"] == choice["chosen"] and len(choice["chosen"]) == 2
    given = job("given", "--layers", str(choice["chosen"]), *store)
    assert given["test"] == auto["test"] and given["horizon"] == auto["horizon"]
    config = ruamel.yaml.YAML().load(tmp_path / "auto" / "config.yaml")
    assert config["layers"] == choice["chosen"]


def test_the_choice_is_made_once_for_all_seeds_and_kept_when_a_run_goes_on(
    job, tmp_path, monkeypatch
):
    store = ["--layers", "auto:1", "--cache", str(tmp_path / "store")]
    first = job("first", "--seed", "1", *store)
    monkeypatch.setattr(Analysis, "choose", None)
    again, other = job("first", "--seed", "1", *store), job("second", "--seed", "2", *store)
    assert first["layers"] == again["layers"] == other["layers"]
    with pytest.raises(ValueError, match="auto:1.*of a run with other data or settings"):
        job("first", "--seed", "1", *store, "--layers", "auto:2")


def test_a_noisy_copy_of_the_recordings_makes_its_own_choice(job, tmp_path):
    store = ["--layers", "auto:1", "--cache", str(tmp_path / "store")]
    digests = set()
    for name in ("clean", "noise"):
        job(name, *store)
        digests.add(json.loads((tmp_path / name / "layers.json").read_text())["digest"])
        for wav in tmp_path.glob("u*.wav"):
            noise = numpy.random.default_rng(0).normal(0, 0.1, soundfile.info(wav).frames)
            soundfile.write(wav, noise, 16000)
    assert len(digests) == 2


def test_budgets_on_disk_count_for_probes_and_for_every_speed(job, tmp_path):
    store = ["--cache", str(tmp_path / "store"), "--layers"]
    with pytest.raises(CacheError, match="cache_gigabytes|GB"):
        job("little", *store, "auto:1", "--cache_gigabytes", "0.00001")
    costs = []
    for speed in ("[]", "[0.5, 1.0]"):
        job(speed, *store, "auto:1GB", "--speed", speed)
        costs.append(json.loads((tmp_path / speed / "layers.json").read_text())["costs"])
    # Train is dev here: one and one before; at half and at full speed two and one more, and one.
    each = [cost["gigabytes_per_layer"] for cost in costs]
    assert each[1] / each[0] == pytest.approx(4 / 2)


def test_the_encoder_of_the_probes_is_gone_before_training(job, monkeypatch):
    alive, fit = [], CTCBrain.fit

    def counted(brain, *args, **kwargs):
        gc.collect()
        alive.extend(it.layers for it in gc.get_objects() if isinstance(it, SSLEncoder))
        return fit(brain, *args, **kwargs)

    monkeypatch.setattr(CTCBrain, "fit", counted)
    before = sum(isinstance(it, SSLEncoder) for it in gc.get_objects())
    results = job("run", "--layers", "auto:1")
    assert len(alive) <= before + 1 and results["layers"] in alive


def test_another_task_on_the_same_recordings_makes_its_own_choice(
    classification_job,  # noqa: F811
    tmp_path,
):
    store = ["--layers", "auto:1", "--cache", str(tmp_path / "store")]
    digests = set()
    for slots in ("[pitch]", "[length]"):
        classification_job(tmp_path / slots, "--slots", slots, *store)
        digests.add(json.loads((tmp_path / slots / "layers.json").read_text())["digest"])
    assert len(digests) == 2


def test_a_choice_without_a_cache_leaves_no_states_behind(job, tmp_path):
    results = job("run", "--layers", "auto", "--cache", "null", method="weighted_sum")
    assert (tmp_path / "run" / "layers.json").exists() and len(results["layers"]) <= 4
    assert not list(tmp_path.rglob("*/key.json"))


def test_an_analysis_ends_the_job_and_leaves_a_report(job, tmp_path):
    options = ["--layers", "all", "--analysis", str(tmp_path / "report")]
    with pytest.raises(SystemExit) as ended:
        job("run", *options, method="last_layer")
    assert ended.value.code == 0 and not (tmp_path / "run" / "results.json").exists()
    report = json.loads((tmp_path / "report" / "layers.json").read_text())
    assert len(report["probes"]) == 5 and "auto" not in report
    with pytest.raises(ValueError, match="an analysis looks at all; leave out --layers"):
        job("run", "--analysis", str(tmp_path / "report"), "--layers", "last:1")


def test_a_wrong_auto_is_refused_before_anything_is_computed(job, tmp_path):
    with pytest.raises(ValueError, match="layers='auto:none': expected auto, auto:4"):
        job("run", "--layers", "auto:none", "--cache", str(tmp_path / "store"))
    with pytest.raises(ValueError, match="speed: expected numbers from 0.5 to 2.0"):
        job("run", "--layers", "auto", "--speed", "[0]", "--cache", str(tmp_path / "store"))
    assert not (tmp_path / "store").exists()


def test_utterances_that_are_too_long_are_named_before_the_probing(job, tmp_path, monkeypatch):
    monkeypatch.setattr(SSLEncoder, "maximum_samples", 4800)
    with pytest.raises(ValueError, match=r"utterances \(.*\) are longer than the 0.3 s that"):
        job("run", "--layers", "auto", "--cache", str(tmp_path / "store"))
    assert not (tmp_path / "store").exists()


def test_two_runs_that_start_together_compute_states_once(encoder_folder, tmp_path):
    make_speech(tmp_path, 3)
    wavs, seconds = [str(tmp_path / f"u{n}.wav") for n in range(3)], [0.5] * 3
    cache = StateCache(tmp_path / "store", SSLEncoder(encoder_folder, layers="all"))
    few = StateCache(tmp_path / "store", SSLEncoder(encoder_folder, layers=[2]))
    spent = []
    with contextlib.ExitStack() as held:
        todo = cache._missing({(wav, 1.0): 0.5 for wav in wavs}, held)
        waiting = threading.Thread(target=lambda: spent.append(few.fill(wavs, seconds)))
        waiting.start()
        time.sleep(0.5)
        assert not spent, "the other run waits"
        cache._compute_all(todo, 60.0, False)
    waiting.join(60)
    assert spent == [{"utterances": 0, "seconds": 0.0, "gigabytes": 0.0}]
    assert torch.equal(few.read(wavs[0])[:, 0], cache.read(wavs[0])[:, 2])


@pytest.mark.parametrize("fixture", ["classification_job", "speaker_job"])
def test_layers_are_chosen_for_classes_and_for_speakers_too(fixture, request, tmp_path):
    run = request.getfixturevalue(fixture)
    results = run(tmp_path, "--layers", "auto:2", "--probes", "{epochs: 2}")
    choice = json.loads((tmp_path / "layers.json").read_text())
    assert results["layers"] == choice["chosen"] and len(choice["chosen"]) == 2
    assert 0 <= choice["compared"][0]["accuracy"] <= 100

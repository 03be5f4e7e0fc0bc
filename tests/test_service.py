import asyncio
import contextlib
import http.client
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from hff_modules.batching import Batcher, Waiting
from hff_modules.service import PAGE, Limits, Refused, Service, decode, main, parse_models
from tests.test_encoder import speech
from tests.test_multitask import same, write_model

ROOT = Path(__file__).parent.parent
ADAPTED = {"tpa": {"bottleneck": 4, "layers": "last:2"}}
LIMITS = {"upload-megabytes": "1", "upload-seconds": "3", "audio-seconds": "4"}


def audio(signal, rate=16000, **options):
    """A file's bytes."""
    file = io.BytesIO()
    soundfile.write(file, signal, rate, **{"format": "WAV", **options})
    return file.getvalue()


def tone(seconds, rate=16000, channels=1):
    time = np.arange(int(seconds * rate)) / rate
    return np.stack([0.3 * np.sin(2000 * time + k) for k in range(channels)], axis=1)


# Decoding


@pytest.mark.parametrize(
    "options",
    [
        {"format": "WAV", "subtype": "FLOAT"},
        {"format": "WAV", "subtype": "PCM_U8"},
        {"format": "FLAC"},
        {"format": "OGG", "subtype": "VORBIS"},
        {"format": "OGG", "subtype": "OPUS"},
        {"format": "MP3"},
    ],
)
@pytest.mark.parametrize(("rate", "channels"), [(16000, 1), (48000, 2)])
def test_files_of_every_kind_become_16_khz_mono(options, rate, channels):
    given = audio(tone(1, rate, channels), rate, **options)
    decoded = decode(given, most_seconds=2)
    assert decoded.dim() == 1 and abs(len(decoded) - 16000) < 1600
    assert decoded.dtype == torch.float32 and 0.05 < decoded.std() < 0.4


@pytest.mark.parametrize(
    ("data", "status", "reason"),
    [
        (b"RIFF", 422, "not a readable audio file"),
        (b"<html>" * 1000, 422, "not a readable audio file"),
        (audio(tone(3)), 413, "longer than 2 s"),
        (audio(np.zeros(4_000_000, "int16"), 8000, format="FLAC"), 413, "longer than 2 s"),
        (audio(tone(0)), 422, "0.000 s; at least 0.025 s needed"),
        (audio(tone(0.01)), 422, "0.010 s; at least 0.025 s needed"),
        (audio(np.full(16000, np.nan), subtype="FLOAT"), 422, "values that are no sound"),
        (audio(np.full(16000, 1e30), subtype="FLOAT"), 422, "values that are no sound"),
        (audio(tone(1), 44101), 422, "sample rate of 44101 Hz is not supported"),
        (audio(tone(1), 100), 422, "sample rate of 100 Hz is not supported"),
        (audio(tone(1, 8000, 2), 8000, format="FLAC")[:-2000], 422, "flac|decode|read"),
    ],
)
def test_what_is_no_usable_audio_is_refused_with_a_reason(data, status, reason):
    with pytest.raises(Refused, match=reason) as refusal:
        decode(data, most_seconds=2, minimum_samples=400)
    assert refusal.value.status == status
    assert "\n" not in refusal.value.reason and "0x" not in refusal.value.reason


# Batches


def waiting(*lengths, loop):
    return [Waiting(torch.ones(n), ["sum"], loop.create_future()) for n in lengths]


def sums(wavs, wav_lens, tasks):
    """Stands for a model: adds up samples; fails as a whole where one of them is negative."""
    if (wavs < 0).any():
        raise ValueError("negative")
    return {"sum": [float(wav.sum()) for wav in wavs]}


def test_a_batch_is_the_oldest_and_those_nearest_in_length_within_its_limits():
    async def run():
        loop = asyncio.get_running_loop()
        batcher = Batcher(sums, batch_size=3, batch_seconds=1.0, sample_rate=1000)
        batcher.queue = waiting(300, 900, 310, 290, 320, 2000, loop=loop)
        gone = batcher.queue[2].answer
        gone.cancel()
        lengths = []
        while batch := batcher.take():
            lengths.append([len(one.signal) for one in batch])
        assert lengths == [[300, 290, 320], [900], [2000]]

    asyncio.run(run())


def test_requests_are_answered_together_and_one_that_fails_alone():
    calls = []

    def model(wavs, wav_lens, tasks):
        calls.append(len(wavs))
        return sums(wavs, wav_lens, tasks)

    async def run():
        batcher = Batcher(model, wait_seconds=0.05)
        running = asyncio.create_task(batcher.run())
        signals = [torch.ones(100), -torch.ones(90), torch.ones(80)]
        asked = [batcher.ask(one, ["sum"]) for one in signals]
        found = await asyncio.gather(*asked, return_exceptions=True)
        assert found[0] == {"sum": 100.0} and found[2] == {"sum": 80.0}
        assert isinstance(found[1], ValueError)
        assert calls == [3, 1, 1, 1]
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running

    asyncio.run(run())


def test_a_broken_gpu_ends_the_loop_so_that_health_says_so():
    def model(wavs, wav_lens, tasks):
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered", 700)

    async def run():
        batcher = Batcher(model, wait_seconds=0)
        running = asyncio.create_task(batcher.run())
        asked = [batcher.ask(torch.ones(9), ["sum"]) for _ in range(2)]
        found = await asyncio.gather(*asked, return_exceptions=True)
        assert all(isinstance(one, torch.AcceleratorError) for one in found)
        with pytest.raises(torch.AcceleratorError):
            await running

    asyncio.run(run())


# Limits


class Request:
    """Stands for a request whose body comes in pieces."""

    def __init__(self, *pieces):
        self.pieces, self.headers = pieces, {}

    async def stream(self):
        for piece in self.pieces:
            yield piece

    async def is_disconnected(self):
        return False


def ask(model, *requests, **limits):
    """Answers of a service, or why they were refused, for requests that come at once."""
    model.tasks = {"sum": None}

    async def run():
        service = Service(model, Limits(**limits))
        async with service.running():
            asked = [service.answer(request, "sum") for request in requests]
            found = await asyncio.gather(*asked, return_exceptions=True)
            assert service.held == service.waiting == 0
            assert not service.loop.done()
        return found

    return asyncio.run(run())


def test_uploads_that_are_too_much_together_are_told_to_come_back():
    file = audio(np.ones(8000), subtype="FLOAT")  # 32 kB
    found = ask(sums, *[Request(file) for _ in range(3)], held_megabytes=0.07)
    served = [one for one in found if not isinstance(one, Refused)]
    refused = [one for one in found if isinstance(one, Refused)]
    assert [one["results"]["sum"] for one in served] == [pytest.approx(8000)] * 2
    assert [one.status for one in refused] == [503] and "too many uploads" in str(refused[0])


def test_a_model_that_takes_too_long_or_fails_is_no_end_for_the_service():
    def model(wavs, wav_lens, tasks):
        if wavs.shape[1] == 8000:
            time.sleep(0.5)
        if wavs.shape[1] == 4000:
            raise ValueError("/home/secret is no number")
        if wavs.shape[1] == 1000:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return sums(wavs, wav_lens, tasks)

    (full,) = ask(model, Request(audio(np.ones(1000), subtype="FLOAT")))
    assert full.status == 503 and "out of memory; try again" in full.reason
    requests = [Request(audio(np.ones(n), subtype="FLOAT")) for n in (8000, 4000, 2000)]
    slow, wrong, fine = ask(model, *requests, request_seconds=0.4, batch_size=1)
    assert slow.status == 503 and "no answer within 0.4 s" in slow.reason
    assert wrong.status in (422, 503) and "secret" not in wrong.reason
    slow, wrong, fine = ask(model, *requests, batch_size=1)
    assert slow["results"]["sum"] == pytest.approx(8000)
    assert wrong.status == 422 and "secret" not in wrong.reason
    assert fine["results"]["sum"] == pytest.approx(2000)


# The service as a process


class Server:
    """A service in a process of its own."""

    def __init__(self, *arguments, limits=LIMITS):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        options = [text for name, value in limits.items() for text in (f"--{name}", value)]
        command = [sys.executable, "-m", "hff_modules.service", *arguments, *options]
        self.temporary = tempfile.mkdtemp()
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [*command, "--port", str(self.port), "--device", "cpu"],
            cwd=ROOT,
            env={**os.environ, "TMPDIR": self.temporary, "OMP_NUM_THREADS": "1"},
            stdout=self.log,
            stderr=subprocess.STDOUT,
        )
        for _ in range(600):
            assert self.process.poll() is None, self.said()
            with contextlib.suppress(OSError):
                if self.get("/health")[0] == 200:
                    return
            time.sleep(0.25)
        raise AssertionError("the service does not answer")

    def said(self):
        self.log.seek(0)
        return self.log.read()

    def get(self, path):
        return self.send("GET", path)

    def send(self, method, path, body=None, headers={}, timeout=120):  # noqa: B006
        """Give the status, the body (parsed where it is JSON) and the headers."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            content = response.read()
            if response.headers.get_content_type() == "application/json":
                content = json.loads(content)
            return response.status, content, response.headers
        finally:
            connection.close()

    def raw(self, text, then=(), pause=0.0, timeout=60):
        """Send bytes as they are, piece by piece, until an answer comes; give its first line."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=timeout) as connection:
            connection.sendall(text)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                for piece in then:
                    connection.sendall(piece)
                    time.sleep(pause)
                    connection.setblocking(False)
                    with contextlib.suppress(BlockingIOError):
                        connection.recv(1, socket.MSG_PEEK)
                        break
                    connection.settimeout(timeout)
            connection.settimeout(timeout)
            return connection.recv(2000).decode().splitlines()[0]

    def stop(self):
        """End it as a system does; tells whether it went in order."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)
        return "Application shutdown complete" in self.said()


@pytest.fixture(scope="module")
def models(tmp_path_factory, encoder_folder):
    root = tmp_path_factory.mktemp("models")
    return {
        "asr": write_model(root / "asr", encoder_folder, "asr"),
        "mood": write_model(root / "mood", encoder_folder, "classification", layers=(1, 3)),
        "voice": write_model(root / "voice", encoder_folder, "speaker", adapted=ADAPTED),
    }


@pytest.fixture(scope="module")
def server(models):
    server = Server(models["asr"], f"mood={models['mood']}", f"voice={models['voice']}")
    yield server
    if server.process.poll() is None:
        server.stop()


def utterances(count):
    lengths = [3_000 + 1_700 * k % 40_000 for k in range(count)]
    wavs, _ = speech(*lengths)
    return [audio(wav[:n].numpy(), subtype="FLOAT") for wav, n in zip(wavs, lengths, strict=True)]


def endless(size=10_000):
    while True:
        yield b"%x\r\n" % size + b"\0" * size + b"\r\n"


def test_fifty_clients_at_once_are_all_answered_as_they_would_be_alone(server):
    tasks = ["asr", "mood", "voice", "asr,mood", "asr,voice,mood"]
    files = utterances(10)
    alone = {
        (f, t): server.send("POST", f"/tasks/{tasks[t]}", files[f])[:2]
        for f, t in {(k % 10, k % 5) for k in range(50)}
    }
    assert {status for status, _ in alone.values()} == {200}
    with ThreadPoolExecutor(50) as clients:
        jobs = [(k % 10, k % 5) for k in range(50)]
        found = list(
            clients.map(lambda j: server.send("POST", f"/tasks/{tasks[j[1]]}", files[j[0]]), jobs)
        )
    for job, (status, answer, headers) in zip(jobs, found, strict=True):
        assert status in (200, 503)
        if status == 503:
            assert int(headers["Retry-After"]) >= 1
        else:
            expected = alone[job][1]
            assert answer["seconds"] == expected["seconds"]
            assert same(answer["results"], expected["results"])
    assert sum(status == 200 for status, _, _ in found) >= 40
    texts = {answer["results"]["asr"]["text"] for _, answer in alone.values()
             if "asr" in answer["results"]}  # fmt: skip
    assert len(texts) > 3


def test_more_than_can_wait_are_told_to_come_back(models):
    server = Server(models["asr"], limits={**LIMITS, "waiting": "2"})
    try:
        file = audio(tone(4))
        with ThreadPoolExecutor(50) as clients:
            found = list(clients.map(lambda _: server.send("POST", "/tasks", file), range(50)))
        statuses = [status for status, _, _ in found]
        assert set(statuses) == {200, 503}
        for status, answer, headers in found:
            if status == 503:
                assert headers["Retry-After"] == "1" and "waiting already" in answer["detail"]
        assert server.send("POST", "/tasks/asr", file)[0] == 200
    finally:
        assert server.stop()


HEAD = b"POST /tasks/asr HTTP/1.1\r\nHost: x\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
BAD = {
    "empty": (400, lambda s: s.send("POST", "/tasks/asr", b"")[:2]),
    "no audio": (422, lambda s: s.send("POST", "/tasks/asr", os.urandom(5000))[:2]),
    "truncated": (422, lambda s: s.send("POST", "/tasks/asr", utterances(1)[0][:30])[:2]),
    "zero seconds": (422, lambda s: s.send("POST", "/tasks/asr", audio(tone(0)))[:2]),
    "too long": (413, lambda s: s.send("POST", "/tasks/asr",
                                       audio(np.zeros(10**6), 8000, format="FLAC"))[:2]),
    "too large": (413, lambda s: s.send("POST", "/tasks/asr", b"\0" * 1_500_000)[:2]),
    "unknown task": (404, lambda s: s.send("POST", "/tasks/asr,moood", utterances(1)[0])[:2]),
    "a form": (415, lambda s: s.send("POST", "/tasks/asr", b"--x",
                                     {"Content-Type": "multipart/form-data; boundary=x"})[:2]),
    "endless and fast": (413, lambda s: s.raw(CHUNKED, endless())),
    "endless and slow": (408, lambda s: s.raw(CHUNKED, endless(10), pause=0.1)),
    "huge, as announced": (413, lambda s: s.raw(HEAD + b"Content-Length: 99999999999\r\n\r\n")),
    "stopped half way": (408, lambda s: s.raw(HEAD + b"Content-Length: 5000\r\n\r\nRIFF")),
    "broken chunks": (400, lambda s: s.raw(CHUNKED + b"zzz\r\n\r\n")),
    "no HTTP": (400, lambda s: s.raw(b"\0\1\2\3 hello\r\n\r\n")),
}  # fmt: skip


def test_bad_input_gets_its_status_while_good_requests_run_beside_it(server):
    files, stop, seen = utterances(4), threading.Event(), []
    expected = [server.send("POST", "/tasks", file)[1] for file in files]

    def good(number):
        while not stop.is_set():
            status, answer, _ = server.send("POST", "/tasks", files[number])
            seen.append(status == 200 and same(answer["results"], expected[number]["results"]))

    with ThreadPoolExecutor(4 + 3 * len(BAD)) as clients:
        steady = [clients.submit(good, number) for number in range(4)]
        given = [(kind, clients.submit(BAD[kind][1], server)) for kind in BAD for _ in range(3)]
        try:
            found = [(kind, job.result()) for kind, job in given]
        finally:
            stop.set()
        for job in steady:
            job.result()
    for kind, answer in found:
        if isinstance(answer, str):
            assert answer.split()[1] == str(BAD[kind][0]), (kind, answer)
        else:
            status, content = answer
            assert status == BAD[kind][0], (kind, content)
            assert len(content["detail"].splitlines()) == 1
            for private in (str(ROOT), str(Path.home()), "/tmp", "Traceback", ".py"):
                assert private not in content["detail"], kind
    assert all(seen) and len(seen) >= 8
    assert os.listdir(server.temporary) == []  # uploads leave nothing behind
    assert server.get("/health")[1]["waiting"] == 0
    assert "Traceback" not in server.said()


def test_callers_that_hang_up_leave_the_queue(server):
    file = audio(tone(3.9))
    head = b"POST /tasks HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(file)
    for part in (file, file[:1000]):
        for _ in range(20):
            with socket.create_connection(("127.0.0.1", server.port)) as connection:
                connection.sendall(head + part)
    deadline = time.time() + 60
    while server.get("/health")[1]["waiting"] and time.time() < deadline:
        time.sleep(0.2)
    assert server.get("/health")[1]["waiting"] == 0
    assert server.send("POST", "/tasks/mood", file)[0] == 200
    assert "Traceback" not in server.said()


def test_page_tasks_health_and_description_are_served(server):
    status, page, headers = server.get("/")
    assert status == 200 and page.decode() == PAGE.read_text(encoding="utf-8")
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert "http://" not in page.decode() and "https://" not in page.decode()
    assert server.get("/tasks")[1]["tasks"] == {
        "asr": "asr", "mood": "classification", "voice": "speaker"
    }  # fmt: skip
    assert server.get("/health")[1]["status"] == "ok"
    paths = server.get("/openapi.json")[1]["paths"]
    body = paths["/tasks/{names}"]["post"]["requestBody"]["content"]["audio/wav"]["schema"]
    assert body == {"type": "string", "format": "binary"}
    assert {"413", "422", "503"} <= paths["/tasks"]["post"]["responses"].keys()
    assert server.get("/tasks/asr")[0] == 405 and server.get("/../../etc/passwd")[0] == 404


def test_only_this_machine_is_listened_to_unless_told_otherwise(server):
    hexadecimal = f"{server.port:04X}"
    rows = Path("/proc/net/tcp").read_text().splitlines()[1:]
    listening = [row.split()[1] for row in rows if row.split()[3] == "0A"]
    assert [a for a in listening if a.endswith(f":{hexadecimal}")] == [f"0100007F:{hexadecimal}"]


def test_a_service_that_is_told_to_stop_answers_who_is_waiting_first(models):
    server = Server(models["asr"])
    file = audio(tone(4))
    with ThreadPoolExecutor(8) as clients:
        jobs = [clients.submit(server.send, "POST", "/tasks", file) for _ in range(8)]
        deadline = time.time() + 60
        while not server.get("/health")[1]["waiting"] and time.time() < deadline:
            time.sleep(0.01)
        assert server.stop()
        statuses = [job.exception() or job.result()[0] for job in jobs]
    answered = [status for status in statuses if status == 200]
    assert answered and all(s == 200 or isinstance(s, OSError) for s in statuses)
    assert "Traceback" not in server.said()


# The command line


def test_models_are_named_by_their_task_or_as_told(models):
    assert parse_models([models["asr"], f"b={models['mood']}", models["voice"]]) == {
        "asr": models["asr"], "b": models["mood"], "speaker": models["voice"]
    }  # fmt: skip
    with pytest.raises(ValueError, match="both called 'asr': give one another name, as in other="):
        parse_models([models["asr"], f"asr={models['mood']}"])


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no hff.json: not a"):
        main([str(tmp_path)])
    with pytest.raises(ValueError, match="there is no such folder"):
        main([f"asr={tmp_path / 'absent'}"])


def test_a_port_that_is_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--port 99999: expected 1 to 65535"):
        main([str(tmp_path), "--port", "99999"])


def test_without_fastapi_or_uvicorn_the_extra_to_install_is_named(monkeypatch, models):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(ValueError, match=r"pip install 'hff-modules\[service\]'"):
        main([models["asr"]])

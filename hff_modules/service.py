"""An HTTP service for exported models that share an encoder: one pass for all tasks and callers.

python -m hff_modules.service my_model/ [emotion=other_model/ ...] [--port 8000]

POST the bytes of an audio file to /tasks/<names>; / is a page to try it with, /docs describes the
rest. Audio is neither kept nor written to disk.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import io
import logging
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
import torchaudio

from hff_modules import cli
from hff_modules.batching import Batcher
from hff_modules.data.audio import NO_SOUND, fault_in, is_sound, is_supported
from hff_modules.export_format import TASKS, find_folder, read_manifest
from hff_modules.frontend import SAMPLE_RATE
from hff_modules.multitask import MultiTask

logger = logging.getLogger(__name__)

PAGE = Path(__file__).with_name("service.html")
# The page's own script and nothing else; a recorder's worklet comes from a blob.
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline' blob:; connect-src 'self'; media-src blob:; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
}
BODY = {"schema": {"type": "string", "format": "binary"}}
ANSWERS = {
    400: "The request has no body.",
    404: "There is no such task.",
    408: "The upload took too long.",
    413: "The file has too many bytes or the audio too many seconds.",
    415: "The body is a form; the file's bytes are expected as they are.",
    422: "The body is not audio that can be used.",
    503: "Too much to do; Retry-After says when to come back.",
}


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one request, and all of them together, may take."""

    upload_megabytes: float = 25.0  # one upload
    upload_seconds: float = 20.0  # until its last byte is here
    held_megabytes: float = 400.0  # all uploads together
    audio_seconds: float = 60.0  # of one utterance
    waiting: int = 64  # requests between their last byte and their answer
    request_seconds: float = 60.0  # from the last byte to the answer
    batch_size: int = 16
    batch_seconds: float = 60.0
    batch_wait: float = 0.01  # seconds that the first of a batch waits for others


class Refused(Exception):
    """A request that is not served.

    Arguments
    ---------
    status : int
        Of HTTP.
    reason : str
        One line for whoever asked; names nothing of this machine.
    """

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status, self.reason = status, reason


def decode(data: bytes, most_seconds: float, minimum_samples: int = 1) -> torch.Tensor:
    """Give the audio of an uploaded file; no more of it than allowed is ever decoded.

    Arguments
    ---------
    data : bytes
        A file in any format that libsndfile reads.
    most_seconds : float
        Longest audio.
    minimum_samples : int
        Shortest audio, at 16 kHz.

    Returns
    -------
    torch.Tensor
        (samples,), 16 kHz, mono.

    Raises
    ------
    Refused
        No audio, too much of it or too little, or values that are no sound.
    """
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            rate = file.samplerate
            if not is_supported(rate):
                raise Refused(422, f"a sample rate of {rate} Hz is not supported; 16000 is best")
            most, blocks, count = int(most_seconds * rate), [], 0
            while len(block := file.read(2**18 // file.channels, dtype="float32", always_2d=True)):
                count += len(block)
                if count > most:
                    raise Refused(413, f"the audio is longer than {most_seconds:g} s")
                blocks.append(block.mean(axis=1))
            expected = file.frames
    except soundfile.SoundFileError as error:
        reason = getattr(error, "error_string", "damaged")  # str(error) has an address in it
        raise Refused(422, f"not a readable audio file ({reason})") from None
    if count < 0.99 * expected:  # lossy formats only estimate their length
        raise Refused(422, f"only {count} of {expected} samples can be decoded; is it all there?")
    if fault := fault_in(io.BytesIO(data)):
        raise Refused(422, f"the audio {fault}")
    signal = torch.from_numpy(np.concatenate(blocks)) if blocks else torch.zeros(0)
    if not is_sound(signal):
        raise Refused(422, NO_SOUND)
    if rate != SAMPLE_RATE:
        signal = torchaudio.functional.resample(signal, rate, SAMPLE_RATE)
    if len(signal) < minimum_samples:
        seconds = minimum_samples / SAMPLE_RATE
        raise Refused(
            422, f"the audio has {len(signal) / SAMPLE_RATE:.3f} s; at least {seconds:.3f} s needed"
        )
    return signal


class Service:
    """What the endpoints do: take an upload within limits, decode it, wait for the model.

    Arguments
    ---------
    model : MultiTask
        Or anything that is called like it and has ``tasks`` by name.
    limits : Limits
    minimum_samples : int
        Shortest audio that the model takes.
    """

    def __init__(self, model: Callable, limits: Limits, minimum_samples: int = 1):
        self.model, self.limits, self.minimum_samples = model, limits, minimum_samples
        self.held = 0  # bytes of uploads that are here
        self.waiting = 0  # requests between their last byte and their answer
        self.answered = 0
        self.batcher: Batcher | None = None
        self.loop: asyncio.Task | None = None  # the batcher's
        self._decoders = ThreadPoolExecutor(2, thread_name_prefix="decode")

    @contextlib.asynccontextmanager
    async def running(self, app=None):
        """Answer requests within; those that wait at the end are answered first."""
        limits = self.limits
        self.batcher = Batcher(
            self.model, limits.batch_size, limits.batch_seconds, limits.batch_wait, SAMPLE_RATE
        )
        self.loop = asyncio.create_task(self.batcher.run())
        try:
            yield
        finally:
            self.loop.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self.loop
            self._decoders.shutdown()

    async def answer(self, request, names: str | None) -> dict[str, Any]:
        """Answer one request.

        Arguments
        ---------
        request : starlette.requests.Request
            Its body is an audio file.
        names : str, optional
            Tasks, with commas between them; all by default.

        Returns
        -------
        dict[str, Any]
            ``seconds`` of the audio and ``results`` by task.

        Raises
        ------
        Refused
        """
        tasks = list(dict.fromkeys(names.split(","))) if names else list(self.model.tasks)
        # The body first: many callers look for an answer only when they have sent everything.
        async with self._upload(request) as data:
            for task in tasks:
                if task not in self.model.tasks:
                    known = ", ".join(self.model.tasks)
                    raise Refused(404, f"there is no task {task[:40]!r}; there are {known}")
            if request.headers.get("content-type", "").startswith("multipart/"):
                raise Refused(415, "send the file's bytes as the body, not a form")
            if not data:
                raise Refused(400, "the request has no body; send the bytes of an audio file")
            if self.waiting >= self.limits.waiting:
                raise Refused(503, f"{self.waiting} requests are waiting already; try again later")
            self.waiting += 1
            try:
                async with asyncio.timeout(self.limits.request_seconds):
                    return await self._result(request, data, tasks)
            except TimeoutError:
                reason = f"no answer within {self.limits.request_seconds:g} s; try again later"
                raise Refused(503, reason) from None
            finally:
                self.waiting -= 1
                self.answered += 1

    async def _result(self, request, data: bytes, tasks: Sequence[str]) -> dict[str, Any]:
        longest, shortest = self.limits.audio_seconds, self.minimum_samples
        loop = asyncio.get_running_loop()
        signal = await loop.run_in_executor(self._decoders, decode, data, longest, shortest)
        asked = asyncio.ensure_future(self.batcher.ask(signal, tasks))
        try:
            while not (await asyncio.wait({asked}, timeout=0.5))[0]:
                if await request.is_disconnected():
                    raise Refused(400, "the caller has gone")
            results = asked.result()
        except torch.OutOfMemoryError:
            raise Refused(503, "the model is out of memory; try again later") from None
        except ValueError:  # what it says may name a path
            logger.warning("the model refused an utterance", exc_info=True)
            raise Refused(422, "the model cannot take this audio") from None
        finally:
            asked.cancel()
        return {"seconds": round(len(signal) / SAMPLE_RATE, 3), "results": results}

    @contextlib.asynccontextmanager
    async def _upload(self, request):
        """Hold a request's body, no more and no longer than allowed."""
        most = round(self.limits.upload_megabytes * 1e6)
        total = round(self.limits.held_megabytes * 1e6)
        chunks, size, held = [], 0, 0
        try:
            try:
                async with asyncio.timeout(self.limits.upload_seconds):
                    if _announced(request) > 2 * most:
                        raise _too_large(self.limits)
                    full = False
                    async for chunk in request.stream():
                        size += len(chunk)
                        full = full or self.held + len(chunk) > total
                        if size <= most and not full:
                            chunks.append(chunk)
                            held += len(chunk)
                            self.held += len(chunk)
                            continue
                        chunks.clear()  # what is too much is read a little longer, and forgotten
                        self.held, held = self.held - held, 0
                        if size > 2 * most:
                            break
            except TimeoutError:
                reason = f"the upload took longer than {self.limits.upload_seconds:g} s"
                raise Refused(408, reason) from None
            if size > most:
                raise _too_large(self.limits)
            if full:
                raise Refused(503, "too many uploads at once; try again later")
            data = b"".join(chunks)
            chunks.clear()
            yield data
        finally:
            self.held -= held


def _announced(request) -> int:
    length = request.headers.get("content-length", "")
    return int(length) if length.isdecimal() else 0


def _too_large(limits: Limits) -> Refused:
    return Refused(413, f"the file is larger than {limits.upload_megabytes:g} MB")


def create_app(service: Service):
    """Make the web application (FastAPI) around a service.

    Raises
    ------
    ValueError
        FastAPI is not installed.
    """
    try:
        from fastapi import FastAPI, Request
        from fastapi.responses import HTMLResponse, JSONResponse
        from starlette.requests import ClientDisconnect
    except ImportError:
        raise ValueError(_NOT_INSTALLED) from None

    app = FastAPI(title="hff_modules", description=_DESCRIPTION, lifespan=service.running)

    @app.exception_handler(Refused)
    async def refuse(request: Request, refused: Refused):
        # Closing ends an upload that is still under way.
        headers = {"Connection": "close"}
        if refused.status == 503:
            headers["Retry-After"] = "1"
        return JSONResponse({"detail": refused.reason}, refused.status, headers)

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect):
        return JSONResponse({"detail": "the upload was cut off"}, 400)  # nobody reads it

    @app.get("/", include_in_schema=False)
    async def page():
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers=PAGE_HEADERS)

    @app.get("/health", summary="Whether the service is up, and how busy")
    async def health():
        if service.loop.done():
            raise Refused(503, "the model has stopped working")
        return {"status": "ok", "waiting": service.waiting, "answered": service.answered}

    @app.get("/tasks", summary="Tasks that are served, and limits")
    async def tasks():
        kinds = {name: model.task for name, model in service.model.tasks.items()}
        return {"tasks": kinds, "limits": dataclasses.asdict(service.limits)}

    content = {kind: BODY for kind in ("application/octet-stream", "audio/wav", "audio/flac")}
    upload: dict[str, Any] = {
        "openapi_extra": {"requestBody": {"required": True, "content": content}},
        "responses": {status: {"description": text} for status, text in ANSWERS.items()},
    }

    @app.post("/tasks", summary="Run all tasks on an audio file", **upload)
    async def run_all(request: Request):
        return await service.answer(request, None)

    @app.post("/tasks/{names}", summary="Run one or more tasks (a,b) on an audio file", **upload)
    async def run_some(request: Request, names: str):
        return await service.answer(request, names)

    return app


_NOT_INSTALLED = "the service needs FastAPI and uvicorn: pip install 'hff-modules[service]'"
_DESCRIPTION = "Send the bytes of an audio file (WAV, FLAC, MP3, Ogg) as the body of a POST."


def parse_models(given: Sequence[str]) -> dict[str, str]:
    """Read ``name=folder`` or ``folder``; a folder alone is called by the kind of its task.

    Raises
    ------
    ValueError
        Two models of one name.
    """
    models: dict[str, str] = {}
    for text in given:
        name, equals, folder = text.partition("=")
        if not equals or "/" in name:
            name, folder = read_manifest(find_folder(text))["task"], text
        if name in models:
            raise ValueError(
                f"{models[name]} and {folder} are both called {name!r}: give one another name, "
                f"as in other={folder}"
            )
        models[name] = folder
    return models


def main(argv: Sequence[str]) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m hff_modules.service", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "models", nargs="+", help=f"exported models, as folder ({', '.join(TASKS)}) or name=folder"
    )
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--device", default=cli.default_device(), help="such as cpu or cuda:0")
    parser.add_argument("--encoder", help="another place of the models' encoder")
    for field in dataclasses.fields(Limits):
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, type=type(field.default), default=field.default)
    options = vars(parser.parse_args(argv))
    if not 0 < options["port"] < 65536:
        raise ValueError(f"--port {options['port']}: expected 1 to 65535")
    limits = Limits(**{field.name: options[field.name] for field in dataclasses.fields(Limits)})
    try:
        import uvicorn
    except ImportError:
        raise ValueError(_NOT_INSTALLED) from None
    models = parse_models(options["models"])
    model = MultiTask(None, models, cli.usable_device(options["device"]), options["encoder"])
    if model.encoder.maximum_samples is not None:
        most = min(limits.audio_seconds, model.encoder.maximum_samples / SAMPLE_RATE)
        limits = dataclasses.replace(limits, audio_seconds=most)
    app = create_app(Service(model, limits, model.encoder.minimum_samples))
    print(f"tasks: {', '.join(models)}", flush=True)
    if options["host"] not in ("127.0.0.1", "localhost", "::1"):
        print("whoever reaches this address can use it; there is no password", flush=True)
    uvicorn.run(
        app,
        host=options["host"],
        port=options["port"],
        log_level="info",  # says where it runs
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=math.ceil(limits.upload_seconds + limits.request_seconds),
    )


if __name__ == "__main__":
    cli.run(main)

"""The service's page in a real browser, where playwright and a Chromium are installed."""

import shutil

import pytest

from tests.test_service import Server, audio, models, tone  # noqa: F401

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")


@pytest.fixture(scope="module")
def server(models):  # noqa: F811
    server = Server(models["asr"], f"mood={models['mood']}", f"voice={models['voice']}")
    yield server
    assert server.stop()


@pytest.fixture
def page(server):
    # Chromium brings a microphone that beeps.
    options = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=[*options, "--no-sandbox"])
        page = browser.new_page()
        page.set_default_timeout(90_000)
        complaints, asked = [], []
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda m: complaints.append(m.text) if m.type == "error" else None)
        page.on("request", lambda request: asked.append(request.url))
        page.goto(f"http://127.0.0.1:{server.port}/")
        page.get_by_role("checkbox").nth(2).wait_for()
        page.complaints = complaints
        yield page
        local = ("http://127.0.0.1", "blob:", "data:")
        assert all(url.startswith(local) for url in asked), asked
        browser.close()


def test_a_file_is_sent_and_answered_for_the_chosen_tasks(page):
    send = page.get_by_role("button", name="Send")
    assert send.is_disabled()
    file = {"name": "a.flac", "mimeType": "audio/flac", "buffer": audio(tone(1), format="FLAC")}
    page.get_by_label("or an audio file").set_input_files(file)
    page.get_by_role("checkbox", name="voice").uncheck()
    send.click()
    page.get_by_text("1.0 s of speech were answered").wait_for()
    assert page.locator("h2").all_inner_texts() == ["asr", "mood"]
    assert "mood: " in page.locator("#results").inner_text()
    assert page.complaints == []


def test_a_recording_is_made_heard_and_answered(page):
    page.get_by_role("button", name="Record").click()
    page.wait_for_timeout(2500)
    page.get_by_role("button", name="Stop").click()
    page.get_by_text("The recording is ready").wait_for()
    seconds = page.evaluate(
        "async () => { const p = document.getElementById('player');"
        "if (!(p.duration > 0)) await new Promise((r) => p.addEventListener('durationchange', r));"
        "return p.duration; }"
    )
    assert 1 < seconds < 4
    loudest = page.evaluate(
        "async () => { const all = new Int16Array(await speech.slice(44).arrayBuffer());"
        "return all.reduce((most, value) => Math.max(most, Math.abs(value)), 0); }"
    )
    assert loudest > 300  # it beeps
    page.get_by_role("button", name="Send").click()
    page.get_by_text("s of speech were answered").wait_for()
    assert page.locator("h2").all_inner_texts() == ["asr", "mood", "voice"]
    assert "a vector of 6 numbers" in page.locator("#results").inner_text()
    assert page.complaints == []


def test_a_refusal_is_said_in_words(page):
    page.get_by_label("or an audio file").set_input_files(
        {"name": "a.wav", "mimeType": "audio/wav", "buffer": b"no audio" * 100}
    )
    page.get_by_role("button", name="Send").click()
    page.get_by_text("No result: not a readable audio file").wait_for()
    for box in page.get_by_role("checkbox").all():
        box.uncheck()
    page.get_by_role("button", name="Send").click()
    page.get_by_text("Choose at least one task").wait_for()


def test_everything_has_a_name_and_the_keyboard_reaches_it(page):
    unnamed = page.evaluate(
        "() => [...document.querySelectorAll('button, input')]"
        ".filter((e) => !(e.textContent.trim() || e.labels?.length)).length"
    )
    assert unnamed == 0
    assert page.evaluate("document.documentElement.lang") == "en"
    assert page.get_by_role("status").count() == 1
    reached = []
    for _ in range(5):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.value"))
    assert reached == ["record", "file", "asr", "mood", "voice"]

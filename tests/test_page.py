"""The page, in a browser without a screen."""

import shutil

import numpy as np
import pytest
import soundfile

from exported_models import write_model
from layouts import tone
from serkd_jax.page import build_page
from serkd_jax.predict import load_model

CHROMIUM = shutil.which("chromium")
SPEECH_SECONDS = 1.2


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_model(write_model(tmp_path_factory.mktemp("page") / "m", ("onnx",)), "onnx")


@pytest.fixture(scope="module")
def speech(tmp_path_factory):
    path = tmp_path_factory.mktemp("speech") / "speech.wav"
    soundfile.write(path, tone(440, seconds=SPEECH_SECONDS, rate=48_000), 48_000)
    return path


@pytest.fixture
def browser_page(model, speech):
    """The page in Chromium, whose microphone plays the speech."""
    from playwright.sync_api import sync_playwright

    built = build_page(model)
    _, address, _ = built.launch(prevent_thread_lock=True, quiet=True, server_port=None)
    flags = ["--no-sandbox", "--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream"]
    flags += [f"--use-file-for-fake-audio-capture={speech}"]
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        page = chromium.new_context(permissions=["microphone"]).new_page()
        page.set_default_timeout(30_000)
        page.goto(address)
        yield page
        chromium.close()
    built.close()


def upload(page, path):
    page.get_by_role("button", name="Upload file").click()
    page.set_input_files("input[type=file]", path)
    page.get_by_text("0:0").first.wait_for()  # the length of the recording
    page.get_by_role("button", name="Classify").click()


needs_chromium = pytest.mark.skipif(not CHROMIUM, reason="needs Debian's package chromium")


@needs_chromium
@pytest.mark.slow
def test_an_upload_shows_its_emotions_and_their_course(browser_page, model, speech):
    upload(browser_page, speech)
    expected = model(speech, hop_seconds=model.window_seconds / 4)
    shown = browser_page.locator(".output-class")
    shown.wait_for()
    assert shown.inner_text().strip() == expected.label
    browser_page.get_by_text("seconds (middle of the window)").wait_for()  # the plot is drawn
    text = browser_page.inner_text("body")
    for label, value in expected.probabilities.items():
        assert f"{label}\n{round(100 * value)}%" in text


@needs_chromium
@pytest.mark.slow
def test_what_the_microphone_hears_is_classified(browser_page, model):
    browser_page.get_by_role("button", name="Record").first.click()
    browser_page.wait_for_timeout(1500)
    browser_page.get_by_role("button", name="Stop").first.click()
    browser_page.get_by_text("0:0").first.wait_for()
    browser_page.get_by_role("button", name="Classify").click()
    shown = browser_page.locator(".output-class")
    shown.wait_for()
    assert shown.inner_text().strip() in model.labels


@needs_chromium
@pytest.mark.slow
def test_a_silent_recording_is_told_so(browser_page, tmp_path):
    soundfile.write(tmp_path / "silent.wav", np.zeros(16_000), 16_000)
    upload(browser_page, tmp_path / "silent.wav")
    told = browser_page.get_by_text("silent, every sample is below").first
    told.wait_for()
    assert told.inner_text().startswith("silent.wav: ")  # not the server's own path

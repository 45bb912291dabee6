"""The noises of the benchmark are what their names say, and the same for every model."""

import numpy as np
import pytest

from benchmarks.noise import DECAY, add, babble, reverberate, telephone, white
from serkd_jax.audio.waveform import SAMPLE_RATE

RNG = np.random.default_rng(0)
SECOND = np.arange(SAMPLE_RATE) / SAMPLE_RATE


@pytest.mark.parametrize("snr", [0.0, 10.0])
def test_noise_is_added_at_the_ratio_that_is_asked_for(snr):
    speech = (0.1 * np.sin(2 * np.pi * 440 * SECOND)).astype(np.float32)
    for noise in (white(speech), babble(speech, [RNG.normal(size=n) for n in (900, 40_000)])):
        added = add(speech, noise, snr) - speech
        assert added.dtype == np.float32
        assert 10 * np.log10(np.var(speech) / np.var(added)) == pytest.approx(snr, abs=0.1)
    np.testing.assert_array_equal(white(speech), white(speech.copy()))
    assert not np.array_equal(white(speech), white(-speech))
    silence = np.zeros(100, np.float32)
    np.testing.assert_array_equal(add(silence, white(silence), snr), silence)


def test_every_voice_of_the_babble_is_as_loud_as_the_others():
    low, high = (np.sin(2 * np.pi * f * SECOND) for f in (200, 3000))
    spectrum = np.abs(np.fft.rfft(babble(SECOND, [0.01 * low, 5 * high])))
    assert spectrum[200] == pytest.approx(spectrum[3000], rel=1e-3)


@pytest.mark.parametrize(
    ("frequency", "kept"), [(60, 0.0), (1000, 1.0), (2500, 1.0), (5000, 0.0), (7500, 0.0)]
)
def test_the_telephone_keeps_its_band_alone(frequency, kept):
    tone = np.sin(2 * np.pi * frequency * SECOND).astype(np.float32)
    heard = telephone(tone)
    assert heard.shape == tone.shape
    assert heard.dtype == np.float32
    assert np.std(heard[2000:-2000]) / np.std(tone) == pytest.approx(kept, abs=0.05)


def test_the_rooms_echoes_decay_by_60_db_in_the_given_time():
    impulse = np.zeros(SAMPLE_RATE, np.float32)
    impulse[0] = 1.0
    echoes = reverberate(impulse)
    assert echoes[0] == pytest.approx(1.0, abs=1e-4)
    assert np.sum(np.square(echoes[1:])) == pytest.approx(0.5, rel=0.01)
    parts = echoes[1:9601].reshape(12, 800)  # of 50 ms
    levels = 10 * np.log10(np.square(parts).mean(1))
    slope = np.polyfit(0.05 * np.arange(12), levels, 1)[0]
    assert slope == pytest.approx(-60 / DECAY, rel=0.05)

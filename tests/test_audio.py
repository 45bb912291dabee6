"""Audio files: what is read, and what each unusable file is told."""

import subprocess
import sys

import numpy as np
import pytest
import soundfile
from transformers import audio_utils

from serkd_jax import audio, frontends
from serkd_jax.audio import AudioError, read_audio


def sine(hz, seconds, rate=16_000, amplitude=0.5):
    return amplitude * np.sin(2 * np.pi * hz * np.arange(int(seconds * rate)) / rate)


def logmel(waveform, max_frames):
    ((_, features),) = frontends.LogMel()([waveform], max_frames)
    return features


def peak_hz(waveform, rate=16_000):
    return np.abs(np.fft.rfft(waveform)).argmax() * rate / len(waveform)


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 44_100, 48_000])
@pytest.mark.parametrize("kind", ["wav", "flac", "ogg"])
def test_resampling_keeps_frequency_level_and_duration(tmp_path, rate, kind):
    path = tmp_path / f"a.{kind}"
    soundfile.write(path, sine(440, 1.0, rate), rate)
    waveform = read_audio(path)
    assert waveform.dtype == np.float32
    assert abs(len(waveform) - 16_000) <= 2
    assert abs(peak_hz(waveform) - 440) <= 1
    assert np.abs(waveform[2000:-2000]).max() == pytest.approx(0.5, abs=0.02)


def test_resampling_removes_what_16_khz_cannot_hold(tmp_path):
    soundfile.write(tmp_path / "a.wav", sine(300, 1.0, 48_000) + sine(9_000, 1.0, 48_000), 48_000)
    spectrum = np.abs(np.fft.rfft(read_audio(tmp_path / "a.wav")))
    assert spectrum[6_900:7_100].max() < 1e-3 * spectrum[300]  # 9 kHz would fold to 7 kHz


def test_channels_are_averaged(tmp_path):
    stereo = np.stack([sine(200, 0.5), np.zeros(8000)], axis=1)
    soundfile.write(tmp_path / "a.wav", stereo, 16_000, "FLOAT")
    np.testing.assert_allclose(read_audio(tmp_path / "a.wav"), stereo.mean(axis=1), atol=1e-6)


def test_16_bit_audio_passes_through_unchanged(tmp_path):
    samples = np.random.default_rng(0).integers(-32768, 32768, 5000).astype(np.int16)
    soundfile.write(tmp_path / "a.wav", samples, 16_000)
    waveform = read_audio(tmp_path / "a.wav")
    np.testing.assert_array_equal(audio.to_int16(waveform), samples)
    np.testing.assert_array_equal(audio.to_float(samples), waveform)


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100])
@pytest.mark.parametrize("max_samples", [400, 3_217, 50_000])
def test_the_beginning_of_a_file_is_that_of_the_whole(tmp_path, rate, max_samples):
    noise = np.random.default_rng(0).normal(0, 0.1, 2 * rate)
    soundfile.write(tmp_path / "a.wav", noise, rate)
    whole, beginning = read_audio(tmp_path / "a.wav"), read_audio(tmp_path / "a.wav", max_samples)
    assert len(beginning) == min(max_samples, len(whole))
    np.testing.assert_allclose(beginning, whole[:max_samples], atol=1e-5)


def test_of_a_long_file_no_more_than_the_beginning_is_decoded(tmp_path, monkeypatch):
    soundfile.write(tmp_path / "a.wav", sine(300, 20), 16_000)
    decoded = []
    read = soundfile.SoundFile.read

    def count(file, *args, **kwargs):
        decoded.append(len(audio := read(file, *args, **kwargs)))
        return audio

    monkeypatch.setattr(soundfile.SoundFile, "read", count)
    assert len(read_audio(tmp_path / "a.wav", 16_000)) == 16_000
    assert decoded == [17_600]


def test_loud_float_audio_is_clipped_not_wrapped():
    np.testing.assert_array_equal(audio.to_int16(np.array([2.0, -2.0])), [32767, -32768])


def write(path, samples, subtype="FLOAT"):
    soundfile.write(path, samples, 16_000, subtype)


def truncate(path, keep):
    path.write_bytes(path.read_bytes()[:keep])


BAD_FILES = {
    "no such audio file": lambda path: None,
    "is empty": lambda path: path.touch(),
    "unreadable": lambda path: path.write_bytes(b"not audio at all" * 100),
    "truncated, 9956 of 32000 bytes": lambda path: (
        write(path, sine(200, 1), "PCM_16"),
        truncate(path, 10_000),
    ),
    "holds no samples": lambda path: write(path, np.zeros(0)),
    "less than one frame": lambda path: write(path, sine(200, 0.02)),
    "silent": lambda path: write(path, np.full(8000, 5e-5)),
    "NaN": lambda path: write(path, np.where(np.arange(8000) == 9, np.nan, 0.1)),
    "infinite": lambda path: write(path, np.where(np.arange(8000) == 9, np.inf, 0.1)),
}


@pytest.mark.parametrize("problem", BAD_FILES)
def test_unusable_file_is_named_with_its_problem(tmp_path, problem):
    path = tmp_path / "bad file.wav"
    BAD_FILES[problem](path)
    with pytest.raises(AudioError, match=problem) as error:
        read_audio(path)
    assert str(path) in str(error.value)
    assert ";" in str(error.value)  # the remedy


def test_truncated_flac_and_folder_are_unreadable(tmp_path):
    write(tmp_path / "a.flac", sine(200, 1), "PCM_16")
    truncate(tmp_path / "a.flac", 3000)
    with pytest.raises(AudioError, match=r"a\.flac"):
        read_audio(tmp_path / "a.flac")
    with pytest.raises(AudioError, match="no such audio file"):
        read_audio(tmp_path)


def test_wav_of_unknown_length_is_read(tmp_path):
    """Encoders that write to a pipe put 0xFFFFFFFF where the length belongs."""
    write(tmp_path / "a.wav", sine(200, 1), "PCM_16")
    data = bytearray((tmp_path / "a.wav").read_bytes())
    data[4:8] = data[40:44] = b"\xff\xff\xff\xff"
    (tmp_path / "a.wav").write_bytes(data)
    assert len(read_audio(tmp_path / "a.wav")) == 16_000


def log_mel_by_definition(waveform):
    """One frame at a time, straight from the definition."""
    n = np.arange(400)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * n / 400)
    dft = np.exp(-2j * np.pi * np.outer(np.arange(257), n) / 512)
    filters = audio_utils.mel_filter_bank(257, 80, 20.0, 8000.0, 16_000, "slaney", "slaney")
    frames = []
    for start in range(0, len(waveform) - 400 + 1, 320):
        power = np.abs(dft @ (window * waveform[start : start + 400])) ** 2
        frames.append((np.log10(np.maximum(power @ filters, 1e-8)) + 8) / 5)
    return np.array(frames)


@pytest.mark.parametrize("num_samples", [400, 719, 720, 16_000, 17_123])
def test_log_mel_equals_its_definition(num_samples):
    waveform = np.random.default_rng(1).normal(0, 0.1, num_samples).astype(np.float32)
    features = logmel(waveform, 1000)
    assert features.dtype == np.float16
    assert features.shape == (frontends.num_frames(num_samples), 80)
    np.testing.assert_allclose(features, log_mel_by_definition(waveform), atol=1e-3)


def test_log_mel_band_follows_the_tone():
    low, high = (logmel(sine(hz, 1), 50).mean(0).argmax() for hz in (300, 3000))
    centres = audio_utils.mel_to_hertz(
        np.linspace(*audio_utils.hertz_to_mel(np.array([20.0, 8000.0]), "slaney"), 82), "slaney"
    )[1:-1]
    assert abs(centres[low] - 300) < 40
    assert abs(centres[high] - 3000) < 120


def test_log_mel_of_digital_silence_is_zero_and_of_speech_level_about_one():
    silence, loud = logmel(np.zeros(16_000, np.float32), 50), logmel(sine(200, 1), 50)
    assert not silence.any()
    assert 1 < loud.max() < 2.5


def test_log_mel_sees_no_more_than_max_frames():
    waveform = np.random.default_rng(2).normal(0, 0.1, 16_000).astype(np.float32)
    changed = waveform.copy()
    changed[frontends.num_samples(10) :] = 0
    full, first, other = (logmel(w, n) for w, n in [(waveform, 99), (waveform, 10), (changed, 10)])
    np.testing.assert_array_equal(first, full[:10])
    np.testing.assert_array_equal(first, other)


def test_frame_grid_is_that_of_the_paper():
    assert frontends.num_samples(326) == 104_400
    assert frontends.num_samples(224) == 71_760
    assert [frontends.num_frames(n) for n in (400, 719, 720, 104_400)] == [1, 1, 2, 326]


def test_log_mel_fingerprint_tells_settings_apart():
    assert frontends.LogMel(40).fingerprint != frontends.LogMel(80).fingerprint
    assert frontends.LogMel(40).width == 40


def test_audio_frontends_and_corpora_need_no_tensorflow():
    code = (
        "import sys, serkd_jax.audio, serkd_jax.frontends, serkd_jax.data.corpora\n"
        "assert not {'tensorflow', 'tensorflow_datasets'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

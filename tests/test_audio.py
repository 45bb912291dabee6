"""Audio files: what is read, what each unusable file is told; and their log-mel features."""

import subprocess
import sys

import av
import numpy as np
import pytest
import scipy.fft
import soundfile
from transformers import audio_utils

from layouts import encode_aac, peak_hz, tone, write_mp4
from serkd_jax.audio import decoding, mfcc
from serkd_jax.audio.decoding import read_audio
from serkd_jax.audio.logmel import num_frames, num_samples
from serkd_jax.audio.waveform import AudioError, to_float, to_int16
from serkd_jax.encoders import frontends


def sine(hz, seconds, rate=16_000, amplitude=0.5):
    return amplitude * np.sin(2 * np.pi * hz * np.arange(int(seconds * rate)) / rate)


def logmel(waveform, max_frames):
    ((_, features),) = frontends.LogMel()([waveform], max_frames)
    return features


def write_noise(path, rate, seconds=2):
    noise = np.random.default_rng(0).normal(0, 0.1, seconds * rate).astype(np.float32)
    if path.suffix == ".mp4":
        write_mp4(path, noise, rate)
    else:
        soundfile.write(path, noise, rate)
    return path


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
    stereo, notices = np.stack([sine(200, 0.5), sine(300, 0.5)], axis=1), []
    soundfile.write(tmp_path / "a.wav", stereo, 16_000, "FLOAT")
    waveform = read_audio(tmp_path / "a.wav", notices=notices)
    np.testing.assert_allclose(waveform, stereo.mean(axis=1), atol=1e-6)
    assert not notices


def test_16_bit_audio_passes_through_unchanged(tmp_path):
    samples = np.random.default_rng(0).integers(-32768, 32768, 5000).astype(np.int16)
    soundfile.write(tmp_path / "a.wav", samples, 16_000)
    waveform = read_audio(tmp_path / "a.wav")
    np.testing.assert_array_equal(to_int16(waveform), samples)
    np.testing.assert_array_equal(to_float(samples), waveform)


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


def test_float_audio_is_rounded_to_the_nearest_and_clipped_not_wrapped():
    audio = np.array([0.6, -0.6, 99.4, -99.4, 20_000.4, 65_536, -65_536]) / 32_768
    np.testing.assert_array_equal(to_int16(audio), [1, -1, 99, -99, 20_000, 32_767, -32_768])


def write(path, samples, subtype="FLOAT"):
    soundfile.write(path, samples, 16_000, subtype)


def truncate(path, keep):
    path.write_bytes(path.read_bytes()[:keep])


BAD_FILES = {
    "no such audio file": lambda path: None,
    "is empty": lambda path: path.touch(),
    "unreadable": lambda path: path.write_bytes(b"not audio at all" * 100),
    "truncated, 9956 of 32000 bytes of audio are there": lambda path: (
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


@pytest.mark.parametrize("stated", [0xFFFFFFFF, 0x7FFFF000, 32_010])
def test_wav_of_unknown_or_slightly_wrong_length_is_read(tmp_path, stated):
    """Encoders that write to a pipe put a huge number where the length belongs."""
    write(tmp_path / "a.wav", sine(200, 1), "PCM_16")
    data = bytearray((tmp_path / "a.wav").read_bytes())
    data[4:8] = data[40:44] = stated.to_bytes(4, "little")
    (tmp_path / "a.wav").write_bytes(data)
    assert len(read_audio(tmp_path / "a.wav")) == 16_000


# Parts of files


@pytest.mark.parametrize("rate", [16_000, 44_100])
@pytest.mark.parametrize("kind", ["wav", "flac", "mp4"])
def test_a_part_of_a_file_is_that_of_the_whole(tmp_path, kind, rate):
    path = write_noise(tmp_path / f"a.{kind}", rate)
    whole = read_audio(path)
    # A resampler sees nothing beyond the edges of a part.
    inner = slice(None) if rate == 16_000 else slice(400, -400)
    tolerance = 0 if rate == 16_000 else 1e-5
    for settings, expected in [
        ({"start": 0.5, "end": 1.25}, whole[8_000:20_000]),
        ({"end": 0.75}, whole[:12_000]),
        ({"start": 1.5}, whole[24_000:]),
        ({"start": 0.5, "end": 1.25, "max_samples": 3_000}, whole[8_000:11_000]),
        ({"start": 0.5, "end": 0.75, "max_samples": 9_000}, whole[8_000:12_000]),
    ]:
        part = read_audio(path, **settings)
        assert len(part) == len(expected)
        np.testing.assert_allclose(part[inner], expected[inner], rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", ["wav", "flac", "mp4"])
@pytest.mark.parametrize(
    ("start", "end", "problem"),
    [
        (5.0, None, "ends before 5 s, the start"),
        (5.0, 6.0, "ends before 5 s, the start"),
        (1.0, 3.0, r"ends (1\.00|0\.95) s before 3 s"),  # the last frame of AAC is filled up
        (1.0, 0.5, "cannot read from 1 s to 0.5 s"),
        (1.0, 1.0, "cannot read from 1 s to 1.0 s"),
        (-1.0, None, "cannot read from -1 s"),
        (np.nan, None, "cannot read from nan s"),
        (0.0, np.nan, "cannot read from 0 s to nan s"),
    ],
)
def test_a_part_that_the_file_does_not_have_is_refused(tmp_path, kind, start, end, problem):
    path = write_noise(tmp_path / f"a.{kind}", 16_000)
    with pytest.raises(AudioError, match=problem) as error:
        read_audio(path, start=start, end=end)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("kind", ["wav", "flac"])
def test_a_file_may_end_a_little_before_the_part(tmp_path, kind):
    path = write_noise(tmp_path / f"a.{kind}", 16_000)
    close = 2 + decoding.END_TOLERANCE
    np.testing.assert_array_equal(
        read_audio(path, start=1, end=close - 0.01), read_audio(path, start=1)
    )
    with pytest.raises(AudioError, match=r"ends 0\.26 s before"):
        read_audio(path, start=1, end=close + 0.01)


# Videos


@pytest.mark.parametrize(
    ("rate", "channels"),
    [(16_000, 1), (16_000, 2), (44_100, 1), (44_100, 2), (44_100, 6), (48_000, 3), (48_000, 6)],
)
@pytest.mark.parametrize("kind", ["mp4", "m4a"])
def test_the_sound_of_a_video_keeps_frequency_level_and_duration(tmp_path, kind, rate, channels):
    sound = sine(440, 1.0, rate).astype(np.float32)
    waveform = read_audio(write_mp4(tmp_path / f"a.{kind}", sound, rate, channels=channels))
    assert waveform.dtype == np.float32
    assert 0 <= len(waveform) - 16_000 <= 1024 * 16_000 / rate  # AAC has frames of 1024 samples
    assert abs(peak_hz(waveform[:16_000]) - 440) <= 1
    assert waveform[2_000:14_000].std() == pytest.approx(0.5 / np.sqrt(2), rel=0.05)


@pytest.mark.parametrize("rate", [16_000, 44_100])
@pytest.mark.parametrize("max_samples", [400, 3_217, 50_000])
def test_the_beginning_of_a_video_is_that_of_the_whole(tmp_path, rate, max_samples):
    path = write_noise(tmp_path / "a.mp4", rate)
    np.testing.assert_array_equal(read_audio(path, max_samples), read_audio(path)[:max_samples])


def whole_mp4(path, **options):
    return write_mp4(path, sine(200, 3).astype(np.float32), options=options)


def truncate_share(path, share):
    truncate(path, int(path.stat().st_size * share))


def cut_between_frames(path):
    whole_mp4(path, movflags="faststart")
    with av.open(str(path)) as container:
        places = [packet.pos for packet in container.demux(audio=0) if packet.size]
    truncate(path, places[len(places) // 2])


BAD_VIDEOS = [
    (lambda path: write_mp4(path, None), "has no audio track"),
    (lambda path: write_mp4(path, np.zeros(16_000, np.float32)), "silent"),
    (lambda path: path.touch(), "is empty"),
    (lambda path: path.write_bytes(b"not a video at all" * 100), "unreadable"),
    (lambda path: truncate_share(whole_mp4(path), 1 / 2), "truncated"),
    (lambda path: truncate_share(whole_mp4(path, movflags="faststart"), 2 / 3), "truncated"),
    (cut_between_frames, r"truncated, at least \d+ bytes are missing"),
]


@pytest.mark.parametrize(("make", "problem"), BAD_VIDEOS)
def test_unusable_video_is_named_with_its_problem(tmp_path, make, problem):
    path = tmp_path / "dia1 utt2.mp4"
    make(path)
    with pytest.raises(AudioError, match=problem) as error:
        read_audio(path)
    assert str(path) in str(error.value)
    assert ";" in str(error.value)  # the remedy


def test_a_packet_that_cannot_be_decoded_is_dropped_as_ffmpeg_drops_it(tmp_path):
    path = write_mp4(tmp_path / "a.mp4", tone(400, seconds=2.0))
    with av.open(str(path)) as container:
        packets = [p for p in container.demux(container.streams.audio[0]) if p.size]
    content = bytearray(path.read_bytes())
    damaged = packets[len(packets) // 2]
    content[damaged.pos : damaged.pos + damaged.size] = b"\xff" * damaged.size
    path.write_bytes(content)
    waveform = read_audio(path)
    assert 1.85 < len(waveform) / 16_000 < 2.1
    assert peak_hz(waveform) == pytest.approx(400, abs=2)


def test_the_guessed_length_of_raw_aac_is_not_believed(tmp_path):
    """FFmpeg guesses from the first bit rate: quiet, then loud, looks much too long."""
    noise = np.random.default_rng(0).normal(0, 0.2, 6 * 16_000).astype(np.float32)
    waveform = np.concatenate([0.001 * tone(400, seconds=3.0), noise])
    path = tmp_path / "a.aac"
    with av.open(str(path), "w", format="adts") as container:
        track = container.add_stream("aac", rate=16_000, layout="mono")
        encode_aac(container, track, waveform)
    assert len(read_audio(path)) / 16_000 == pytest.approx(9, abs=0.2)


# Log-mel


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
    assert features.shape == (num_frames(num_samples), 80)
    np.testing.assert_allclose(features, log_mel_by_definition(waveform), atol=1e-3)


@pytest.mark.parametrize("num_samples", [400, 719, 720, 16_000, 17_123])
def test_mfcc_are_the_cosine_transform_of_the_levels_of_mel_bands(num_samples):
    waveform = np.random.default_rng(1).normal(0, 0.1, num_samples).astype(np.float32)
    waveform *= np.linspace(0, 1, num_samples)  # so that some bands fall below the range
    waveform[: num_samples // 2] *= 1e-5
    ((_, features),) = frontends.Mfcc(39)([waveform], 1000)
    assert features.dtype == np.float16
    assert features.shape == (num_frames(num_samples), 39)
    filters = audio_utils.mel_filter_bank(1025, 128, 0.0, 8000.0, 16_000, "slaney", "slaney")
    window = np.hanning(mfcc.WINDOW + 1)[:-1]
    padded = np.pad(waveform, mfcc.WINDOW)
    levels = []
    for t in range(num_frames(num_samples)):
        start = mfcc.WINDOW + 320 * t + 200 - mfcc.WINDOW // 2
        power = np.abs(np.fft.rfft(padded[start : start + mfcc.WINDOW] * window, 2048)) ** 2
        levels.append(power @ filters)
    levels = audio_utils.power_to_db(np.array(levels), 1.0, 1e-10, 80.0)
    expected = scipy.fft.dct(levels, norm="ortho", axis=-1)[:, :39]
    np.testing.assert_allclose(features, expected, rtol=1e-3, atol=0.05)


@pytest.mark.parametrize("num_samples", [400, 719, 720, 16_000, 17_123])
def test_spectra_are_two_spectra_and_two_cepstra_around_the_centre_of_each_frame(num_samples):
    """As librosa computes them every 10 ms with a window of 2,048 samples, after pre-emphasis."""
    waveform = np.random.default_rng(1).normal(0, 0.1, num_samples).astype(np.float32)
    waveform *= np.linspace(0, 1, num_samples) ** 8  # so that some are below the range
    ((_, features),) = frontends.Spectra()([waveform], 1000)
    assert features.dtype == np.float16
    assert features.shape == (num_frames(num_samples), 480)
    emphasized = np.array([x - 0.97 * waveform[max(i - 1, 0)] for i, x in enumerate(waveform)])
    padded = np.pad(emphasized, 2048)
    filters = audio_utils.mel_filter_bank(1025, 128, 0.0, 8000.0, 16_000, "slaney", "htk")
    amplitudes, powers = [], []
    for t in range(num_frames(num_samples)):
        for centre in (320 * t + 120, 320 * t + 280):
            short, long = (padded[2048 + centre - n // 2 :][:n] for n in (640, 2048))
            amplitudes.append(np.abs(np.fft.rfft(short * np.hamming(641)[:-1], 800)))
            powers.append(np.abs(np.fft.rfft(long * np.hanning(2049)[:-1])) ** 2 @ filters)
    levels = audio_utils.amplitude_to_db(np.array(amplitudes), np.max(amplitudes), 1e-5, 80.0)
    mel = audio_utils.power_to_db(np.array(powers), 1.0, 1e-10, 80.0)
    cepstra = scipy.fft.dct(mel, norm="ortho", axis=-1)[:, :40]
    expected = [levels[:, :200].reshape(-1, 400), cepstra.reshape(-1, 80)]
    np.testing.assert_allclose(features, np.hstack(expected), rtol=1e-3, atol=0.05)


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
    changed[num_samples(10) :] = 0
    full, first, other = (logmel(w, n) for w, n in [(waveform, 99), (waveform, 10), (changed, 10)])
    np.testing.assert_array_equal(first, full[:10])
    np.testing.assert_array_equal(first, other)


def test_frame_grid_is_that_of_the_paper():
    assert num_samples(326) == 104_400
    assert num_samples(224) == 71_760
    assert [num_frames(n) for n in (400, 719, 720, 104_400)] == [1, 1, 2, 326]


def test_log_mel_fingerprint_tells_settings_apart():
    assert frontends.LogMel(40).fingerprint != frontends.LogMel(80).fingerprint
    assert frontends.LogMel(40).width == 40


# Imports


def test_audio_frontends_and_corpora_need_no_tensorflow():
    code = (
        "import sys, serkd_jax.audio.decoding, serkd_jax.data.corpora\n"
        "import serkd_jax.encoders.frontends\n"
        "assert not {'tensorflow', 'tensorflow_datasets'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

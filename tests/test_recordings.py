"""Recordings as they come: cut off, unfinished, misnamed, of odd channels and levels."""

import os
import re
import subprocess
import sys

import av
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
import torch

from exported_models import write_model
from layouts import ROOT, SHARED
from recordings import KINDS, RATE, make_recording, tone
from serkd_jax.audio.containers import missing_bytes
from serkd_jax.audio.decoding import read_audio
from serkd_jax.audio.waveform import AudioError, downmix, is_silent, to_float, to_int16
from serkd_jax.predict import load_model

FAULTS = SHARED.parent / "faults"


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_is_cut_off_is_named_whatever_its_container(tmp_path, kind):
    path = make_recording(tmp_path, kind)
    content = path.read_bytes()
    assert missing_bytes(path) == 0
    assert len(read_audio(path)) == pytest.approx(3 * RATE, abs=2000)
    for length in (int(0.93 * len(content)), int(0.71 * len(content)), int(0.4 * len(content)), 60):
        path.write_bytes(content[:length])
        with pytest.raises(AudioError, match=r"truncated|unreadable"):
            read_audio(path)


# libsndfile and FFmpeg decode Opus differently.
@pytest.mark.parametrize("kind", [k for k in KINDS if k[:2] == "a." and k != "a.opus"])
@pytest.mark.parametrize("suffix", ["wav", "mp4", "au"])
def test_a_file_is_decoded_by_what_it_is_and_not_by_its_suffix(tmp_path, kind, suffix):
    path = make_recording(tmp_path, kind)
    expected = read_audio(path)
    other = path.rename(tmp_path / f"b.{suffix}")
    np.testing.assert_array_equal(read_audio(other), expected)


@pytest.mark.parametrize(
    ("kind", "there", "instead", "told"),
    [
        ("a.mkv", b"A_AAC", b"A_XYZ", "no decoder knows its audio"),
        ("a.caf", b"lpcm", b"xxxx", "no decoder knows its audio"),
        ("a.caf", b"\x40\xcf\x40", bytes(3), "no samples"),  # its rate
        ("a.webm", b"A_OPUS", b"A_FLAC", "no samples"),
    ],
)
def test_a_track_that_no_decoder_can_read_is_told(tmp_path, kind, there, instead, told):
    path = make_recording(tmp_path, kind)
    path.write_bytes(path.read_bytes().replace(there, instead))
    with pytest.raises(AudioError, match=told):
        read_audio(path)


@pytest.mark.parametrize("stated", [0, 1000, 30_000])
def test_a_header_that_was_never_finished_loses_no_audio(tmp_path, stated):
    path = tmp_path / "a.wav"
    soundfile.write(path, tone(), RATE)
    expected, content = read_audio(path), bytearray(path.read_bytes())
    place = content.index(b"data") + 4
    content[place : place + 4] = stated.to_bytes(4, "little")
    path.write_bytes(content)
    notices = []
    np.testing.assert_array_equal(read_audio(path, notices=notices), expected)
    assert notices == [f"its header states {stated} bytes of audio, but all 96000 are read"]


@pytest.mark.parametrize(("name", "place", "order"), [("a.au", 8, "big"), ("a.rf64", 28, "little")])
def test_other_headers_that_were_never_finished_lose_no_audio(tmp_path, name, place, order):
    path, notices = tmp_path / name, []
    soundfile.write(path, tone(), RATE, format={"rf64": "RF64"}.get(path.suffix[1:]))
    expected, content = read_audio(path), bytearray(path.read_bytes())
    content[place : place + 4] = (1000).to_bytes(4, order)
    path.write_bytes(content)
    np.testing.assert_array_equal(read_audio(path, notices=notices), expected)
    assert notices == ["its header states 1000 bytes of audio, but all 96000 are read"]


def test_a_flac_file_of_unknown_length_is_read(tmp_path):
    path = tmp_path / "a.flac"
    soundfile.write(path, tone(), RATE)
    content = bytearray(path.read_bytes())
    content[21:26] = bytes([content[21] & 0xF0, 0, 0, 0, 0])  # as written into a pipe
    path.write_bytes(content)
    assert len(read_audio(path)) == 3 * RATE


@pytest.mark.parametrize("lost", [10, 100, 3000])
def test_the_end_of_a_flac_file_that_is_cut_off_is_missed(tmp_path, lost):
    path = make_recording(tmp_path, "a.flac")
    path.write_bytes(path.read_bytes()[:-lost])
    with pytest.raises(AudioError, match=r"truncated|unreadable"):
        read_audio(path)


@pytest.mark.parametrize("comment", ["", "# f\xfcr\n"])
def test_a_playlist_opens_no_other_file(tmp_path, comment):
    soundfile.write(tmp_path / "other.wav", tone(), RATE)
    text = f"ffconcat version 1.0\n{comment}file other.wav\n"
    (tmp_path / "a.wav").write_text(text, encoding="latin-1")
    with pytest.raises(AudioError, match="unreadable"):
        read_audio(tmp_path / "a.wav")


@pytest.mark.parametrize("place", [20, 34])  # the codec, the bits of a sample
def test_a_wav_of_no_known_codec_is_told(tmp_path, place):
    path = make_recording(tmp_path, "a.wav")
    content = bytearray(path.read_bytes())
    content[place] = 99 if place == 20 else 0
    path.write_bytes(content)
    with pytest.raises(AudioError, match="no decoder knows its audio"):
        read_audio(path)


def test_chunks_after_the_audio_are_no_audio(tmp_path):
    path, notices = tmp_path / "a.wav", []
    soundfile.write(path, tone(), RATE)
    path.write_bytes(path.read_bytes() + b"LIST" + (6).to_bytes(4, "little") + b"INFOab")
    assert len(read_audio(path, notices=notices)) == 3 * RATE
    assert not notices


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git-lfs pointer"),
        (b"\n<!DOCTYPE html><html><body>Sign in</body></html>" * 20, "a web page"),
        (b"PK\x03\x04" + bytes(500), "an archive"),
        (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n" + bytes(500), "a document"),
        (b"\x89PNG\r\n\x1a\n" + bytes(500), "a picture"),
        (b'{"error": "not found"}', r"a text that begins with '\{\"error\""),
        (bytes(5000), "nothing but zeros"),
    ],
)
def test_what_is_no_audio_is_named_as_what_it_is(tmp_path, content, told):
    for name in ("a.wav", "a.mp3", "a.mp4", "a.au"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(AudioError, match=told):
            read_audio(tmp_path / name)


VOICE, OTHER = tone(), tone(330)
SILENT = np.zeros_like(VOICE)


@pytest.mark.parametrize(
    ("channels", "expected", "told"),
    [
        ([VOICE, OTHER], (VOICE + OTHER) / 2, ""),
        ([VOICE, VOICE], VOICE, ""),
        ([VOICE, SILENT], VOICE, "1 of its 2 channels are silent"),
        ([SILENT + 0.2, VOICE], VOICE, "1 of its 2 channels are silent"),
        ([VOICE, -VOICE], VOICE, "cancel"),
        ([VOICE, -0.8 * VOICE], VOICE, "cancel"),
        ([SILENT, SILENT, VOICE, SILENT, SILENT], VOICE, "4 of its 5 channels are silent"),
        ([VOICE] * 6, VOICE, "6 channels are averaged"),
        ([VOICE] * 8, VOICE, "8 channels are averaged"),
    ],
)
@pytest.mark.parametrize("kind", ["wav", "flac", "mka"])
def test_channels_are_mixed_by_one_rule_with_a_notice(tmp_path, channels, expected, told, kind):
    path, notices = tmp_path / f"a.{kind}", []
    stacked = np.stack(channels, axis=1)
    if kind == "mka":
        layout = {2: "stereo", 5: "5.0", 6: "5.1", 8: "7.1"}[len(channels)]
        with av.open(str(path), "w", format="matroska") as file:
            stream = file.add_stream("pcm_s16le", rate=RATE)
            stream.layout = layout
            frame = av.AudioFrame.from_ndarray(
                to_int16(stacked).reshape(1, -1), format="s16", layout=layout
            )
            frame.sample_rate = RATE
            file.mux(stream.encode(frame))
            file.mux(stream.encode(None))
    else:
        soundfile.write(path, stacked, RATE)
    np.testing.assert_allclose(read_audio(path, notices=notices), expected, atol=2e-4)
    assert told in "; ".join(notices)
    assert bool(notices) == bool(told)
    np.testing.assert_allclose(downmix(stacked), expected, atol=1e-6)


def test_a_float_file_above_full_scale_is_scaled_and_told(tmp_path):
    path, notices = tmp_path / "a.wav", []
    soundfile.write(path, 12 * tone(), RATE, "FLOAT")
    waveform = read_audio(path, notices=notices)
    assert np.abs(waveform).max() == pytest.approx(1)
    assert np.corrcoef(waveform, tone())[0, 1] > 0.9999  # nothing is clipped
    assert notices[0].startswith("its peak is 4.")


@pytest.mark.parametrize("peak", [9.9e-5, 1.0e-4, 1.03e-4, 1.06e-4])
def test_silence_is_what_16_bits_hold(peak):
    audio = np.tile([peak, -peak], 4000).astype(np.float32)
    assert is_silent(audio) == is_silent(to_float(to_int16(audio)))


def test_a_constant_is_silence(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.full(16_000, 0.4), RATE)
    with pytest.raises(AudioError, match=r"silent, .* beside a constant"):
        read_audio(tmp_path / "a.wav")


def test_a_rate_that_is_none_of_audio_is_refused(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(), 500)
    with pytest.raises(AudioError, match="500 Hz is not a rate of audio"):
        read_audio(tmp_path / "a.wav")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_model(write_model(tmp_path_factory.mktemp("made") / "m"))


@pytest.mark.parametrize(
    "convert",
    [
        lambda x: to_int16(x).astype(np.int32),
        lambda x: to_int16(x).astype(np.int64),
        lambda x: (to_int16(x).astype(np.int64) << 16).astype(np.int32),
        lambda x: to_int16(x).astype(np.int32) << 8,  # 24 bits
        lambda x: to_int16(x).astype(np.int64) << 16,  # 32 bits
        lambda x: (to_int16(x).astype(np.int32) + 32_768).astype(np.uint64),
        lambda x: torch.tensor(x).bfloat16(),
        tuple,
        lambda x: np.stack([x, x]),
        lambda x: np.stack([x, x], axis=1),
        jnp.asarray,
        torch.tensor,
        lambda x: torch.tensor(x, requires_grad=True),
        lambda x: x.tolist(),
        lambda x: x.astype(np.float64),
    ],
)
def test_samples_of_every_kind_give_the_same_label(model, convert):
    expected = model(tone())
    found = model(convert(tone()))
    assert found.label == expected.label
    np.testing.assert_allclose(
        [*found.probabilities.values()], [*expected.probabilities.values()], atol=1e-3
    )


@pytest.mark.parametrize("samples", [None, "no such file", {}, [[]], object(), [1, [2]], b"RIFF"])
def test_what_is_neither_a_file_nor_samples_is_told_in_one_line(model, samples):
    with pytest.raises(AudioError) as error:
        model(samples)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("rate", ["8000", None, True, float("nan"), 0, -16_000])
def test_a_rate_that_is_no_number_of_hertz_is_refused(model, rate):
    with pytest.raises(AudioError, match="is not a rate of audio"):
        model(tone(), rate)


def test_a_file_of_constants_fails_and_the_next_ones_are_predicted(model, tmp_path):
    steps = np.repeat([0.1, 0.3, -0.2], RATE)  # silent in each window, and not in all
    soundfile.write(tmp_path / "steps.wav", steps, RATE)
    soundfile.write(tmp_path / "tone.wav", tone(), RATE)
    first, second = model.predict([tmp_path / "steps.wav", tmp_path / "tone.wav"])
    assert "silent" in getattr(first, "error", "") or first.windows
    assert second.label


@pytest.mark.skipif(not FAULTS.is_dir(), reason="no shared inputs")
@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("aac_in.wav", ""),
        ("webm_in.wav", ""),
        ("mono.wav", ""),
        ("riff_data_0.wav", "note: .*but all 48000 are read"),
        ("data_size_too_small.wav", "note: .*16000 bytes of audio, but all 48000"),
        ("stereo_inverted.wav", "note: .*cancel each other"),
        ("float_peak_3.6.wav", "note: .*scaled down"),
        ("git_lfs_pointer.wav", "error: .*git-lfs pointer"),
        ("dc_only.wav", "error: .*silent"),
        ("truncated.mp3", "error: .*truncated"),
    ],
)
def test_recordings_that_people_sent(name, told, model):
    (result,) = model.predict([FAULTS / name])
    if told.startswith("error"):
        re.search(told, f"error: {result.error}") or pytest.fail(result.error)
    else:
        notes = "".join(f"note: {notice}" for notice in result.notices)
        assert bool(told) == bool(notes)
        assert not told or re.search(told, notes), notes


def test_the_command_prints_notes_beside_the_label(tmp_path):
    folder = write_model(tmp_path / "m")
    soundfile.write(tmp_path / "a.wav", np.stack([tone(), -tone()], axis=1), RATE)
    command = [sys.executable, "-m", "serkd_jax.predict", f"--model={folder}", "a.wav"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("a.wav: ")
    assert "note: a.wav: its 2 channels cancel each other: channel 1 is used" in done.stderr


def test_a_name_that_is_no_text_is_predicted_or_told(tmp_path):
    folder = write_model(tmp_path / "m")
    for name, samples in ((b"/\xff.wav", tone()), (b"/\xfe.wav", np.zeros(9000))):
        soundfile.write(tmp_path / "a.wav", samples, RATE)
        os.rename(tmp_path / "a.wav", os.fsencode(tmp_path) + name)
    command = [
        sys.executable,
        "-m",
        "serkd_jax.predict",
        f"--model={folder}",
        b"\xff.wav",
        b"\xfe.wav",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, env=environment)
    assert done.stdout.decode().startswith("\ufffd.wav: ")
    assert done.stderr.decode().startswith("error: \ufffd.wav: silent")

"""A recording in every kind of file that can be made here."""

import av
import numpy as np
import soundfile

from serkd_jax.audio.waveform import to_int16

RATE = 16_000
# Name -> subtype and format of libsndfile, or codec, format and options of FFmpeg.
BY_LIBSNDFILE = {
    "a.wav": ("PCM_16", "WAV"),
    "24.wav": ("PCM_24", "WAV"),
    "float.wav": ("FLOAT", "WAV"),
    "ulaw.wav": ("ULAW", "WAV"),
    "ima.wav": ("IMA_ADPCM", "WAV"),
    "ms.wav": ("MS_ADPCM", "WAV"),
    "gsm.wav": ("GSM610", "WAV"),
    "extensible.wav": ("PCM_16", "WAVEX"),
    "rf64.wav": ("PCM_16", "RF64"),
    "a.w64": ("PCM_16", "W64"),
    "a.flac": ("PCM_16", "FLAC"),
    "a.ogg": ("VORBIS", "OGG"),
    "a.opus": ("OPUS", "OGG"),
    "a.mp3": ("MPEG_LAYER_III", "MP3"),
    "a.aiff": ("PCM_16", "AIFF"),
    "a.au": ("PCM_16", "AU"),
    "a.snd": ("ALAW", "AU"),
    "a.caf": ("PCM_16", "CAF"),
    "alac.caf": ("ALAC_16", "CAF"),
    "a.sph": ("PCM_16", "NIST"),
}
BY_FFMPEG = {
    "a.m4a": ("aac", "ipod", {}),
    "alac.m4a": ("alac", "ipod", {}),
    "a.mp4": ("aac", "mp4", {"movflags": "faststart"}),
    "fragments.mp4": ("aac", "mp4", {"movflags": "frag_keyframe+empty_moov"}),
    "a.mov": ("aac", "mov", {}),
    "a.mkv": ("aac", "matroska", {}),
    "a.webm": ("libopus", "webm", {}),
    "live.webm": ("libopus", "webm", {"live": "1"}),  # as browsers record
    "a.avi": ("libmp3lame", "avi", {}),
    "cbr.mp3": ("libmp3lame", "mp3", {"write_xing": "0"}),
    "xing.mp3": ("libmp3lame", "mp3", {}),
    "a.aac": ("aac", "adts", {}),
    "a.wma": ("wmav2", "asf", {}),
    "a.wv": ("wavpack", "wv", {}),
    "a.amr": ("libopencore_amrnb", "amr", {}),
    "stream.flac": ("flac", "flac", {}),
}
KINDS = [*BY_LIBSNDFILE, *BY_FFMPEG]


def tone(hertz=220.0, seconds=3.0, level=0.3):
    """A tone in a little noise."""
    time = np.arange(round(seconds * RATE)) / RATE
    noise = np.random.default_rng(0).normal(0, 0.01, len(time))
    return (level * np.sin(2 * np.pi * hertz * time) + noise).astype(np.float32)


def make_recording(folder, name, seconds=3.0):
    """Writes a tone as the kind of file of that name, and returns its path."""
    path, samples = folder / name, tone(seconds=seconds)
    if name in BY_FFMPEG:
        _encode(path, samples, *BY_FFMPEG[name])
    else:
        subtype, container = BY_LIBSNDFILE[name]
        soundfile.write(path, samples, RATE, subtype, format=container)
    return path


def _encode(path, samples, codec, container, options):
    rate, bit_rate = {"libopencore_amrnb": (8_000, 12_200), "libopus": (48_000, 32_000)}.get(
        codec, (RATE, 32_000)
    )
    frame = av.AudioFrame.from_ndarray(to_int16(samples)[None], format="s16", layout="mono")
    frame.sample_rate = RATE
    with av.open(str(path), "w", format=container, options=options) as file:
        track = file.add_stream(codec, rate=rate, layout="mono")
        track.bit_rate = bit_rate
        track.codec_context.open()
        convert = av.AudioResampler(track.format, "mono", rate, track.frame_size or 1024)
        for block in (*convert.resample(frame), *convert.resample(None), None):
            file.mux(track.encode(block))

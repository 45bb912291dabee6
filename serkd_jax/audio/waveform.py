"""16 kHz mono waveforms in memory: checks, and conversion for 16-bit storage, in pure NumPy."""

import numpy as np

from serkd_jax.errors import UserError

SAMPLE_RATE = 16_000  # Hz
FULL_SCALE = 32_768  # of 16-bit samples
MIN_SAMPLES = 400  # one 25 ms frame, the shortest input of encoders and of the log-mel front-end
SILENCE_PEAK = 1e-4  # about three steps of 16-bit audio
SILENT_CHANNEL = 0.1  # of the loudest channel's level
CANCELLED = 0.5  # of the level that a mix of unrelated channels has
OVERSHOOT = 1.5  # of full scale, by decoders of lossy formats
LOUDEST_PEAK = 10  # decoders may overshoot full scale a little; more means another scale


class AudioError(UserError):
    """An audio file cannot be used; the message names it, the problem and the remedy."""


def downmix(channels: np.ndarray, notices: list[str] | None = None) -> np.ndarray:
    """Mixes (n, channels) samples to one channel, (n,): the mean of those that hold sound.

    A channel 20 dB below the loudest holds none. Where channels cancel, as one does that is
    inverted, the loudest is taken alone.

    Args:
        channels: float samples.
        notices: gets a sentence if the result is not the mean of one or two channels.
    """
    count = channels.shape[1]
    if count == 1 or not len(channels):
        return channels[:, 0]
    level = channels.std(axis=0)
    heard = level >= SILENT_CHANNEL * level.max()
    mono = channels[:, heard].mean(axis=1)
    notice = ""
    # Channels that have nothing to do with each other have this level after mixing.
    unrelated = np.sqrt(np.square(level[heard]).mean() / heard.sum())
    if mono.std() < CANCELLED * unrelated:
        loudest = int(np.argmax(level > 0.99 * level.max()))
        mono = channels[:, loudest]
        notice = f"its {count} channels cancel each other: channel {loudest + 1} is used"
    elif not heard.all():
        notice = f"{count - heard.sum()} of its {count} channels are silent and not used"
    elif count > 2:
        notice = f"its {count} channels are averaged"
    if notice and notices is not None:
        notices.append(notice)
    return mono


def to_full_scale(audio: np.ndarray, notices: list[str] | None = None) -> np.ndarray:
    """Divides samples that go beyond full scale by their peak, so that none is clipped.

    Args:
        audio: (n,) float samples.
        notices: gets a sentence if the peak is beyond what decoders overshoot.
    """
    peak = np.abs(audio).max(initial=0)
    if not 1 < peak <= LOUDEST_PEAK:
        return audio
    if peak > OVERSHOOT and notices is not None:
        notices.append(f"its peak is {peak:.3g} of full scale: it is scaled down")
    return audio / peak


def check_audio(audio: np.ndarray, name: object) -> np.ndarray:
    """Returns float (num_samples,) 16 kHz audio unchanged, or says why it cannot be used.

    Raises:
        AudioError: names the audio by `name`; see `read_audio`.
    """
    if len(audio) == 0:
        raise AudioError(f"{name}: holds no samples; remove it or copy it from the corpus again")
    if len(audio) < MIN_SAMPLES:
        raise AudioError(
            f"{name}: {len(audio)} samples at 16 kHz are less than one frame of {MIN_SAMPLES} "
            "(25 ms); remove it"
        )
    if not np.isfinite(audio).all():
        raise AudioError(f"{name}: holds NaN or infinite samples; convert it again from the source")
    if np.abs(audio).max() > LOUDEST_PEAK:
        raise AudioError(
            f"{name}: samples of {np.abs(audio).max():g}, where full scale is 1; divide them by it"
        )
    if is_silent(audio):
        beside = " beside a constant" if np.abs(audio).max() > SILENCE_PEAK else ""
        raise AudioError(
            f"{name}: silent, every sample is below {SILENCE_PEAK:g} of full scale{beside}; "
            "remove it or record it again"
        )
    return audio


def check_rate(rate: object, name: object) -> None:
    """Raises an `AudioError` if `rate`, in Hz, is not a rate of audio."""
    if not isinstance(rate, int | float | np.number) or not 1000 <= rate <= 1_000_000:
        raise AudioError(f"{name}: {rate} Hz is not a rate of audio")


def is_silent(audio: np.ndarray) -> bool:
    """Whether samples are silence in 16 bits; a constant is no sound."""
    return np.abs(to_float(to_int16(audio - audio.mean()))).max() < SILENCE_PEAK


def to_int16(audio: np.ndarray) -> np.ndarray:
    """Converts float audio of full scale 1 to int16, clipped; exact for 16-bit 16 kHz sources."""
    return np.clip(np.rint(audio * FULL_SCALE), -FULL_SCALE, FULL_SCALE - 1).astype(np.int16)


def to_float(audio: np.ndarray) -> np.ndarray:
    """Converts int16 (num_samples,) to float32 of full scale 1, the inverse of `to_int16`."""
    return audio.astype(np.float32) / FULL_SCALE

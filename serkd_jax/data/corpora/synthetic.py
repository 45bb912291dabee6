"""An embedded corpus that needs no download: vowel-like syllables in four manners of speaking."""

import dataclasses
from typing import Any, ClassVar

import numpy as np

from serkd_jax.audio.waveform import SAMPLE_RATE
from serkd_jax.data.corpora.base import CorpusError, SpeechCorpus, Utterance


@dataclasses.dataclass(frozen=True)
class _Manner:
    """How an emotion sounds in the synthetic corpus, relative to the speaker's own voice."""

    pitch: float  # semitones above the speaker's base
    pitch_range: float  # semitones of movement
    slope: float  # semitones of rise over the utterance
    level: float  # dB
    rate: float  # syllables per second
    tilt: float  # dB per octave of the voice source


class Synthetic(SpeechCorpus):
    """An embedded corpus that needs no download: vowel-like syllables in four manners of speaking.

    Speakers differ in base pitch, vocal tract length, timbre and loudness by about as much as the
    classes do, and every utterance deviates from its class, so that the classes can be learned but
    overlap. Two speakers form a session. The audio depends only on `seed` and the utterance.
    """

    name = "synthetic"
    MANNERS: ClassVar[dict[str, _Manner]] = {
        "angry": _Manner(4.0, 3.0, -2.0, 5.0, 5.2, -7.0),
        "happy": _Manner(4.5, 4.5, 2.0, 2.0, 5.0, -9.0),
        "neutral": _Manner(0.0, 2.0, -1.0, 0.0, 4.4, -10.0),
        "sad": _Manner(-1.5, 1.0, -1.5, -4.0, 3.2, -12.5),
    }
    CLASSES = tuple(sorted(MANNERS))

    def __init__(
        self,
        num_speakers: int = 8,
        utterances_per_class: int = 12,
        min_seconds: float = 1.0,
        max_seconds: float = 2.0,
        seed: int = 0,
    ):
        super().__init__()
        self.parameters = {
            "num_speakers": num_speakers,
            "utterances_per_class": utterances_per_class,
            "min_seconds": min_seconds,
            "max_seconds": max_seconds,
            "seed": seed,
        }
        if num_speakers < 1 or utterances_per_class < 1 or not 0.1 <= min_seconds <= max_seconds:
            raise CorpusError(
                "synthetic corpus: needs at least 1 speaker, 1 utterance per class and "
                f"0.1 <= min_seconds <= max_seconds; got {self.parameters}"
            )

    def list_utterances(self) -> list[Utterance]:
        """Lists ids such as 03_happy_007."""
        return [
            Utterance(
                f"{speaker:02d}_{label}_{take:03d}",
                label,
                speaker=f"{speaker:02d}",
                session=str((speaker + 1) // 2),
            )
            for speaker in range(1, self.parameters["num_speakers"] + 1)
            for label in self.class_names
            for take in range(1, self.parameters["utterances_per_class"] + 1)
        ]

    def check_file(self, utterance: Utterance) -> None:
        """Does nothing, since the audio always exists."""

    def _content(self) -> dict[str, Any]:
        return {"": sorted(self.parameters.items())}

    def read_waveform(self, utterance: Utterance, notices: list[str] | None = None) -> np.ndarray:
        """Synthesises an utterance: float32 (num_samples,) at 16 kHz."""
        seed = self.parameters["seed"]
        take = int(utterance.id.rsplit("_", 1)[1])
        speaker = np.random.default_rng([seed, int(utterance.speaker)])
        voice_pitch = 140 * 2 ** (speaker.normal(0, 3.5) / 12)  # Hz
        tract = np.exp(speaker.normal(0, 0.08))  # scales the formants
        voice_tilt, voice_level = speaker.normal(0, 1.5), speaker.normal(0, 2.0)  # dB

        label = self.class_names.index(utterance.label)
        rng = np.random.default_rng([seed, int(utterance.speaker), label, take])
        seconds = rng.uniform(self.parameters["min_seconds"], self.parameters["max_seconds"])
        manner = self._stray(self.MANNERS[utterance.label], rng)
        return _speak(
            dataclasses.replace(
                manner, tilt=manner.tilt + voice_tilt, level=manner.level + voice_level
            ),
            voice_pitch,
            tract,
            num_samples=int(seconds * SAMPLE_RATE),
            rng=rng,
        )

    @staticmethod
    def _stray(manner: _Manner, rng: np.random.Generator) -> _Manner:
        """Draws the manner of one utterance, which deviates from that of its class."""
        return _Manner(
            pitch=manner.pitch + rng.normal(0, 1.8),
            pitch_range=manner.pitch_range * np.exp(rng.normal(0, 0.4)),
            slope=manner.slope + rng.normal(0, 1.5),
            level=manner.level + rng.normal(0, 2.5),
            rate=manner.rate * np.exp(rng.normal(0, 0.15)),
            tilt=manner.tilt + rng.normal(0, 1.5),
        )


_VOWELS = np.array(  # formants F1, F2, F3 in Hz (Peterson and Barney, 1952, men)
    [[730, 1090, 2440], [270, 2290, 3010], [300, 870, 2240], [530, 1840, 2480], [570, 840, 2410]]
)
_FORMANT_WIDTHS = np.array([90.0, 120.0, 180.0])  # Hz


def _speak(
    manner: _Manner, pitch: float, tract: float, num_samples: int, rng: np.random.Generator
) -> np.ndarray:
    """Synthesises speech: harmonics of a moving pitch (source), shaped by vowels (filter)."""
    time = np.arange(num_samples) / SAMPLE_RATE
    syllable = np.floor(time * manner.rate).astype(int)
    accents = rng.normal(0, 0.5, syllable[-1] + 2)  # the pitch moves from accent to accent
    contour = manner.pitch_range * np.interp(time * manner.rate, np.arange(len(accents)), accents)
    contour += manner.slope * (time / time[-1] - 0.5)
    f0 = pitch * 2 ** ((manner.pitch + contour) / 12)
    rotation = np.exp(2j * np.pi * np.cumsum(f0) / SAMPLE_RATE)

    formants = tract * _VOWELS[rng.integers(len(_VOWELS), size=syllable[-1] + 1)]
    frequencies = pitch * np.arange(1, int(7_600 / f0.max()) + 1)  # no aliasing
    gains = np.abs(
        1 / (1 + 1j * (frequencies[:, None, None] - formants) / (tract * _FORMANT_WIDTHS))
    ).sum(axis=-1)  # (harmonics, syllables)
    gains *= 10 ** (manner.tilt * np.log2(frequencies / pitch) / 20)[:, None]

    voice, harmonic = np.zeros(num_samples), np.ones(num_samples, complex)
    for gain in gains:
        harmonic *= rotation
        voice += gain[syllable] * harmonic.imag
    voice *= np.sin(np.pi * (time * manner.rate % 1)) ** 1.5  # silence between syllables
    voice /= np.sqrt(np.mean(voice**2))
    audio = 0.05 * 10 ** (manner.level / 20) * voice + rng.normal(0, 1e-3, num_samples)
    return np.clip(audio, -1, 1).astype(np.float32)

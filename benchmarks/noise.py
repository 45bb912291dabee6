"""UA of finished runs' models under noise that they were not trained on.

    python -m benchmarks.noise --workdir W W ...

Each `W` is the workdir of a finished run whose teacher, if any, reads features; they should differ
in their seed alone, and their mean is told. The test utterances of every fold are spoilt, their
features computed again, and each row of the results predicted anew; the linear probe, trained on
clean features, stands beside them. The noises are white noise and babble (six recordings of the
corpus at once) at `--snr` dB, a telephone's band (300 to 3400 Hz, sampled at 8 kHz), and a room
whose reverberation decays by 60 dB in 0.6 s. They depend only on the recording, so that each model
and each run hears the same. The tables have UA in %, and paired differences of rows, with 95 %
intervals by speaker where there are enough speakers.
"""

import argparse
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from scipy import signal

from serkd_jax.audio.waveform import SAMPLE_RATE
from serkd_jax.data import prepare
from serkd_jax.data.corpora import corpus_of
from serkd_jax.data.examples import Examples
from serkd_jax.data.sources import Frontend, RecordsSource
from serkd_jax.data.splits import Fold
from serkd_jax.encoders.frontends import make_frontend
from serkd_jax.errors import UserError
from serkd_jax.experiment import Experiment, prepare_experiment
from serkd_jax.files import read_json
from serkd_jax.models.students import find_student
from serkd_jax.results import intervals, predictions, probe
from serkd_jax.stages.base import Stage
from serkd_jax.stages.finetune import TeacherStage

Noise = Callable[[np.ndarray], np.ndarray]  # waveform -> waveform, float32 (samples,)
VOICES = 6  # of babble
# Rows whose differences are told: the first less the second.
COMPARED = (
    ("updated_student", "student"),
    ("updated_student", "teacher"),
    ("updated_student", predictions.PROBE),
)
DECAY = 0.6  # seconds, in which a room's reverberation decays by 60 dB


def main() -> None:
    """Prints the tables."""
    options = parse_options()
    try:
        heard = [measure(workdir, options.snr) for workdir in options.workdir]
        print(tables(heard))
    except (UserError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--workdir", type=Path, nargs="+", required=True, help="of finished runs of several seeds"
    )
    parser.add_argument("--snr", type=float, default=10.0, help="dB, of white noise and babble")
    return parser.parse_args()


def measure(workdir: Path, snr: float) -> dict[str, predictions.Predictions]:
    """What a run's models, and the linear probe, decide in each noise, and in none.

    Raises:
        UserError: the run is not finished, its teacher reads waveforms, or its student dialogues.
    """
    results = read_json(workdir / "results.json", "name a finished workdir", ("config",))
    config = ConfigDict(results["config"])
    if config.teacher.input == "waveform":
        raise UserError(f"{workdir}: its teacher reads waveforms, not features")
    if find_student(config.student.kind).reads_dialogues:
        raise UserError(f"{workdir}: its student reads dialogues")
    experiment = prepare_experiment(config, workdir)
    cache = Path(config.cache_dir or workdir / "data")
    records = prepare.prepare_records(corpus_of(config), cache)
    own = make_frontend(config.teacher.frontend) if config.teacher.frontend.name else None
    trained = [(fold, experiment.train_fold(fold)[0]) for fold in experiment.folds]
    clean = probe.pool_all(experiment.features.chunks())
    classes = len(experiment.table.class_names)

    def decide(features: Examples, teachers: Examples) -> predictions.Predictions:
        pooled = probe.pool_all(features.chunks())
        return {
            fold.name: predict(experiment, fold, states, features, teachers)
            | {predictions.PROBE: probe_fold(clean, pooled, experiment.table.labels, fold, classes)}
            for fold, states in trained
        }

    heard = {"clean": decide(experiment.features, experiment.teacher_inputs)}
    for name, noise in noises(records, snr).items():
        hear = partial(open_spoilt, experiment, records, cache, name, noise)
        features = hear(experiment.frontend)
        heard[name] = decide(features, hear(own) if own else features)
    return heard


def predict(
    experiment: Experiment,
    fold: Fold,
    states: dict[type[Stage], Any],
    features: Examples,
    teachers: Examples,
) -> dict[str, np.ndarray]:
    """What the test utterances are, and the logits of every row, from these inputs."""
    teacher = None
    if TeacherStage in states:
        predict_teacher = experiment.programs.teacher_predict
        teacher = predict_teacher(states[TeacherStage], teachers, fold.test)
    return experiment.predict_test(fold, states, features, teacher)


def probe_fold(
    clean: np.ndarray, spoilt: np.ndarray, labels: np.ndarray, fold: Fold, num_classes: int
) -> np.ndarray:
    """The decisions on spoilt vectors (n, 2 N) of a probe that is trained on clean ones."""
    vectors = clean.copy()
    vectors[fold.test] = spoilt[fold.test]
    return probe.probe_fold(vectors, labels, fold, num_classes)


class Hearing:
    """A front-end whose waveforms are spoilt first; see `serkd_jax.data.sources.Frontend`."""

    def __init__(self, frontend: Frontend, name: str, noise: Noise):
        self._frontend, self._noise = frontend, noise
        self.name, self.width = frontend.name, frontend.width
        self.num_devices, self.assumption = frontend.num_devices, frontend.assumption
        self.settings = {**frontend.settings, "noise": name}
        self.fingerprint = f"{frontend.fingerprint} in {name}"

    def __call__(
        self, waveforms: Sequence[np.ndarray], max_frames: int, groups: Sequence[int] | None = None
    ) -> Iterator[tuple[int, np.ndarray]]:
        """See `Frontend`."""
        return self._frontend([self._noise(x) for x in waveforms], max_frames, groups)


def open_spoilt(
    experiment: Experiment, records: Path, cache: Path, name: str, noise: Noise, frontend: Frontend
) -> Examples:
    """The features of the whole corpus under a noise; the cache knows them by its name."""
    frames, programs = experiment.config.max_frames, experiment.programs
    folder = prepare.prepare_features(records, Hearing(frontend, name, noise), frames, cache)
    where = experiment.table, programs.devices, programs.resident
    return prepare.open_examples(folder, "features", frames, *where)


def noises(records: Path, snr: float) -> dict[str, Noise]:
    """The kinds of noise, by a name that says all of their settings."""
    source = RecordsSource(records)
    voices = [clip.waveform for clip in source.read(range(len(source)), 2 * SAMPLE_RATE)]
    return {
        f"white noise, {snr:g} dB": lambda speech: add(speech, white(speech), snr),
        f"babble of {VOICES}, {snr:g} dB": lambda speech: add(speech, babble(speech, voices), snr),
        "telephone": telephone,
        f"room, {DECAY:g} s": reverberate,
    }


def add(speech: np.ndarray, noise: np.ndarray, snr: float) -> np.ndarray:
    """Adds noise at a signal-to-noise ratio in dB; silence stays silence."""
    power = np.mean(np.square(noise, dtype=np.float64)) or 1.0
    scale = np.sqrt(np.mean(np.square(speech, dtype=np.float64)) / power / 10 ** (snr / 10))
    return (speech + scale * noise).astype(np.float32)


def draws_for(speech: np.ndarray) -> np.random.Generator:
    """Random numbers that depend on the recording alone."""
    return np.random.default_rng(zlib.crc32(speech.tobytes()))


def white(speech: np.ndarray) -> np.ndarray:
    """White noise as long as the speech."""
    return draws_for(speech).normal(size=len(speech))


def babble(speech: np.ndarray, voices: Sequence[np.ndarray]) -> np.ndarray:
    """Several recordings at once, equally loud, repeated to the length of the speech."""
    others = draws_for(speech).choice(len(voices), min(VOICES, len(voices)), replace=False)
    noise = np.zeros(len(speech))
    for other in others:
        noise += np.resize(voices[other], len(speech)) / (np.std(voices[other]) + 1e-9)
    return noise


def telephone(speech: np.ndarray) -> np.ndarray:
    """Speech as from a telephone: 300 to 3400 Hz, sampled at 8 kHz and back."""
    band = signal.butter(4, (300, 3400), "bandpass", fs=SAMPLE_RATE, output="sos")
    narrow = signal.resample_poly(signal.sosfilt(band, speech), 1, 2)
    return signal.resample_poly(narrow, 2, 1)[: len(speech)].astype(np.float32)


def reverberate(speech: np.ndarray) -> np.ndarray:
    """Speech in a room: its echoes are noise that decays exponentially (Polack), 3 dB in all."""
    time = np.arange(round(DECAY * SAMPLE_RATE)) / SAMPLE_RATE
    echoes = draws_for(speech).normal(size=len(time)) * 10 ** (-3 * time / DECAY)
    echoes *= np.sqrt(0.5) / np.linalg.norm(echoes)  # half of the direct sound's energy
    echoes[0] = 1.0
    return signal.fftconvolve(speech, echoes)[: len(speech)].astype(np.float32)


def tables(heard: Sequence[dict[str, predictions.Predictions]]) -> str:
    """What `measure` returned for each seed: a line for each noise, a column for each row."""
    scores, draws = {}, {}
    for name in heard[0]:
        found = intervals.mean_of_seeds([each[name] for each in heard])
        scores[name] = {row: metrics["ua"][0] for row, metrics in found.items()}
        draws[name] = {row: metrics["ua"][1] for row, metrics in found.items()}
    rows = list(scores["clean"])
    of_rows = [
        [name, *(_told(scores[name][row], draws[name][row]) for row in rows)] for name in scores
    ]
    pairs = [pair for pair in COMPARED if set(pair) <= set(rows)]
    of_pairs = [
        [name, *(_told(scores[name][a] - scores[name][b], draws[name][a] - draws[name][b], "+")
                 for a, b in pairs)]
        for name in scores
    ]  # fmt: skip
    names = [f"{a} − {b}" for a, b in pairs]
    return f"{_markdown(['noise', *rows], of_rows)}\n\n{_markdown(['noise', *names], of_pairs)}"


def _told(value: float, drawn: np.ndarray, sign: str = "") -> str:
    low, high = intervals.interval(drawn)
    span = "" if np.isnan(low) else f" ({100 * low:{sign}.1f} to {100 * high:{sign}.1f})"
    return f"{100 * value:{sign}.1f}{span}"


def _markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    head = [name.replace("_", " ") for name in head]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines))


if __name__ == "__main__":
    main()

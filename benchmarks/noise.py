"""UA of a finished run's models under noise that they were not trained on.

    python -m benchmarks.noise --workdir=W

`W` is the workdir of a finished run whose teacher, if any, reads features. The test utterances of
every fold are spoilt, their features computed again, and each row of the results predicted anew;
the linear probe, trained on clean features, stands beside them. The noises are white noise and
babble (six recordings of the corpus at once) at `--snr` dB, a telephone's band (300 to 3400
Hz, sampled at 8 kHz), and a room whose reverberation decays by 60 dB in 0.6 s. They depend only on
the recording, so that each model and each run hears the same. The table has UA in %, with 95 %
intervals by speaker where there are enough speakers.
"""

import argparse
import dataclasses
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from scipy import signal

from serkd_jax.audio.waveform import SAMPLE_RATE
from serkd_jax.config import chosen_stages
from serkd_jax.data import prepare
from serkd_jax.data.corpora import corpus_of
from serkd_jax.data.examples import Examples
from serkd_jax.data.sources import Frontend, RecordsSource
from serkd_jax.data.splits import Fold
from serkd_jax.encoders.frontends import make_frontend
from serkd_jax.errors import UserError
from serkd_jax.experiment import ROWS, Experiment, prepare_experiment
from serkd_jax.files import read_json
from serkd_jax.results import intervals, predictions, probe
from serkd_jax.stages.base import Stage
from serkd_jax.stages.curriculum import CurriculumStage
from serkd_jax.stages.distill import DistillStage
from serkd_jax.stages.student import StudentStage

Noise = Callable[[np.ndarray], np.ndarray]  # waveform -> waveform, float32 (samples,)
VOICES = 6  # of babble
DECAY = 0.6  # seconds, in which a room's reverberation decays by 60 dB


def main() -> None:
    """Prints the table."""
    options = parse_options()
    try:
        print(measure(options.workdir, options.snr))
    except (UserError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, required=True, help="of a finished run")
    parser.add_argument("--snr", type=float, default=10.0, help="dB, of white noise and babble")
    return parser.parse_args()


def measure(workdir: Path, snr: float) -> str:
    """The table of a run, as Markdown.

    Raises:
        UserError: the run is not finished, or its teacher reads waveforms.
    """
    results = read_json(workdir / "results.json", "name a finished workdir", ("config",))
    config = ConfigDict(results["config"])
    if config.teacher.input == "waveform":
        raise UserError(f"{workdir}: its teacher reads waveforms, not features")
    experiment = prepare_experiment(config, workdir)
    cache = Path(config.cache_dir or workdir / "data")
    records = prepare.prepare_records(corpus_of(config), cache)
    own = make_frontend(config.teacher.frontend) if config.teacher.frontend.name else None
    trained = [Trained(experiment, fold) for fold in experiment.folds]
    clean = probe.pool_all(experiment.features.chunks())
    lines = []
    for name, noise in noises(records, snr).items():
        hear = partial(open_spoilt, experiment, records, cache, Spoilt(name, noise))
        features = hear(experiment.frontend)
        teachers = hear(own) if own else features
        pooled = probe.pool_all(features.chunks())
        decided = {
            models.fold.name: models.predict(features, teachers) | models.probe(clean, pooled)
            for models in trained
        }
        lines.append((name, decided))
    return table(lines)


class Trained:
    """The models of a fold of a finished run."""

    def __init__(self, experiment: Experiment, fold: Fold):
        self.experiment, self.fold = experiment, fold
        stages = chosen_stages(experiment.config)
        self.teacher = self.distilled = None
        self.students: dict[str, tuple[type[Stage], Any]] = {}
        if "teacher" in stages:
            self.teacher, outputs = experiment.train_teacher(fold)
        if "student" in stages:
            self._add(StudentStage, experiment.train_student(fold))
        if "distill" in stages:
            self.distilled = experiment.distill(fold, self.teacher, outputs.hidden)
            self._add(DistillStage, self.distilled)
        if "curriculum" in stages:
            found = experiment.train_updated_student(fold, self.distilled, outputs.hidden)
            self._add(CurriculumStage, found)

    def _add(self, kind: type[Stage], state: Any) -> None:
        self.students[kind.student_row] = kind, state

    def predict(self, features: Examples, teachers: Examples) -> dict[str, np.ndarray]:
        """What the test utterances are, and the logits of every row."""
        experiment, test, programs = self.experiment, self.fold.test, self.experiment.programs
        rows = {}
        if self.teacher:
            out = programs.teacher_predict(self.teacher, teachers, test)
            rows["teacher"] = out.logits
        if self.distilled:
            rows["meta_teacher"] = programs.classify(self.distilled.meta_params, out.hidden)
        for row, (kind, state) in self.students.items():
            params = kind.student_params(state.params)
            variables = {"params": params, "batch_stats": state.batch_stats}
            learned = variables, experiment.statistics[self.fold.name]
            rows[row] = programs.student_predict(learned, features, test).logits
        ordered = {row: rows[row] for row in ROWS if row in rows}
        return experiment.about_test(self.fold) | ordered

    def probe(self, clean: np.ndarray, spoilt: np.ndarray) -> dict[str, np.ndarray]:
        """The decisions of a probe that is trained on clean vectors, all of them (n, 2 N)."""
        labels, test = self.experiment.table.labels, self.fold.test
        rest = np.setdiff1d(np.arange(len(labels)), test)
        vectors = np.concatenate([clean[rest], spoilt[test]])
        both = np.concatenate([labels[rest], labels[test]])
        rows = np.arange(len(vectors))
        return {
            predictions.PROBE: probe.decide(vectors, both, rows[: len(rest)], rows[len(rest) :])
        }


@dataclasses.dataclass(frozen=True)
class Spoilt:
    """A kind of noise, by name."""

    name: str
    noise: Noise


class Hearing:
    """A front-end whose waveforms are spoilt first; see `serkd_jax.data.sources.Frontend`."""

    def __init__(self, frontend: Frontend, spoilt: Spoilt):
        self._frontend, self._spoilt = frontend, spoilt
        self.name, self.width = frontend.name, frontend.width
        self.num_devices, self.assumption = frontend.num_devices, frontend.assumption
        self.settings = {**frontend.settings, "noise": spoilt.name}
        self.fingerprint = f"{frontend.fingerprint} in {spoilt.name}"

    def __call__(
        self, waveforms: Sequence[np.ndarray], max_frames: int, groups: Sequence[int] | None = None
    ) -> Iterator[tuple[int, np.ndarray]]:
        """See `Frontend`."""
        spoilt = [self._spoilt.noise(waveform) for waveform in waveforms]
        return self._frontend(spoilt, max_frames, groups)


def open_spoilt(
    experiment: Experiment, records: Path, cache: Path, spoilt: Spoilt, frontend: Frontend
) -> Examples:
    """The features of the whole corpus under a noise."""
    frames, programs = experiment.config.max_frames, experiment.programs
    folder = prepare.prepare_features(records, Hearing(frontend, spoilt), frames, cache)
    where = experiment.table, programs.devices, programs.resident
    return prepare.open_examples(folder, "features", frames, *where)


def noises(records: Path, snr: float) -> dict[str, Noise]:
    """The kinds of noise, by a name that says all of their settings."""
    source = RecordsSource(records)
    voices = [clip.waveform for clip in source.read(range(len(source)), 2 * SAMPLE_RATE)]
    return {
        "clean": lambda speech: speech,
        f"white noise, {snr:g} dB": lambda speech: add(speech, white(speech), snr),
        f"babble, {snr:g} dB": lambda speech: add(speech, babble(speech, voices), snr),
        "telephone": telephone,
        "room": reverberate,
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


def table(lines: Sequence[tuple[str, predictions.Predictions]]) -> str:
    """A line for each noise, a column for each model."""
    rows = list(predictions.score(lines[0][1])["overall"])
    head = [["noise", *(row.replace("_", " ") for row in rows)], ["---"] * (1 + len(rows))]
    cells = [[name, *(_ua(decided, row) for row in rows)] for name, decided in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in head + cells)


def _ua(decided: predictions.Predictions, row: str) -> str:
    score = predictions.score(decided)["overall"][row]["ua"]
    low, high = intervals.bootstrap(decided, "speaker")[row]["ua"]
    span = "" if np.isnan(low) else f" ({100 * low:.1f} to {100 * high:.1f})"
    return f"{100 * score:.1f}{span}"


if __name__ == "__main__":
    main()

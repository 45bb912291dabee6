"""Tables 8 and 9 from runs of the systems: scores and costs beside what the paper prints."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from serkd_jax.errors import UserError
from serkd_jax.files import read_json
from serkd_jax.results import costs, paper
from serkd_jax.results.comparison import Group, Run, group_runs
from serkd_jax.results.intervals import LEAST_SPEAKERS, METRICS, interval, mean_of_seeds
from serkd_jax.results.metrics import TITLES
from serkd_jax.results.predictions import PROBE, count_speakers
from serkd_jax.results.typeset import Table

NONE = "–"
M = 2**20  # the unit of the paper's counts; see docs/paper.md


class System(NamedTuple):
    """What a compared system is called, and what its public code lets it see of the test part."""

    name: str
    leak: str


SYSTEMS = {  # by the kind of student
    "camser": System("CA-MSER", "all of it is the validation part"),
    "timnet": System("TIM-Net", "speakers of the test part"),
    "dwformer": System("DWFormer", "the epoch's choice (IEMOCAP)"),
    "shiftcnn": System("ShiftCNN", "the epoch's choice"),
    "shiftformer": System("Shiftformer", "the epoch's choice"),
    "shiftlstm": System("ShiftLSTM", "the epoch's choice"),
    "speechformer": System("SpeechFormer++", "the epoch's choice"),
    "mmdfn": System("MM-DFN", "the epoch's and the settings' choice"),
}
OUR_ROWS = ("student", "updated_student")
HEADER = ["system", "reads", "parameters", "M", "with encoder, M", "operations", "with encoder"]
HEADER += ["time", "with front-end", "seeds", *TITLES.values(), "paper", "leak"]
NOTES = [
    "M is 2^20. Operations are the millions of multiplications and additions in matrix products, "
    "and times milliseconds on the machine of the run, both for a second of audio. Scores are in "
    "%, the mean over seeds with its 95 % interval, by speaker if there are enough. Paper: what "
    "Table 8 (IEMOCAP) or 9 (MELD) prints, on the corpus of that name; leak: what of the test part "
    "the system's public code uses in training."
]
FUTURE = "MM-DFN classifies an utterance by its whole dialogue, with the later ones; others do not."


def systems_table(runs: Sequence[Run]) -> Table:
    """Makes the table; runs that differ in their seed alone are one line.

    Args:
        runs: finished runs of one corpus, of systems and of ours.
    """
    lines, probes = [], {}
    for group in group_runs(runs):
        config = group.first.results["config"]
        kind, reads = config["student"]["kind"], what_it_reads(config)
        scores, cost = _scores(group), _cost(group.first)
        system = SYSTEMS.get(kind)
        if system and config["stages"] == "student":  # as its authors train it
            printed = _printed(system.name)
            lines.append([system.name, reads, *cost, *scores["student"], printed, system.leak])
        else:
            ours = f"{system.name}, taught by ours" if system else "ours"
            for row in (row for row in OUR_ROWS if row in scores):
                of_paper = not system and row == "updated_student"
                printed = _printed("updated student") if of_paper else NONE
                name = f"{ours}, {row.replace('_', ' ')}"
                lines.append([name, reads, *cost, *scores[row], printed, "none"])
        if PROBE in scores:
            probes[reads] = ["linear probe", reads, *[NONE] * len(cost), *scores[PROBE]]
    lines += [[*probe, NONE, "none"] for probe in probes.values()]
    notes = [*NOTES, FUTURE] if any(line[0] == "MM-DFN" for line in lines) else NOTES
    return Table("systems", "Systems", HEADER, lines, notes)


def what_it_reads(config: Mapping[str, Any]) -> str:
    """Names the front-end of a run's student, and what is beside it."""
    name, beside = config["frontend"]["name"], config["frontend"].get("beside")
    return f"{name} and {beside}" if beside else name


def _scores(group: Group) -> dict[str, list[str]]:
    """Row -> number of seeds, and each metric with its interval."""
    runs = [*group.runs.values()]
    few = count_speakers(group.first.predictions) < LEAST_SPEAKERS
    found = mean_of_seeds([run.predictions for run in runs], "utterance" if few else "speaker")
    told = {}
    for row, scores in found.items():
        told[row] = [str(len(runs))]
        for mean, draws in scores.values():
            low, high = interval(draws)
            told[row].append(f"{100 * mean:.1f} ({100 * low:.1f} to {100 * high:.1f})")
    return told


def _cost(run: Run) -> list[str]:
    """Parameters, operations and times of the deployed student, without and with its front-end."""
    try:
        cost = read_json(run.workdir / costs.NAME, "", ("params", "seconds", "operations"))
    except UserError:
        return [NONE] * 7
    count, encoder = cost["params"]["deployed"], cost["params"]["encoder"]
    cells = [f"{count:,}", f"{count / M:.2f}", f"{(count + encoder) / M:.2f}"]
    for key, unit, digits in (("operations", 1e-6, 0), ("seconds", 1e3, 2)):
        alone, both = cost[key]["student"], sum(cost[key].values())
        cells += [f"{unit * alone:,.{digits}f}", f"{unit * both:,.{digits}f}"]
    return cells


def _printed(name: str) -> str:
    """What the paper prints of a method."""
    told = []
    for corpus, methods in paper.BASELINES.items():
        if found := methods.get(name):
            scores = [f"{TITLES[key]} {found[key]:.2f}" for key in METRICS if key in found]
            told.append(f"{corpus}: {found['params']:.2f} M, {', '.join(scores)}")
    return "; ".join(told) or NONE

"""The runs of a sweep: which they are, their configs, and doing one of them."""

import ast
import copy
import importlib.util
import itertools
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from tqdm import tqdm

from serkd_jax.config import DATA_KEYS, leaves, settings_of
from serkd_jax.distributed import parallel
from serkd_jax.errors import UserError
from serkd_jax.experiment import prepare_experiment
from serkd_jax.files import locked, read_json
from serkd_jax.results.html import try_to_write_report
from serkd_jax.results.provenance import describe_start, record_start

Changes = dict[str, Any]  # config key -> value


def plan(
    experiments: Mapping[str, Changes], grid: Iterable[tuple[str, list[Any]]], seeds: str
) -> dict[str, Changes]:
    """Returns the changes of each run by its name, which is also the name of its workdir.

    Args:
        experiments: changes by name; the name may be empty.
        grid: keys with their values, of which every combination is taken.
        seeds: numbers and ranges, such as `0-2,7`; empty for the recipe's own seed.

    Raises:
        UserError: two runs would have the same name, or the seeds cannot be read.
    """
    axes = [[(key, value) for value in values] for key, values in grid]
    if seeds:  # last, so that neighbours, in different parts, share no teacher to wait for
        axes.append([("seed", seed) for seed in parse_seeds(seeds)])
    runs: dict[str, Changes] = {}
    for label, changes in experiments.items():
        for chosen in itertools.product(*axes):
            parts = [label, *(f"{_short(key, axes)}={value}" for key, value in chosen)]
            name = re.sub(r"[^\w.=,+-]+", "_", ",".join(filter(None, parts))) or "run"
            if name in runs:
                raise UserError(f"two runs would have the name {name}: drop what is double")
            runs[name] = changes | dict(chosen)
    return runs


def _short(key: str, axes: Sequence[Sequence[tuple[str, Any]]]) -> str:
    """Returns the last part of a key, or all of it if another key ends alike."""
    last = key.rpartition(".")[2]
    alike = {name for axis in axes for name, _ in axis if name.rpartition(".")[2] == last}
    return last if len(alike) == 1 else key


def parse_seeds(text: str) -> list[int]:
    """Reads numbers and ranges, such as `0-2,7`."""
    seeds: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        if not found or int(found[2] or found[1]) < int(found[1]):
            raise UserError(f"--seeds={text}: use numbers and ranges, such as 0-4 or 0,7,9")
        seeds += range(int(found[1]), int(found[2] or found[1]) + 1)
    return list(dict.fromkeys(seeds))


def parse_values(text: str) -> tuple[str, list[Any]]:
    """Reads a key and its values, such as `contrastive.weight=0,0.05`.

    Values are separated by commas outside brackets; each is a Python literal, or else a word.
    """
    key, equals, values = text.partition("=")
    words = [word.strip() for word in re.split(r",(?![^(\[]*[)\]])", values)]
    if not key or not equals or not all(words):
        raise UserError(f"--set={text}: use KEY=VALUE,VALUE, such as contrastive.weight=0,0.05")
    return key.strip(), [_value(word) for word in words]


def _value(word: str) -> Any:
    try:
        return ast.literal_eval(word)
    except (ValueError, SyntaxError):
        return word


def load_experiments(place: str) -> dict[str, Changes]:
    """Imports named experiments, FILE.py:NAME: a dictionary of the changes by label.

    Raises:
        UserError: the file or the name is not there.
    """
    file, _, name = place.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise UserError(
            f"--experiments={place}: use FILE.py:NAME, such as configs/sweeps.py:table4"
        )
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = getattr(module, name.upper(), None)
    if not isinstance(found, dict):
        names = [n for n, value in vars(module).items() if n.isupper() and value]
        known = [n.lower() for n in names if not n.startswith("_")]
        raise UserError(f"{file} has no experiments {name!r}: use one of {', '.join(known)}")
    return found


def configure(recipe: ConfigDict, changes: Changes, out: Path) -> ConfigDict:
    """Makes the config of a run; what runs can share is in `out`, unless the recipe says where.

    Raises:
        UserError: the recipe has no such key, or a value is of another type.
    """
    config = copy.deepcopy(recipe)  # with the types that its keys may have
    known = dict(leaves(recipe))
    for key, value in changes.items():
        if key not in known:
            raise UserError(f"{key}: the recipe has no such key")
        try:
            config.update_from_flattened_dict({key: value})
        except TypeError:
            raise UserError(f"{key}={value}: a value of this type is not allowed") from None
    config.cache_dir = config.cache_dir or str(out / "cache")
    config.stages_dir = config.stages_dir or str(out / "stages")
    return config


def shard(names: list[str], part: str) -> list[str]:
    """Returns every n-th name, beginning with the i-th, for the part `i/n`."""
    found = re.fullmatch(r"(\d+)/(\d+)", part)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise UserError(f"--shard={part}: use i/n, such as 2/4 for the second of four parts")
    return names[int(found[1]) - 1 :: int(found[2])]


def run_all(configs: Mapping[str, ConfigDict], out: Path, title: str) -> list[str]:
    """Does what remains of several runs, each in the folder of its name in `out`.

    Returns:
        The names of those that failed; why, is told at once.
    """
    failed = []
    for name in tqdm(configs, title, unit="run", disable=not parallel.is_first_process()):
        try:
            run(configs[name], out / name)
        except UserError as error:
            failed.append(name)
            tqdm.write(f"run {name}: {error}", file=sys.stderr)
    return failed


def refuse_failures(failed: Sequence[str]) -> None:
    """Raises an error that names the runs that failed, if any did."""
    if failed:
        raise UserError(f"{len(failed)} run(s) failed: {', '.join(failed)}; the others are kept")


def run(config: ConfigDict, workdir: Path) -> None:
    """Does what remains of a run; nothing if it is finished.

    Raises:
        UserError: the data or the configuration are bad, or the workdir holds another run.
    """
    path = workdir / "results.json"
    if path.exists():
        done = read_json(path, "delete it, and it is made again", ("config",))["config"]
        same = settings_of(ConfigDict(done)) == settings_of(config)
        places = (dict(leaves(each)) for each in (done, config))
        old, new = ([each.get(key) for key in ("stages", *DATA_KEYS)] for each in places)
        if same and old == new:  # data at another place might be other data
            return
    workdir.mkdir(parents=True, exist_ok=True)
    with locked(workdir):
        experiment = prepare_experiment(config, workdir)
        record_start(workdir, describe_start(config))
        experiment.run()
        if parallel.is_first_process():
            try_to_write_report(workdir)

"""Sweeps: which runs they are, what the runs share, and that a stopped one goes on."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import quick_xla
from configs import common, emodb, sweeps
from finished_runs import final_arrays
from layouts import ROOT, make_split
from serkd_jax import grid
from serkd_jax.config import leaves, settings_of
from serkd_jax.errors import UserError
from serkd_jax.experiment import STAGES, prepare_experiment, stage_identity
from tiny_config import get_config

# Which runs


def test_every_combination_is_a_run_named_by_what_it_changes():
    axes = [("student.norm", ["pre", "post"]), ("distill.beta", [0.0, 100.0])]
    runs = grid.plan({"": {}}, axes, "3,5-6")
    assert len(runs) == 12
    assert runs["norm=post,beta=0.0,seed=5"] == {
        "student.norm": "post",
        "distill.beta": 0.0,
        "seed": 5,
    }
    both = [("student.epochs", [1]), ("teacher.epochs", [2])]
    assert list(grid.plan({"": {}}, both, "")) == ["student.epochs=1,teacher.epochs=2"]
    named = grid.plan({"a / b": {"seed": 7}, "c": {}}, [], "")
    assert named == {"a_b": {"seed": 7}, "c": {}}
    assert grid.plan({"": {}}, [], "") == {"run": {}}


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("contrastive.weight=0,0.05", ("contrastive.weight", [0, 0.05])),
        ("a=True,False", ("a", [True, False])),
        ("a=none, first_order", ("a", ["none", "first_order"])),
        ("a=(1, 2),(),[8,9]", ("a", [(1, 2), (), [8, 9]])),
        ("a=x=y", ("a", ["x=y"])),
    ],
)
def test_values_are_separated_by_commas_outside_brackets(text, values):
    assert grid.parse_values(text) == values


@pytest.mark.parametrize(
    ("function", "argument", "told"),
    [
        ("parse_values", "weight", "use KEY=VALUE"),
        ("parse_values", "weight=1,,2", "use KEY=VALUE"),
        ("parse_seeds", "3-1", "use numbers and ranges"),
        ("parse_seeds", "a", "use numbers and ranges"),
        ("load_experiments", "nowhere.py:x", "use FILE.py:NAME"),
        (
            "load_experiments",
            "configs/sweeps.py:nothing",
            "use one of table4, table4_whisper, fig2",
        ),
    ],
)
def test_what_cannot_be_read_is_told(function, argument, told, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=told):
        getattr(grid, function)(argument)


def test_parts_are_disjoint_and_together_everything():
    names = [str(i) for i in range(10)]
    parts = [grid.shard(names, f"{i}/4") for i in range(1, 5)]
    assert sorted(name for part in parts for name in part) == sorted(names)
    assert grid.shard(names, "1/1") == names
    for wrong in ("0/4", "5/4", "2", "a/b"):
        with pytest.raises(UserError, match="use i/n"):
            grid.shard(names, wrong)


def test_a_key_or_a_value_that_the_recipe_does_not_have_is_named(tmp_path):
    for changes, told in (
        ({"student.depth": 3}, "student.depth: the recipe has no such key"),
        ({"nothing.at.all": 3}, "nothing.at.all: the recipe has no such key"),
        ({"manifest": "x.csv"}, "manifest: the recipe has no such key"),
        ({"student.width": "wide"}, "student.width=wide: a value of this type"),
    ):
        with pytest.raises(UserError, match=told):
            grid.configure(get_config(), changes, tmp_path)
    whisper = emodb.get_config("whisper,camser")
    layers = {"frontend.layer": [2, 3], "teacher.frontend.layer": [1, 2]}
    averaged = grid.configure(whisper, layers, tmp_path)
    assert dict(leaves(averaged)).items() >= layers.items()
    assert whisper.frontend.layer == whisper.teacher.frontend.layer == 2
    with pytest.raises(UserError, match="two runs would have the name"):
        grid.plan({"a b": {}, "a_b": {}}, [], "")


@pytest.mark.parametrize("name", ["TABLE4", "FIG2", "ABLATIONS", "DIVISIONS"])
def test_the_experiments_of_the_recipe_change_what_it_has(name, tmp_path):
    experiments, recipe = getattr(sweeps, name), common.paper()
    for changes in experiments.values():
        config = grid.configure(recipe, changes, tmp_path)
        before, after = settings_of(recipe), settings_of(config)
        changed = {key for key in after if after[key] != before[key]}
        assert changed <= set(changes), "and nothing else"
    assert len({json.dumps(changes) for changes in experiments.values()}) == len(experiments)


# What they share


@pytest.mark.parametrize(
    ("key", "value", "stages"),
    [
        ("seed", 1, "teacher student distill curriculum"),
        ("the corpus", "x", "teacher student distill curriculum"),
        ("protocol.seed", 1, "teacher student distill curriculum"),
        ("optimizer.clip_norm", 0.5, "teacher student distill curriculum"),
        ("teacher.epochs", 3, "teacher distill curriculum"),
        ("the teacher's weights", "x", "teacher distill curriculum"),
        ("student.width", 8, "student distill curriculum"),
        ("student.epochs", 3, "student"),
        ("contrastive.weight", 0.3, "student distill curriculum"),
        ("distill.epochs", 3, "distill curriculum"),
        ("meta.learning_rate", 0.1, "distill curriculum"),
        ("curriculum.learning_rate", 0.1, "curriculum"),
    ],
)
def test_a_stage_is_another_one_if_anything_that_it_depends_on_is(key, value, stages):
    sources = {"the corpus": "a", "the teacher's weights": "b"}
    run = sources | settings_of(get_config())
    other = run | {key: value}
    assert run != other
    differ = [k.name for k in STAGES if stage_identity(k, run) != stage_identity(k, other)]
    assert differ == stages.split()


def test_a_finished_run_is_left_alone_unless_other_stages_are_wanted(monkeypatch, tmp_path):
    config, begun = get_config(), []
    (tmp_path / "results.json").write_text(json.dumps({"config": config.to_dict()}))
    monkeypatch.setattr(grid, "prepare_experiment", lambda *_: begun.append(1) or 1 / 0)
    config.cache_dir = "elsewhere"
    grid.run(config, tmp_path)
    assert not begun
    for key, value in (("stages", "student"), ("data_dir", "elsewhere")):
        changed = grid.configure(config, {key: value}, tmp_path)
        with pytest.raises(ZeroDivisionError):
            grid.run(changed, tmp_path)
    assert len(begun) == 2


@pytest.mark.slow
def test_runs_that_share_stages_are_those_that_do_not(tmp_path):
    """To the bit; what is equal in both is trained once."""
    recipe = get_config("manifest")
    recipe.manifest, recipe.stages = str(make_split(tmp_path)), "teacher,student"
    out = tmp_path / "runs"
    runs = grid.plan({"": {}}, [("contrastive.weight", [0.0, 0.4])], "")
    for name, changes in runs.items():
        grid.run(grid.configure(recipe, changes, out), out / name)
    made = sorted(path.name.split("-")[0] for path in (out / "stages").iterdir())
    assert made == ["student", "student", "teacher"]
    alone = grid.configure(recipe, runs["weight=0.4"], out)
    alone.stages_dir = ""
    prepare_experiment(alone, tmp_path / "alone").run()
    ours, theirs = final_arrays(out / "weight=0.4"), final_arrays(tmp_path / "alone")
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.npz")}
    grid.run(grid.configure(recipe, runs["weight=0.4"], out), out / "weight=0.4")
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*.npz")}
    with pytest.raises(UserError, match="another run"):
        grid.run(grid.configure(recipe, {"seed": 9}, out), out / "weight=0.4")


@pytest.mark.slow
def test_two_parts_killed_and_started_again_do_nothing_twice(tmp_path):
    """Both wait for one teacher; the kill hits the first while it trains."""
    manifest, out = make_split(tmp_path), tmp_path / "runs"

    def start(part):
        command = [
            sys.executable,
            "-m",
            "serkd_jax.sweep",
            "--config=tests/tiny_config.py:manifest",
        ]
        command += [f"--config.manifest={manifest}", f"--out={out}", f"--shard={part}"]
        command += ["--set=student.norm=pre,post", "--config.stages=teacher,student"]
        command += ["--config.steps_per_dispatch=1", "--config.teacher.epochs=6"]
        environment = os.environ | {"XLA_FLAGS": quick_xla.FLAGS}
        return subprocess.Popen(command, cwd=ROOT, env=environment)

    first = start("1/2")
    deadline = time.monotonic() + 300
    while (
        not (logs := [*out.glob("stages/teacher-*/fold_1/metrics.jsonl")])
        or not logs[0].stat().st_size
    ):
        assert first.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.wait()
    parts = [start("1/2"), start("2/2")]
    assert [part.wait(300) for part in parts] == [0, 0]
    assert len([*out.glob("*/results.json")]) == 2
    for log in out.glob("stages/*/fold_1/metrics.jsonl"):
        epochs = [json.loads(line)["epoch"] for line in log.open()]
        assert epochs == list(range(1, len(epochs) + 1))
    assert len([*out.glob("stages/teacher-*")]) == 1

"""The command that makes Tables 8 and 9, and the operations that it tells."""

import shutil
import subprocess
import sys
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Primitive

from configs import manifest, systems
from configs import meld as recipe_of_meld
from layouts import ROOT, write_wav
from serkd_jax.files import read_json, write_json
from serkd_jax.results.comparison import read_runs
from serkd_jax.results.costs import count_operations
from serkd_jax.results.systems_table import systems_table
from tiny_students import count


def test_operations_are_those_of_products_and_convolutions_that_the_result_needs():
    x, kernel = jnp.ones((3, 4, 5)), jnp.ones((5, 6))

    def product(x):
        unused = x @ x.swapaxes(1, 2)
        del unused
        return jax.nn.relu(x @ kernel)

    assert count_operations(jax.jit(product), x) == 2 * 3 * 4 * 5 * 6

    def loop(x):
        return jax.lax.scan(lambda carry, _: (carry @ jnp.ones((5, 5)), None), x, None, 7)[0]

    assert count_operations(loop, x) == 7 * 2 * 3 * 4 * 5 * 5
    convolution = nn.Conv(6, (3,), padding="VALID", feature_group_count=2)
    inputs = jnp.ones((2, 9, 4))
    params = convolution.init(jax.random.key(0), inputs)
    # 7 positions, 6 outputs, each of 3 frames of the 2 channels of its group
    assert count_operations(convolution.apply, params, inputs) == 2 * 2 * 7 * 6 * 3 * 2


def test_operations_of_an_attention_kernel_are_those_of_its_two_products():
    kernel = Primitive("dot_product_attention_fwd_wrapper")  # cuDNN's, which no CPU has
    kernel.def_abstract_eval(lambda query, key, value: query)
    queries, keys = jnp.ones((2, 7, 3, 4)), jnp.ones((2, 5, 3, 4))

    def attend(queries, keys):
        queries, keys = (x.swapaxes(1, 2) for x in (queries, keys))
        return jax.nn.softmax(queries @ keys.swapaxes(2, 3)) @ keys

    plain = count_operations(attend, queries, keys)
    assert count_operations(partial(kernel.bind, queries, keys, keys)) == plain > 0


def run(workdir, *options):
    command = [sys.executable, "-m", "serkd_jax.systems", "--config=tests/tiny_config.py"]
    command += [f"--workdir={workdir}", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def cells_of(text, name):
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {name} "))
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.slow
def test_one_command_trains_a_system_and_makes_the_table(tmp_path):
    done = run(tmp_path, "--systems=timnet", "--set=student.epochs=1")
    assert done.returncode == 0, done.stderr[-3000:]
    text = (tmp_path / "systems.md").read_text()
    assert text in done.stdout
    timnet = cells_of(text, "TIM-Net")
    parameters, _ = count("timnet", 4, 24, 39, num_levels=8)
    assert timnet[1:3] == ["mfcc", f"{parameters:,}"]
    assert timnet[3] == f"{parameters / 2**20:.2f}" == timnet[4]
    printed = "iemocap: 0.12 M, UA 69.41, WA 68.20"
    assert timnet[-2:] == [printed, "speakers of the test part"]
    results = read_json(tmp_path / "timnet,seed=0" / "results.json", "")
    assert timnet[10].startswith(f"{100 * results['overall']['student']['ua']:.1f} (")
    assert results["config"]["selection_metric"] == "ua"
    assert cells_of(text, "linear probe")[1] == "mfcc"

    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "timnet,seed=0").iterdir()}
    again = run(
        tmp_path, "--systems=timnet,ours", "--set=student.epochs=1", "--config.stages=student"
    )
    assert again.returncode == 0, again.stderr[-3000:]
    text = (tmp_path / "systems.md").read_text()
    assert cells_of(text, "TIM-Net") == timnet
    assert made == {path: path.stat().st_mtime_ns for path in made}, "it is not trained again"
    ours = cells_of(text, "ours, student")
    assert ours[1] == "logmel"
    assert ours[-2:] == ["–", "none"]

    (tmp_path / "timnet,seed=0" / "costs.json").write_text("{}")  # as of another version
    results["config"]["frontend"]["beside"] = "spectra"
    shutil.copytree(tmp_path / "timnet,seed=0", tmp_path / "beside")
    write_json(tmp_path / "beside" / "results.json", results)
    table = systems_table(read_runs([tmp_path])[0])
    mfcc = ["mfcc", "mfcc and spectra"]
    for name, reads in (("TIM-Net", mfcc), ("linear probe", ["logmel", *mfcc])):
        assert sorted(line[1] for line in table.rows if line[0] == name) == reads
    results["config"] |= {"stages": "teacher,student"}
    write_json(tmp_path / "beside" / "results.json", results)
    (taught,) = (x for x in systems_table(read_runs([tmp_path])[0]).rows if "taught" in x[0])
    assert [taught[0], *taught[-2:]] == ["TIM-Net, taught by ours, student", "–", "none"]
    line = next(line for line in table.rows if line[0] == "TIM-Net")
    assert line[2:9] == ["–"] * 7
    assert np.isfinite(float(line[10].split()[0]))


def test_all_are_those_for_which_the_recipe_has_features_and_dialogues(meld, tmp_path):
    write_wav(tmp_path / "a.wav")
    (tmp_path / "all.csv").write_text("path,label\na.wav,angry\n")
    config = manifest.get_config("logmel")
    config.manifest = str(tmp_path / "all.csv")
    frames, talk = "the features are not an encoder's", "the corpus has no dialogues"
    assert systems.lacking(config) == {"camser": frames, "mmdfn": talk}
    config = recipe_of_meld.get_config("whisper")
    config.data_dir = str(meld)
    assert systems.lacking(config) == {}


def test_an_unknown_system_is_named_with_those_that_there_are(tmp_path):
    done = run(tmp_path, "--systems=timmet")
    assert done.returncode == 1
    assert "there is no system 'timmet': use all, or timnet, dwformer" in done.stderr
    for options, told in (
        (("--systems=timnet", "--set=student.epochs=1,2"), "--set=student.epochs: use one value"),
        (("--systems=ours,timnet", "--set=student.depth=1"), "timnet: student.depth: the recipe"),
    ):
        done = run(tmp_path, *options)
        assert done.returncode == 1
        assert told in done.stderr

"""The benchmarks run, without TensorFlow, and the cost on paper is what XLA counts."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import quick_xla
from benchmarks import cost, inference, torch_steps
from benchmarks.common import make_batch, make_examples, make_steps, student_operations
from configs import common
from exported_models import write_model
from serkd_jax.deploy.backends import load_classifier
from serkd_jax.experiment import STAGES
from serkd_jax.models.students.inverted import InvertedStudent
from serkd_jax.models.teacher import Teacher
from serkd_jax.stages.standardization import Statistics
from torch_oracle import torch_names

ROOT = Path(__file__).resolve().parents[1]


def measure_accelerator(folder, *options):
    """The report of a machine without TensorFlow, as a tiny model has it."""
    for package in ("tensorflow", "tensorflow_datasets"):
        (folder / f"{package}.py").write_text("raise ImportError('not here')")
    command = [sys.executable, "-m", "benchmarks.accelerator", "--size=tiny", f"--out={folder}"]
    environment = os.environ | {"PYTHONPATH": str(folder), "XLA_FLAGS": quick_xla.FLAGS}
    environment["JAX_COMPILATION_CACHE_DIR"] = str(folder / "cache")  # parts share programs
    command += ["--seconds=0", *options]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    text = (folder / "accelerator.md").read_text()
    return json.loads((folder / "accelerator.json").read_text()), text


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_one_command_measures_all_that_an_accelerator_is_asked_about(tmp_path):
    report, text = measure_accelerator(tmp_path, "--minutes=60")
    assert "Failed" not in text
    assert list(report) == ["about", "works", "steps", "orders", "encoders", "experiment"]
    kinds = ["output", "gradient", "tangent", "gradient through the gradient"]
    steps = ["student", "kd", "meta", "curriculum"]
    assert {f"attention, {kind}" for kind in kinds} == set(report["works"])  # on a CPU, no more
    assert max(report["works"].values()) < 1e-5
    assert list(report["steps"]) == [*steps, "evaluation"]
    for row in report["steps"].values():
        assert row["ratio"] == pytest.approx(row["steps/s"] / row["torch steps/s"])
    orders = report["orders"]["orders"]
    assert list(orders) == ["none", "first_order", "second_order", "second_order_forward"]
    assert all(row["ms"] > 0 and row["compilation s"] > 0 for row in orders.values())
    assert orders["second_order_forward"]["differs"] < 1e-6 < orders["first_order"]["differs"]
    assert {row["model"] for row in report["encoders"]["rows"]} == {"hubert-large", "whisper-base"}
    assert all(row["ratio"] > 0 for row in report["encoders"]["rows"])
    assert set(report["experiment"]["stages"]) == {kind.name for kind in STAGES}
    minutes = report["experiment"]["minutes"]
    assert f"| {minutes:.1f} |" in text.splitlines()[-3]


@pytest.mark.slow
def test_a_part_that_fails_or_has_no_time_left_is_named_and_the_rest_is_kept(tmp_path):
    report, text = measure_accelerator(tmp_path, "--minutes=0", "--parts=steps,encoders")
    assert report.keys() == {"about", "steps", "encoders"}
    assert text.count("Not run: the minutes are over.") == 2


def for_benchmark(params):
    """Our parameters as the benchmark's torch models name them."""
    renamed = {}
    for name, array in torch_names(params).items():
        for ours, theirs in RENAMED.items():
            name = name.replace(ours, theirs)
        # In an nn.Sequential, the ReLUs count too.
        name = re.sub(MLP, lambda found: f"{found[1]}.{2 * int(found[2])}", name)
        renamed[name.removeprefix("dense.")] = array
    return renamed


def with_statistics(state, statistics):
    if hasattr(state.frozen, "statistics"):
        return state.replace(frozen=state.frozen.replace(statistics=statistics))
    return state.replace(frozen=statistics)


MLP = re.compile(r"^(classifier|projection|dense)\.(\d+)")
RENAMED = {
    "self_attn.in_proj_": "qkv.",
    "self_attn.": "",
    "linear1": "intermediate_dense",
    "linear2": "output_dense",
    "norm1": "layer_norm",
    "norm2": "final_layer_norm",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["student", "kd", "meta", "curriculum"])
def test_the_torch_steps_of_the_benchmark_are_those_of_the_pipeline(name):
    """Three steps, without what is random: students move alike, and so do meta-teachers."""
    config, variates, count = common.paper("iemocap"), 6, 3
    config.batch_size, config.max_frames, config.teacher.projector = 4, 12, variates
    config.student.update({"width": 16, "mlp_dim": 32, "num_heads": 2, "num_layers": 1})
    config.student.dropout = 0.0
    config.contrastive.update({"max_frequency_mask": 0, "max_time_mask": 0})
    config.optimizer.weight_decay = 10.0  # so that it shows what decays
    train, quiz = (make_batch(config, variates, seed) for seed in (0, 1))
    examples = make_examples(train, quiz)
    steps, state, rows = make_steps(config, variates, "second_order", examples)[1][name]
    theirs = torch_steps.make_steps(config, 4, variates, variates, "cpu")[name]
    mean, spread = (np.linspace(*ends, variates, dtype=np.float32) for ends in ((-1, 1), (1, 2)))
    theirs.statistics = torch.tensor(mean), torch.tensor(spread)
    before = jax.device_get(with_statistics(state, Statistics(mean, spread)))

    def student(state):
        return state.params["student"] if name in ("kd", "meta") else state.params

    pairs = {theirs.student: student}
    if name != "student":
        pairs[theirs.classifier] = lambda state: (
            (state.frozen if name == "curriculum" else state).meta_params
        )
    for model, part in [*pairs.items(), (theirs.momentum_student, student)]:
        tensors = {key: torch.tensor(array) for key, array in for_benchmark(part(before)).items()}
        model.load_state_dict(tensors)

    data, taken = examples.take(jax.tree.map(lambda x: np.stack([x] * count), rows))
    started = jax.tree.map(jnp.array, before)  # a copy: the steps take their state
    after = jax.device_get(steps(started, data, taken, np.int32(count), jax.random.key(3))[0])
    batch = {
        part: {key: torch.tensor(array) for key, array in arrays.items()}
        for part, arrays in (("train", train), ("quiz", quiz))
    }
    for _ in range(count):
        theirs(batch["train"] if name == "student" else batch)
    for model, part in pairs.items():
        start, end = (for_benchmark(part(state)) for state in (before, after))
        found = model.state_dict()
        assert found.keys() == end.keys()
        moved = np.concatenate([(end[key] - start[key]).ravel() for key in end])
        apart = np.concatenate([(end[key] - found[key].numpy()).ravel() for key in end])
        assert np.linalg.norm(apart) <= 0.02 * np.linalg.norm(moved)
        assert moved.any() == (model is theirs.student or name == "meta")


@pytest.mark.slow
def test_encoders_are_compared_with_torch_case_by_case():
    command = [sys.executable, "-m", "benchmarks.encoders", "--size=tiny", "--seconds=0", "--json"]
    command += ["--models=wavlm-base,whisper-base", "--cases=10 s, one clip"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    *rows, last = done.stdout.splitlines()
    cases = ["wavlm-base, 10 s, one clip", "whisper-base, 10 s, one clip"]
    assert list(json.loads(last)["ratio"]) == [*cases, f"{cases[1]}; torch pads"]
    differences = [float(row.split("|")[-2]) for row in rows[-3:]]
    assert max(differences[:2]) < 1e-3  # padded to 30 s, torch's Whisper hears something else


@pytest.mark.slow
def test_an_exported_student_is_compared_with_torch_and_the_pipeline():
    command = [sys.executable, "-m", "benchmarks.inference", "--size=tiny", "--seconds=0.01"]
    command += ["--rounds=1", "--formats", "onnx", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    kinds = [(row["kind"], row["format"]) for row in rows[::2]]
    assert kinds == [
        ("log-mel student", "onnx"),
        ("paper's student", "onnx"),
        ("paper's student", "torch"),
        ("HuBERT pipeline", "torch"),
    ]
    for row in rows:
        assert row["model_ms"] > 0
        assert row["file_mb"] > 0
        assert row["memory_mb"] > 20
    for ours, peer in zip(rows[2:4], rows[4:6], strict=True):
        assert ours["ratio"] == pytest.approx(peer["model_ms"] / ours["model_ms"])


def test_the_torch_student_of_the_benchmark_is_the_exported_one(tmp_path):
    config = inference.paper_config("tiny")
    student = dict(config.student)
    folder = write_model(
        tmp_path / "m",
        labels=list(config.labels),
        max_frames=config.max_frames,
        num_features=config.num_features,
        student=student,
        frontend=config.frontend,
    )
    features = np.random.default_rng(0).normal(0, 1, (3, 16, 8)).astype(np.float32)
    inputs = features, np.array([16, 9, 3], np.int32)
    ours = load_classifier(folder, config, "safetensors")(*inputs)
    theirs = inference.load_torch(folder, config, 1)(*inputs)
    np.testing.assert_allclose(theirs, ours, rtol=1e-5, atol=1e-4)


def flops(function, *shapes):
    """As XLA counts them."""
    return jax.jit(function).lower(*shapes).compile().cost_analysis()["flops"]


def test_the_students_operations_are_those_that_xla_counts():
    config, variates = common.paper("iemocap"), 256
    config.max_frames = 200
    config.student.update({"width": 128, "mlp_dim": 512, "num_layers": 2})
    sizes = {"width": 128, "mlp_dim": 512, "num_layers": 2, "num_heads": 8}
    model, features = InvertedStudent(4, **sizes), jnp.zeros((3, 200, variates))
    params = jax.eval_shape(model.init, jax.random.key(0), features, jnp.full(3, 200))
    counted = flops(lambda p: model.apply(p, features, jnp.full(3, 200)).logits, params)
    assert counted == pytest.approx(3 * student_operations(config, variates), rel=0.1)


def test_the_teachers_front_and_layers_cost_what_xla_counts():
    from transformers import HubertConfig

    from serkd_jax.encoders.wav2vec2 import Wav2Vec2Embed, Wav2Vec2Layers

    large = HubertConfig(
        hidden_size=1024,
        num_hidden_layers=1,
        num_attention_heads=16,
        intermediate_size=4096,
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
        conv_bias=True,
    )
    frames = 100
    front, layers = cost.teacher_operations(frames)
    embed, waveform = Wav2Vec2Embed(large), jnp.zeros((1, frames * 320 + 80))
    params = jax.eval_shape(embed.init, jax.random.key(0), waveform)
    assert flops(lambda p: embed.apply(p, waveform)[0], params) == pytest.approx(front, rel=0.1)
    teacher = Teacher(Wav2Vec2Layers(large), 4)
    inputs = jnp.zeros((1, frames, 1024)), jnp.ones((1, frames), bool)
    params = jax.eval_shape(teacher.init, jax.random.key(0), *inputs)
    counted = flops(lambda p: teacher.apply(p, *inputs).logits, params)
    assert counted == pytest.approx(layers / 24, rel=0.1)

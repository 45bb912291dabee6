"""A student of another kind, of ten lines, goes through all that ours does."""

import jax
import numpy as np
import pytest
from flax import linen as nn
from test_stages import STAGES, as_arrays, run

import serkd_jax.models.students as students
from configs import common
from configs.common import with_preset
from layouts import write_wav
from serkd_jax.config import STUDENT_SETTINGS
from serkd_jax.deploy import formats
from serkd_jax.deploy.folder import FILES
from serkd_jax.deploy.trained import STUDENT_ROWS, load_test_inputs, load_trained
from serkd_jax.errors import UserError
from serkd_jax.experiment import ROWS, prepare_experiment
from serkd_jax.export import export
from serkd_jax.files import read_json
from serkd_jax.models.students.base import Student, StudentOutput, size
from serkd_jax.models.transformer import Dropout
from serkd_jax.predict import load_model
from serkd_jax.stages.standardization import standardize
from tiny_config import get_config
from tiny_stages import curriculum_stage, distill_stage, student_stage


class Toy(Student):
    """The mean frame, normalised by the batch."""

    description = "a toy"
    width: int = size(8, 1, 64)

    @nn.compact
    def __call__(self, features, num_frames, dropout_keys=None) -> StudentOutput:
        hidden = nn.Dense(self.width)(features.sum(1) / num_frames[:, None])
        hidden = nn.BatchNorm(dropout_keys is None, momentum=0.5, axis_name=self.axis)(hidden)
        return self.classify_and_project(Dropout(0.2)(nn.relu(hidden), dropout_keys))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of the tiny recipe with the toy, and its workdir."""
    students.STUDENTS["toy"] = f"{__name__}:Toy"
    config = with_preset(get_config(), "toy")
    config.student.update({"width": 12, "classifier_dims": (6,), "projection_dims": (4,)})
    workdir = tmp_path_factory.mktemp("toy")
    prepare_experiment(config, workdir).run()
    yield workdir
    del students.STUDENTS["toy"]


@pytest.mark.slow
def test_it_is_trained_exported_and_predicts_as_ours(finished, tmp_path):
    results = read_json(finished / "results.json", "")
    assert set(results["folds"]["1"]) == {*ROWS, "linear_probe"}
    for row in STUDENT_ROWS:
        trained = load_trained(finished, "1", row)
        assert trained.variables.batch_stats["BatchNorm_0"]["mean"].shape == (12,)
        folder = tmp_path / row
        forms = list(FILES) if row == "updated_student" else ["safetensors"]
        checked = export(trained, folder, forms, load_test_inputs(trained, None))
        differences = {one.form: one.difference for one in checked}
        assert differences["run"] < 1e-5, "not the student that was tested"
        exact = {form: x for form, x in differences.items() if "8" not in form and "16" not in form}
        assert max(exact.values()) < 1e-5
    folder = tmp_path / "updated_student"
    config = read_json(folder / "config.json", "")
    kept = {"kind": "toy", "width": 12, "classifier_dims": [6]}
    assert config["student"] == kept
    assert "a toy taught by a larger model" in " ".join((folder / "README.md").read_text().split())
    write_wav(tmp_path / "a.wav", seed=3)
    found = [load_model(folder, form)(tmp_path / "a.wav") for form in ("safetensors", "onnx")]
    first, second = ([*one.probabilities.values()] for one in found)
    np.testing.assert_allclose(first, second, atol=1e-5)


TINY = Toy(3, width=12, classifier_dims=(10,), projection_dims=(12, 8))


@pytest.mark.parametrize("stage", [student_stage, distill_stage, curriculum_stage])
def test_its_batch_statistics_are_those_of_all_devices(stage, monkeypatch):
    monkeypatch.setitem(STAGES, "toy", lambda: stage(model=TINY))
    (one, _), (eight, _) = run("toy", 1), run("toy", 8)
    start = stage(model=TINY)[1]().batch_stats["BatchNorm_0"]["mean"]
    after = np.asarray(one.batch_stats["BatchNorm_0"]["mean"])
    assert np.abs(after - start).max() > 0.1
    followed = np.asarray(one.momentum_stats["BatchNorm_0"]["mean"])
    assert 0 < np.abs(followed - start).max() < np.abs(after - start).max()
    for a, b in zip(as_arrays(one), as_arrays(eight), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5)


def test_its_statistics_after_a_step_are_those_of_flax():
    make_step, init, batch = student_stage(model=TINY)
    state, one = init(), batch(0)
    after, _ = jax.jit(make_step())(state, one, jax.random.key(7))
    features = standardize(one["inputs"], one["length"], state.frozen)
    hidden = nn.Dense(12).apply(
        {"params": state.params["Dense_0"]}, features.sum(1) / one["length"][:, None]
    )
    expected = 0.5 * state.batch_stats["BatchNorm_0"]["mean"] + 0.5 * np.asarray(hidden).mean(0)
    np.testing.assert_allclose(after.batch_stats["BatchNorm_0"]["mean"], expected, atol=1e-5)


def test_a_format_that_cannot_hold_it_is_named_with_the_remedy(finished, tmp_path, monkeypatch):
    def refuse(*_):
        raise NotImplementedError("no such primitive\n  in frame 17")

    monkeypatch.setitem(formats._WRITERS, "onnx", refuse)
    trained = load_trained(finished, "1", "student")
    with pytest.raises(UserError, match=r"onnx cannot hold a student of kind 'toy'.* primitive$"):
        export(trained, tmp_path / "out", ["onnx"], None)


def test_a_kind_is_a_preset_with_its_own_sizes(monkeypatch):
    monkeypatch.setitem(students.STUDENTS, "toy", f"{__name__}:Toy")
    ours, toy = (with_preset(common.paper(), preset) for preset in ("logmel", "logmel,toy"))
    assert toy.student.to_dict() == {
        "kind": "toy",
        "width": 8,
        "classifier_dims": (384, 128),
        "projection_dims": (256, 256),
        **{key: ours.student[key] for key in STUDENT_SETTINGS if key != "kind"},
    }
    assert toy.teacher == ours.teacher
    assert with_preset(common.paper(), "logmel,inverted").student == ours.student
    with pytest.raises(ValueError, match="no preset 'tow': use :logmel"):
        with_preset(common.paper(), "logmel,tow")

"""Students of other kinds go through all that ours does: one of ten lines, and all that we have."""

import jax
import numpy as np
import pytest
from flax import linen as nn
from test_stages import STAGES, as_arrays, run

import serkd_jax.models.students as students
from configs import common, emodb, systems
from configs.common import with_preset
from exported_models import write_model
from layouts import write_wav
from serkd_jax.config import STUDENT_SETTINGS, check_config
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
from serkd_jax.stages.base import make_schedule
from serkd_jax.stages.standardization import standardize
from tiny_config import get_config
from tiny_stages import curriculum_stage, distill_stage, student_stage
from tiny_students import SYSTEMS, TINY, deployed_sizes, random_inputs, random_variables, tiny


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


TOY = Toy(3, width=12, classifier_dims=(10,), projection_dims=(12, 8))
TIMNET = tiny("timnet", projection_dims=(8,), dropout=0.0)


@pytest.mark.parametrize("stage", [student_stage, distill_stage, curriculum_stage])
def test_its_batch_statistics_are_those_of_all_devices(stage, monkeypatch):
    monkeypatch.setitem(STAGES, "toy", lambda: stage(model=TOY))
    (one, _), (eight, _) = run("toy", 1), run("toy", 8)
    start = stage(model=TOY)[1]().batch_stats["BatchNorm_0"]["mean"]
    after = np.asarray(one.batch_stats["BatchNorm_0"]["mean"])
    assert np.abs(after - start).max() > 0.1
    followed = np.asarray(one.momentum_stats["BatchNorm_0"]["mean"])
    assert 0 < np.abs(followed - start).max() < np.abs(after - start).max()
    for a, b in zip(as_arrays(one), as_arrays(eight), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5)


def test_statistics_of_valid_frames_are_those_of_all_devices(monkeypatch):
    """The devices have unequal numbers of valid frames."""
    monkeypatch.setitem(STAGES, "timnet", lambda: student_stage(model=TIMNET))
    (one, _), (eight, _) = run("timnet", 1), run("timnet", 8)
    for a, b in zip(as_arrays(one), as_arrays(eight), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5)


def test_its_statistics_after_a_step_are_those_of_flax():
    make_step, init, batch = student_stage(model=TOY)
    state, one = init(), batch(0)
    after, _ = jax.jit(make_step())(state, one, jax.random.key(7))
    features = standardize(one["inputs"], one["length"], state.frozen)
    hidden = nn.Dense(12).apply(
        {"params": state.params["Dense_0"]}, features.sum(1) / one["length"][:, None]
    )
    expected = 0.5 * state.batch_stats["BatchNorm_0"]["mean"] + 0.5 * np.asarray(hidden).mean(0)
    np.testing.assert_allclose(after.batch_stats["BatchNorm_0"]["mean"], expected, atol=1e-5)


def test_every_kind_is_tested():
    assert students.STUDENTS.keys() - {"toy"} == {"inverted", *TINY}


@pytest.mark.parametrize("kind", TINY)
def test_padding_changes_nothing_unless_it_is_to_be_seen_nor_does_the_rest_of_the_batch(kind):
    model, (features, num_frames) = tiny(kind), random_inputs(4, 20, 8)
    variables = random_variables(model, features, num_frames)
    apply = jax.jit(model.apply)
    expected = apply(variables, features, num_frames).logits
    noise = 9.0 * (np.arange(20) >= num_frames[:, None])[..., None]
    noisy = apply(variables, features + noise.astype(np.float32), num_frames).logits
    np.testing.assert_allclose(noisy, expected, atol=1e-6)

    others, lengths = random_inputs(4, 20, 8, seed=1)
    others[3], lengths[3] = features[1], num_frames[1]
    among_others = apply(variables, others, lengths).logits[3]
    np.testing.assert_allclose(among_others, expected[1], atol=1e-6)

    if not hasattr(model, "see_padding"):
        return
    seen = jax.jit(tiny(kind, see_padding=True).apply)(variables, features, num_frames).logits
    np.testing.assert_allclose(seen[0], expected[0], atol=1e-6)  # where there is none
    assert (np.abs(seen - expected)[1:].max(1) > 1e-3).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", [kind for kind in TINY if kind not in ("shiftformer", "shiftlstm")]
)
def test_every_kind_takes_the_step_of_distillation(kind):
    """With dropout and masks; the meta-teacher's gradient is through the student's.

    What shiftformer and shiftlstm are made of is in others.
    """
    make_step, init, batch = distill_stage(model=tiny(kind, projection_dims=(8,)))
    before = init()
    after, metrics = jax.jit(make_step())(before, batch(0), jax.random.key(0))
    assert all(np.isfinite(value) for value in metrics.values()), metrics
    pairs = zip(*(jax.tree.leaves(s.params) for s in (before, after)), strict=True)
    assert np.mean([bool((a != b).any()) for a, b in pairs]) > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in TINY if kind != "mmdfn"])
def test_every_kind_is_exported_and_predicts_as_in_flax(kind, tmp_path):
    folder = write_model(
        tmp_path / "model", ["safetensors", "onnx", "tflite"], student=deployed_sizes(kind)
    )
    write_wav(tmp_path / "a.wav", seed=3)
    found = [
        [*load_model(folder, form)(tmp_path / "a.wav").probabilities.values()]
        for form in ("safetensors", "onnx", "tflite")
    ]
    for probabilities in found[1:]:
        np.testing.assert_allclose(probabilities, found[0], atol=1e-4)


def test_a_format_that_cannot_hold_it_is_named_with_the_remedy(finished, tmp_path, monkeypatch):
    def refuse(*_):
        raise NotImplementedError("no such primitive\n  in frame 17")

    monkeypatch.setitem(formats._WRITERS, "onnx", refuse)
    trained = load_trained(finished, "1", "student")
    with pytest.raises(UserError, match=r"onnx cannot hold a student of kind 'toy'.* primitive$"):
        export(trained, tmp_path / "out", ["onnx"], None)


THEIR_FRONT_ENDS = {"timnet": "mfcc", "dwformer": "wavlm", "camser": "wav2vec2"}
THEIR_FRONT_ENDS |= dict.fromkeys(("shiftcnn", "shiftformer", "shiftlstm"), "hubert")


@pytest.mark.parametrize("kind", SYSTEMS)
def test_every_kind_is_a_preset_of_every_recipe_and_trained_as_by_its_authors(kind):
    for name, recipe in systems.RECIPES.items():
        for preset in ("", "logmel,", "whisper,", "logmel-from-whisper,"):
            config = systems.get_config(f"{kind},{name},{preset.rstrip(',')}")
            ours = recipe.get_config(preset.rstrip(","))
            for part in ("protocol", "corpus", "max_frames"):
                assert config[part] == ours[part]
            theirs = {} if preset else THEIR_FRONT_ENDS
            assert config.frontend.name == theirs.get(kind, ours.frontend.name)
            for each in (config, recipe.get_config(f"{preset}{kind}")):
                if kind == "camser" and preset.startswith("logmel"):
                    with pytest.raises(UserError, match="use an encoder as front-end, with"):
                        check_config(each)
                else:
                    check_config(each)


RATES = {  # epoch -> rate
    "timnet": {0: 1e-3, 499: 1e-3},
    "dwformer": {
        0: 5e-4,
        1.5: 2.55e-4,
        3: 5e-4,
        9: 5e-4,
        21: 5e-4,
        44.99: 1e-5,
        45: 5e-4,
        93: 5e-4,
    },
    "shiftcnn": {0: 0, 2.5: 2.5e-4, 5: 5e-4, 52.5: 2.525e-4, 99.99: 5e-6},
    "speechformer": {0: 5e-4, 60: 2.525e-4, 119.99: 5e-6},
    "camser": {0: 1e-5, 99.99: 1e-5},
    "mmdfn": {0: 1e-4, 29.99: 1e-4},
}


@pytest.mark.parametrize("kind", RATES)
def test_the_rates_are_those_of_the_authors(kind):
    config, steps = systems.get_config(kind), 100
    total = config.student.epochs * steps
    schedule = make_schedule(config.optimizer, config.student.learning_rate, total)
    for epoch, rate in RATES[kind].items():
        assert schedule(round(epoch * steps)) == pytest.approx(rate, rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("kind", RATES)
def test_the_training_of_its_authors_does_not_depend_on_that_of_the_recipe(kind):
    config, plain = emodb.get_config("whisper"), emodb.get_config("whisper")
    config.optimizer.update({"name": "sgd", "beta1": 0.5, "first_cycle": 0.1, "final": 0.5})
    config.optimizer.update({"schedule": "cosine", "warmup": 0.5, "decayed": "all"})
    config.student.update({"label_smoothing": 0.2, "focus": 2.0})
    config.update({"patience": 3, "batch_size": 7})
    made = [systems.with_system(each, kind).to_dict() for each in (config, plain)]
    assert made[0] == made[1]


def test_a_system_or_a_recipe_that_there_is_not_is_named():
    with pytest.raises(ValueError, match="there is no 'timmet': use one of timnet, dwformer"):
        systems.get_config("timmet")
    with pytest.raises(ValueError, match="there is no 'emodv': use one of iemocap"):
        systems.get_config("timnet,emodv")


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

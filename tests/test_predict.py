"""Predictions of an exported model: windows, rates, files, formats, and input of bad intent."""

import csv
import json
import pickle
import shutil
import subprocess
import sys
import textwrap

import huggingface_hub
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import onnx
import pytest
import soundfile
import soxr
import torch
import transformers
from safetensors.numpy import load_file, save_file

from exported_models import STUDENT, logits_by_hand, settings, write_model
from layouts import ROOT, SHARED, needs_corpora, tone, write_mp4
from serkd_jax import predict
from serkd_jax.audio.waveform import AudioError
from serkd_jax.deploy.backends import load_frontend
from serkd_jax.deploy.folder import FILES, parse_config, read_config, sealed
from serkd_jax.encoders.checkpoint import load_encoder, save_encoder
from serkd_jax.errors import UserError
from serkd_jax.predict import Failure, load_model

WINDOW = 24 * 320 + 400  # samples of 25 frames


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return write_model(
        tmp_path_factory.mktemp("model") / "m", ("safetensors", "onnx", "tflite", "stablehlo")
    )


@pytest.fixture(scope="session")
def model(folder):
    return load_model(folder)


@pytest.fixture
def copied(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copied")


def by_hand(folder, waveform):
    """Probabilities of one window, by parts of training; 16 bits and the softmax by hand."""
    config = read_config(folder)
    samples = np.floor(2**15 * waveform.astype(np.float64) + 0.5).clip(-(2**15), 2**15 - 1)
    features, num_frames = load_frontend(folder, config)([(samples / 2**15).astype(np.float32)])
    values = np.exp(logits_by_hand(folder, features, num_frames)[0].astype(np.float64))
    return values / values.sum()


def values(prediction):
    return np.array(list(prediction.probabilities.values()))


def test_a_short_recording_is_one_window_that_the_student_sees_as_in_training(model, folder):
    waveform = tone(440, seconds=0.3)
    prediction = model(waveform)
    expected = by_hand(folder, waveform)
    np.testing.assert_allclose(values(prediction), expected, atol=1e-5)
    assert prediction.label == model.labels[expected.argmax()]
    (window,) = prediction.windows
    assert (window.start, window.end) == (0, 0.3)


@pytest.mark.parametrize("hop", [None, 0.2])
def test_a_long_recording_is_the_mean_of_windows_that_cover_it(hop, model, folder):
    waveform = np.concatenate([tone(hz, hz, 0.37) for hz in (200, 800, 3000)])
    prediction = model(waveform, hop_seconds=hop)
    starts = [round(16_000 * window.start) for window in prediction.windows]
    steps = np.diff(starts)
    assert starts[0] == 0
    assert (steps[:-1] == (WINDOW if hop is None else 3200)).all()
    assert steps[-1] <= steps[0]
    assert prediction.windows[-1].end == round(len(waveform) / 16_000, 3)
    expected = [by_hand(folder, waveform[start : start + WINDOW]) for start in starts]
    got = [list(window.probabilities.values()) for window in prediction.windows]
    np.testing.assert_allclose(got, expected, atol=1e-5)
    np.testing.assert_allclose(values(prediction), np.mean(expected, axis=0), atol=1e-5)


def test_silent_windows_are_left_out(model):
    speech = tone(300, seconds=WINDOW / 16_000)
    padded = np.concatenate([speech, np.zeros(2 * WINDOW, np.float32)])
    (window,) = model(padded).windows
    assert window.start == 0
    np.testing.assert_allclose(values(model(padded)), values(model(speech)), atol=1e-6)


def as_int16(audio):
    return np.round(audio * 32767).astype(np.int16)


@pytest.mark.parametrize(
    "change",
    [
        lambda a: (as_int16(a), 16_000),
        lambda a: (np.round(a * 127 + 128).astype(np.uint8), 16_000),
        lambda a: ((a * 2.0**31).astype(np.int32), 16_000),
        lambda a: (np.stack([a, a], axis=1).astype(np.float64), 16_000),
        lambda a: (soxr.resample(a, 16_000, 44_100), 44_100),
    ],
)
def test_samples_of_any_type_rate_and_channels_give_the_same(change, model):
    audio = tone(500, seconds=0.4)
    samples, rate = change(audio)
    np.testing.assert_allclose(values(model(samples, rate)), values(model(audio)), atol=0.02)


@pytest.mark.parametrize(
    ("audio", "rate", "message"),
    [
        (np.zeros(8000), 16_000, "silent"),
        (np.full(8000, np.nan), 16_000, "NaN"),
        (np.ones(100), 16_000, "less than one frame"),
        (np.ones((2, 2, 2)), 16_000, "are not audio"),
        (np.ones(8000, complex), 16_000, "are not audio"),
        (np.ones(8000), 1, "1 Hz is not a rate of audio"),
        (np.full(8000, 1e38), 16_000, "full scale is 1"),
        (np.full(8000, 3000.0), 16_000, "samples of 3000, where full scale is 1"),
        (np.resize([0.5, -0.5], 160_001), 16_000, "longer than 10 s"),
    ],
)
def test_samples_that_are_no_speech_are_refused(audio, rate, message, folder):
    with pytest.raises(AudioError, match=message):
        load_model(folder, max_seconds=10)(audio, rate)


def test_batches_do_not_change_results_nor_their_order(model, tmp_path):
    recordings = [(tone(hz, hz, seconds), 16_000) for hz, seconds in zip(
        (200, 400, 900, 2000, 5000), (0.2, 1.9, 0.5, 1.1, 0.6), strict=True)]  # fmt: skip
    recordings.insert(2, tmp_path / "missing.wav")
    one, many = (list(model.predict(recordings, batch_size=size)) for size in (1, 4))
    assert isinstance(one[2], Failure)
    assert one[2] == many[2]
    for a, b in zip(one, many, strict=True):
        if not isinstance(a, Failure):
            np.testing.assert_allclose(values(a), values(b), atol=1e-6)
            assert [w[:3] for w in a.windows] == [w[:3] for w in b.windows]


# The command


@pytest.fixture
def recordings(tmp_path):
    place = tmp_path / "recordings"
    (place / "deep").mkdir(parents=True)
    soundfile.write(place / "a.wav", tone(300, seconds=1.2), 16_000)
    soundfile.write(place / "deep" / "b.mp3", tone(3000, rate=44_100, seconds=0.4), 44_100)
    write_mp4(place / "deep" / "c.mp4", tone(900, seconds=0.4), 16_000)
    (place / "deep" / "broken.flac").write_bytes(b"fLaC, or so it says")
    (place / "notes.txt").write_text("no audio")
    return place


def command(capsys, *flags):
    status = predict.main([*map(str, flags)])
    return status, *capsys.readouterr()


def test_the_command_does_the_rest_when_a_file_cannot_be_read(folder, recordings, capsys, model):
    status, out, err = command(capsys, f"--model={folder}", recordings)
    assert status == 1
    assert [line.split(":")[0] for line in out.splitlines() if line[0] != " "] == [
        str(recordings / name) for name in ("a.wav", "deep/b.mp3", "deep/c.mp4")
    ]
    assert out.count(" s: ") == len(model(recordings / "a.wav").windows) == 3
    assert "broken.flac: unreadable" in err
    assert "1 of 4 recordings could not be used" in err
    assert command(capsys, f"--model={folder}", recordings / "a.wav")[0] == 0


def test_json_and_csv_say_the_same(folder, recordings, capsys, model):
    objects = [json.loads(line) for line in command(
        capsys, f"--model={folder}", recordings, "--json")[1].splitlines()]  # fmt: skip
    rows = [*csv.DictReader(command(
        capsys, f"--model={folder}", recordings, "--csv")[1].splitlines())]  # fmt: skip
    assert [row["source"] for row in rows if row["error"]] == [
        each["source"] for each in objects if "error" in each
    ]
    windows = [(each["source"], w) for each in objects for w in each.get("windows", ())]
    for (source, window), row in zip(windows, (r for r in rows if not r["error"]), strict=True):
        assert (source, window["label"]) == (row["source"], row["label"])
        assert (window["start"], window["end"]) == (float(row["start"]), float(row["end"]))
        for label in model.labels:
            assert window["probabilities"][label] == pytest.approx(float(row[label]), abs=1e-6)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model={empty}", "a.wav"], "has no config.json: name a folder"),
        (
            ["--model={folder}", "--format=onnx-int8", "a.wav"],
            r"has no model.int8.onnx",
        ),
        (["--model={folder}", "{empty}"], "holds no audio file"),
        (["--model={folder}", "--hop=9", "a.wav"], "hop_seconds is 9"),
        (["--model=no/model", "a.wav"], "neither a local folder nor a model"),
    ],
)
def test_what_cannot_be_done_is_told_in_one_line(flags, message, folder, tmp_path, capsys):
    flags = [flag.format(folder=folder, empty=tmp_path) for flag in flags]
    status, out, err = command(capsys, *flags)
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert message in err


@pytest.mark.parametrize(
    "flags", [["--hop=nan"], ["--max_seconds=-1"], ["--batch_size=0"], ["--json", "--csv"]]
)
def test_flags_that_make_no_sense_are_refused(flags, folder, capsys):
    with pytest.raises(SystemExit) as caught:
        command(capsys, f"--model={folder}", *flags, "a.wav")
    assert caught.value.code == 2


def test_a_loud_file_and_one_with_a_long_name_do_not_stop_the_others(folder, recordings, capsys):
    soundfile.write(recordings / "loud.wav", np.full(9000, 3e38, np.float32), 16_000, "FLOAT")
    files = [recordings / "loud.wav", "x" * 300 + ".wav", recordings / "a.wav"]
    status, out, err = command(capsys, f"--model={folder}", *files)
    assert status == 1
    assert out.startswith(f"{recordings / 'a.wav'}: ")
    assert err.count("error: ") == 2


BLOCK = """
import sys

class Absent:
    def find_spec(self, name, *_):
        if name.split(".")[0] in {absent}:
            raise ModuleNotFoundError(f"no {{name}} here", name=name)

sys.meta_path.insert(0, Absent())
"""


def run_without(absent, code):
    code = BLOCK.format(absent=set(absent)) + textwrap.dedent(code)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_onnx_runs_on_numpy_and_onnxruntime_alone(folder, model):
    absent = "jax jaxlib flax optax orbax tensorflow torch transformers scipy sklearn soundfile"
    absent += " soxr av absl ml_collections huggingface_hub safetensors tqdm onnx ai_edge_litert"
    out = run_without(
        absent.split(),
        f"""
        import numpy as np
        from serkd_jax.predict import load_model

        audio = np.sin(np.arange(9000) / 10).astype(np.float32)
        print(list(load_model({str(folder)!r}, "onnx")(audio).probabilities.values()))
        """,
    )
    audio = np.sin(np.arange(9000) / 10).astype(np.float32)
    np.testing.assert_allclose(json.loads(out), values(model(audio)), atol=1e-5)


def test_the_weights_run_without_tensorflow_torch_and_orbax(folder, recordings):
    out = run_without(
        ["tensorflow", "tensorflow_datasets", "torch", "orbax", "onnxruntime"],
        f"""
        from serkd_jax.predict import load_model

        print(load_model({str(folder)!r})({str(recordings / "a.wav")!r}).label)
        """,
    )
    assert out.strip() in read_config(folder).labels


@needs_corpora
def test_real_recordings_get_the_same_in_onnx_and_flax(folder, model):
    files = sorted((SHARED / "emodb" / "wav").glob("*.wav"))[::60]
    for a, b in zip(model.predict(files), load_model(folder, "onnx").predict(files), strict=True):
        assert len(a.windows) == 4  # recordings of two seconds
        np.testing.assert_allclose(values(a), values(b), atol=1e-5)


# HuBERT, and the hub


@pytest.fixture
def with_hubert(tmp_path, hubert_folder):
    frontend = {"name": "hubert", "model": None, "revision": None, "layer": -1, "dtype": "float32"}
    frontend["pad_to_30s"] = False
    checkpoint = load_encoder(hubert_folder)
    save_encoder(checkpoint, tmp_path / "frontend")
    sha256 = load_encoder(tmp_path / "frontend").sha256
    frontend["fingerprint"] = f"hubert-v3-{sha256}--1-float32"
    folder = write_model(tmp_path / "model", num_features=16, frontend=frontend)
    shutil.move(tmp_path / "frontend", folder / "frontend")
    return folder


def test_a_hubert_front_end_comes_with_the_folder(with_hubert, hubert_oracle):
    config, waveform = read_config(with_hubert), tone(300, seconds=0.4)
    features, num_frames = load_frontend(with_hubert, config)([waveform])
    expected = hubert_oracle(waveform)
    assert num_frames == [len(expected)]
    np.testing.assert_allclose(features[0, : len(expected)], expected, atol=5e-3)
    assert not features[0, len(expected) :].any()
    np.testing.assert_allclose(
        values(load_model(with_hubert)(waveform)), by_hand(with_hubert, waveform), atol=1e-5
    )


def test_another_hubert_than_in_training_is_refused(with_hubert):
    checkpoint = load_encoder(with_hubert / "frontend")
    checkpoint.params["encoder"]["layers_0"]["output_dense"]["bias"][0] += 1
    save_encoder(checkpoint, with_hubert / "frontend")
    with pytest.raises(UserError, match="is not the hubert that"):
        load_model(with_hubert)


def test_a_hubert_in_a_pickle_is_not_opened(with_hubert):
    frontend = with_hubert / "frontend"
    weights = transformers.HubertModel.from_pretrained(frontend).state_dict()
    torch.save(weights, frontend / "pytorch_model.bin")
    (frontend / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has none of model\.safetensors: no weights"):
        load_model(with_hubert)
    index = {"weight_map": {"a": "pytorch_model.bin"}}
    (frontend / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="names files of another place or kind"):
        load_model(with_hubert)


@pytest.mark.parametrize(
    "changes", [{"num_attention_heads": 0}, {"hidden_size": -1}, {"conv_stride": [0] * 7}]
)
def test_a_hubert_that_is_none_is_refused(changes, with_hubert):
    path = with_hubert / "frontend" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError):
        load_model(with_hubert)


def test_a_name_on_the_hub_goes_through_the_same_code(folder, model, tmp_path, monkeypatch):
    """From the hub's cache, offline."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--someone--emotions"
    shutil.copytree(folder, repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    audio = tone(700, seconds=0.4)
    assert load_model("someone/emotions")(audio) == model(audio)


# Bad intent, or bad luck


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 1}, "format is not 3"),
        ({"labels": ["anger", "joy"]}, "classifier_1"),
        ({"labels": ["anger", "anger", "joy"]}, "two labels are the same"),
        ({"labels": ["anger", 3, " "]}, "a label is not a name"),
        ({"labels": ["anger", "joy", "\x1b[2J"]}, "a label is not a name"),
        ({"labels": "anger"}, "labels is not a list"),
        ({"max_frames": 10**12}, "max_frames is 1000000000000"),
        ({"max_frames": True}, "max_frames is True"),
        (
            {
                "max_frames": 9999,
                "student": STUDENT | {"inverted": False, "readout": "tokens", "num_heads": 16},
            },
            "too large",
        ),
        ({"num_features": 9}, "num_mels is not num_features"),
        ({"student": STUDENT | {"width": 32}}, "embed.bias"),
        ({"student": STUDENT | {"readout": "tokens"}}, "classifier_0.kernel"),
        ({"student": STUDENT | {"readout": "mean"}}, "readout is mean: use variates or tokens"),
        ({"student": STUDENT | {"readout": ["tokens"]}}, r"readout is \['tokens'\]: use variates"),
        ({"student": STUDENT | {"norm": None}}, "norm is None: use pre or post"),
        ({"student": STUDENT | {"inverted": False}}, "readout is variates, but its tokens are"),
        ({"student": STUDENT | {"classifier_dims": 8}}, "classifier_dims is 8: use a list"),
        ({"student": STUDENT | {"classifier_dims": [8] * 9}}, "use a list of up to 8"),
        ({"student": STUDENT | {"classifier_dims": [8, 0]}}, "each an integer, 1 to 8192"),
        ({"student": STUDENT | {"classifier_dims": []}}, "classifier_0.bias is float32"),
        (
            {"student": STUDENT | {"readout": "flatten", "width": 8192, "classifier_dims": [8192]}},
            "too large",
        ),
        ({"student": STUDENT | {"width": 10**9}}, "student.width"),
        ({"student": STUDENT | {"num_heads": 3}}, "not divisible"),
        ({"student": STUDENT | {"code": "os.system('true')"}}, "must have the keys"),
        ({"student": None}, "student.kind is not one of inverted"),
        ({"student": {"kind": {}}}, "student.kind is not one of inverted"),
        ({"frontend": {"name": "logmel", "num_mels": 8, "fingerprint": "v0"}}, "another version"),
        (
            {"frontend": {"name": "../../etc"}},
            "frontend.name is not one of logmel, mfcc, spectra, hubert",
        ),
        ({"frontend": {"name": "hubert", "model": "../../etc"}}, "not a name on the hub"),
        ({"frontend": {"name": "hubert", "model": "/etc/passwd"}}, "not a name on the hub"),
        ({"frontend": {"name": "hubert", "model": "a/.."}}, "not a name on the hub"),
        ({"frontend": {"name": "whisper", "model": "a/b", "layer": [1, "2"]}}, "neither a number"),
        ({"frontend": {"name": "wavlm", "model": "a/b", "layer": 3}}, "neither true nor false"),
    ],
)
def test_an_edited_config_is_refused(changes, message, copied):
    (copied / "config.json").write_text(json.dumps(sealed(settings(**changes))))
    with pytest.raises(UserError, match=message):
        load_model(copied)


@pytest.mark.parametrize("key", ["labels", "student", "max_frames"])
def test_an_edit_that_fits_the_weights_is_refused_too(key, copied):
    changes = {"labels": ["joy", "anger", "sadness"], "max_frames": 24}
    changes["student"] = STUDENT | {"num_heads": 1}
    path = copied / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: changes[key]}))
    with pytest.raises(UserError, match="its sha256 does not match"):
        load_model(copied)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b"1" * 2_000_000, b"null"]
)
def test_a_config_that_is_none_is_refused(content, copied):
    (copied / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        load_model(copied)


class Trap:
    def __reduce__(self):
        return pytest.fail, ("a pickle was opened",)


DAMAGE = {
    "empty": lambda data: b"",
    "truncated": lambda data: data[: len(data) // 2],
    "pickle": lambda data: pickle.dumps(Trap()),
    "other": lambda data: b"\x00" * len(data),
}


@pytest.mark.parametrize("form", ["safetensors", "onnx", "tflite", "stablehlo"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_refused_and_never_run(form, damage, copied):
    path = copied / FILES[form]
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    with pytest.raises(UserError, match="cannot be read; it is truncated, damaged"):
        load_model(copied, form)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("embed.kernel"), r"embed.kernel is absent, not float32\(13, 16\)"),
        (
            lambda t: t.update(projection=np.zeros(3, np.float32)),
            "projection is float32.*not",
        ),
        (lambda t: t.update({"embed.bias": np.zeros(3, np.float32)}), "embed.bias is"),
        (lambda t: t.update({"embed.bias": np.zeros(16)}), "embed.bias is float64"),
        (lambda t: t["embed.bias"].fill(np.nan), "embed.bias holds NaN"),
        (lambda t: t.pop("statistics.mean"), r"statistics.mean is absent, not float32\(8,\)"),
        (lambda t: t.pop("statistics.spread"), "statistics.spread is absent"),
        (lambda t: t.update({"statistics.mean": np.zeros(9, np.float32)}), "statistics.mean is"),
        (lambda t: t["statistics.spread"].fill(np.nan), "statistics.spread holds NaN"),
        (lambda t: t["statistics.spread"][:1].fill(0), "statistics.spread is not positive"),
    ],
)
def test_weights_of_another_model_are_refused_with_the_name(change, message, copied):
    tensors = load_file(copied / "model.safetensors")
    change(tensors)
    save_file(tensors, copied / "model.safetensors")
    with pytest.raises(UserError, match=message):
        load_model(copied)


def onnx_model(nodes, initializers=(), kind=onnx.TensorProto.INT32):
    """A graph with the inputs of an exported one."""
    make = onnx.helper.make_tensor_value_info
    features = make("features", onnx.TensorProto.FLOAT, ["B", 25, 8])
    inputs = [features, make("num_frames", kind, ["B"])]
    outputs = [make(nodes[-1].output[0], onnx.TensorProto.FLOAT, None)]
    graph = onnx.helper.make_graph(nodes, "g", inputs, outputs, initializers)
    return onnx.helper.make_model(graph, ir_version=10, opset_imports=[
        onnx.helper.make_opsetid("", 21)]).SerializeToString()  # fmt: skip


def test_an_onnx_model_cannot_read_other_files(copied, monkeypatch):
    """Neither beside itself nor in the folder that the program is in."""
    table = np.arange(12, dtype=np.float32).reshape(4, 3)
    monkeypatch.chdir(copied)
    (copied / "secret").write_bytes(table.tobytes())
    tensor = onnx.numpy_helper.from_array(table, "table")
    onnx.external_data_helper.set_external_data(tensor, "secret", 0, table.nbytes)
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    gather = onnx.helper.make_node("Gather", ["table", "num_frames"], ["logits"])
    (copied / "model.onnx").write_bytes(onnx_model([gather], [tensor]))
    with pytest.raises(UserError, match=r"model\.onnx cannot be r"):
        load_model(copied, "onnx")(tone(300))


@pytest.mark.parametrize(
    ("output", "kind", "problem"),
    [
        ("logits", onnx.TensorProto.INT64, "cannot be run"),
        ("other", onnx.TensorProto.INT32, "cannot be run"),
        ("logits", onnx.TensorProto.INT32, "of a wrong shape"),
    ],
)
def test_a_graph_that_does_not_keep_its_promise_is_told(output, kind, problem, copied):
    node = onnx.helper.make_node("Identity", ["features"], [output])
    (copied / "model.onnx").write_bytes(onnx_model([node], kind=kind))
    with pytest.raises(UserError, match=problem):
        load_model(copied, "onnx")(tone(300))


def test_a_stablehlo_model_cannot_call_functions_of_the_process(copied):
    """Here LAPACK, as jax.export itself refuses callbacks."""

    def factorise(features, num_frames):
        return jnp.linalg.cholesky(features[:, :8, :8])[:, 0, :3]

    shapes = (jax.ShapeDtypeStruct((2, 25, 8), "float32"), jax.ShapeDtypeStruct((2,), "int32"))
    exported = jax.export.export(jax.jit(factorise), platforms=["cpu"])(*shapes)
    (copied / "model.stablehlo").write_bytes(exported.serialize())
    with pytest.raises(UserError, match="it calls lapack_"):
        load_model(copied, "stablehlo")


def test_a_model_that_gives_no_numbers_says_so(copied):
    graph = onnx.load(copied / "model.onnx")
    for tensor in graph.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) == 2:
            values = np.full(tensor.dims, np.nan, np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    (copied / "model.onnx").write_bytes(graph.SerializeToString())
    with pytest.raises(UserError, match="logits that are not finite"):
        load_model(copied, "onnx")(tone(300))


def test_the_right_config_is_what_an_export_writes():
    config = parse_config(settings())
    assert parse_config(json.loads(config.to_json())) == config

"""Our encoders against those of transformers in torch: the same weights, clips and batches.

    pip install -e '.[test]' && python -m benchmarks.encoders

Both turn NumPy waveforms into NumPy float16 features, including the preprocessor, taking turns in
one process. On CPU, torch runs in float32 with scaled dot-product attention (WavLM in torch does
not have it), on as many threads as there are cores, and pads a batch to its longest clip. Whisper
in torch pads every clip to 30 s. We time that, and also its modules on clips at their own length,
one by one, since they take no mask. On a GPU both compute in bfloat16, torch is compiled, and its
batches have our few shapes. `--json` ends with one line of JSON, in which `ratio` is our speed over
torch's for each case.
"""

import os

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the GPU is shared with torch

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import torch
import transformers
from absl import app, flags, logging

from benchmarks.common import JSON, SECONDS, SIZE, by_turns, cells, describe_machine, markdown
from benchmarks.steps import matmul_peak
from serkd_jax.audio.logmel import num_frames, num_samples
from serkd_jax.encoders.frontends import (
    ACCELERATOR_BATCHING,
    CPU_BATCHING,
    Batching,
    Pretrained,
    plan_batches,
)

LARGE = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "feat_extract_norm": "layer",
    "do_stable_layer_norm": True,
}
# Names on the hub, without their owners, and what differs from the defaults of transformers. In
# base variants torch's group norm sees the padding: its results differ from ours for mixed lengths.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "hubert-base": ("Hubert", {}),
    "hubert-large": ("Hubert", LARGE | {"conv_bias": True}),
    "wav2vec2-base": ("Wav2Vec2", {}),
    "wav2vec2-large": ("Wav2Vec2", LARGE | {"conv_bias": True}),
    "wavlm-base": ("WavLM", {}),
    "wavlm-large": ("WavLM", LARGE),
    "whisper-tiny": ("Whisper", {"d_model": 384, "encoder_layers": 4, "encoder_ffn_dim": 1536}),
    "whisper-base": (
        "Whisper",
        {
            "d_model": 512,
            "encoder_layers": 6,
            "encoder_attention_heads": 8,
            "encoder_ffn_dim": 2048,
        },
    ),
}
TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "conv_dim": (32,) * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
}
TINY_WHISPER = {
    "d_model": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
}
NO_DECODER = {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 8}

_MODELS = flags.DEFINE_list(
    "models",
    ["hubert-large", "wav2vec2-base", "wavlm-base", "whisper-base"],
    f"Some of {', '.join(MODELS)}.",
)
_WRITE = flags.DEFINE_bool("write", False, "Also measure the writing of records (TensorFlow).")
_CASES = flags.DEFINE_string("cases", "", "Only cases whose name contains this.")


class Case(NamedTuple):
    """Clips and how they are batched."""

    clips: list[np.ndarray]
    max_frames: int
    batching: Batching
    pad_to_30s: bool = False  # whether torch pads them to 30 s


Extract = Callable[[], list[np.ndarray]]
HEADER = ("encoder", "clips", "ours, s/s", "torch, s/s", "ratio", "of matmul peak", "difference")


def main(argv: list[str]) -> None:
    """Measures every case of every model and prints a table."""
    del argv
    gpu = jax.default_backend() == "gpu"
    dtype = "bfloat16" if gpu else "float32"
    peak = matmul_peak(not gpu)
    about = describe_machine() | {"dtype": dtype, "matmul TFLOP/s": round(peak / 1e12, 3)}
    about |= {"size": SIZE.value}
    print(", ".join(f"{key} {value}" for key, value in about.items()), flush=True)
    rows: list[dict[str, Any]] = []
    for name in _MODELS.value:
        rows += measure(name, _CASES.value, peak, SECONDS.value, SIZE.value == "tiny")
    print(markdown(HEADER, table(rows)))
    if _WRITE.value:
        print(f"The extractor without a model: {measure_writing(1024):.0f} s of audio a second.")
    if JSON.value:
        ratios = {f"{row['model']}, {row['clips']}": round(row["ratio"], 3) for row in rows}
        print(json.dumps({"ratio": ratios, **about}))


def measure(
    name: str, wanted: str, peak: float, seconds: float, tiny: bool = False
) -> list[dict[str, Any]]:
    """Measures both on a model's cases whose names contain ``wanted``, for ``seconds`` per case."""
    logging.set_verbosity(logging.WARNING)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(os.cpu_count())
    torch.compiler.reset()
    gpu = jax.default_backend() == "gpu"
    dtype = "bfloat16" if gpu else "float32"
    model, rows = make_model(name, tiny), []
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        encoder = model.encoder if model.config.model_type == "whisper" else model
        encoder = encoder.eval().to("cuda" if gpu else "cpu", getattr(torch, dtype))
        for title, case in make_cases(model.config.model_type == "whisper", gpu).items():
            if wanted not in title:
                continue
            extract = {"ours": make_ours(folder, case, dtype)}
            extract["torch"] = make_theirs(encoder, case, gpu)
            difference = compare(*(one() for one in extract.values()))
            times = by_turns(extract, seconds)
            ours, theirs = (min(times[who]) for who in ("ours", "torch"))
            audio = sum(map(len, case.clips)) / 16_000
            frames = [num_frames(len(clip)) for clip in case.clips]
            operations = sum(count_operations(model.config, count) for count in frames)
            rows.append(
                {
                    "model": name,
                    "clips": title,
                    "ours s/s": audio / ours,
                    "torch s/s": audio / theirs,
                    "ratio": theirs / ours,
                    "share of peak": operations / ours / peak,
                    "difference": difference,
                }
            )
            print(rows[-1], flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> list[list[str]]:
    """A row of `HEADER` for each case."""
    columns = "{}", "{}", "{:.2f}", "{:.2f}", "{:.2f}", "{:.0%}", "{:.0e}"
    return [cells(columns, row) for row in rows]


def make_model(name: str, tiny: bool) -> transformers.PreTrainedModel:
    """A torch model with random weights."""
    torch.manual_seed(0)
    family, changes = MODELS[name]
    if tiny:
        changes = changes | (TINY_WHISPER if family == "Whisper" else TINY)
    changes |= NO_DECODER if family == "Whisper" else {}
    sdpa = {} if family == "WavLM" else {"attn_implementation": "sdpa"}
    config = getattr(transformers, f"{family}Config")(**changes, **sdpa)
    return getattr(transformers, f"{family}Model")(config)


def make_cases(whisper: bool, gpu: bool) -> dict[str, Case]:
    """One clip, a batch of equal lengths, and mixed lengths as the extractor batches them."""
    rng = np.random.default_rng(0)

    def noise(lengths: Sequence[int]) -> list[np.ndarray]:
        return [rng.normal(0, 0.1, length).astype(np.float32) for length in lengths]

    standard = ACCELERATOR_BATCHING if gpu else CPU_BATCHING
    ten, batch = num_samples(499), 32 if gpu else 4
    equal, mixed = noise([ten] * batch), noise(rng.integers(16_000, 240_000, 512 if gpu else 12))
    padded = noise([num_samples(50 * seconds - 1) for seconds in (4, 7, 10, 14)] * (batch // 4))
    one = Case(equal[:1], 499, Batching(499, 1.0))
    many = Case(equal, 499, Batching(499 * batch, 1.0))
    extracted = Case(mixed, 749, standard)
    if whisper:
        short = Case(noise([32_000] * (512 if gpu else 16)), 100, standard)  # as in our EMO-DB
        cases = {"2 s, as the extractor runs them": short, "10 s, one clip": one}
        cases["1 to 15 s, as the extractor runs them"] = extracted
        in_30_s = {
            f"{name}; torch pads": case._replace(pad_to_30s=True) for name, case in cases.items()
        }
        return in_30_s if gpu else cases | in_30_s
    return {
        "10 s, one clip": one,
        f"10 s, a batch of {batch}": many,
        f"4, 7, 10, 14 s, a padded batch of {batch}": Case(
            padded, 699, Batching(699 * batch, np.inf)
        ),
        "1 to 15 s, as the extractor runs them": extracted,
    }


def make_ours(folder: str, case: Case, dtype: str) -> Extract:
    """The front-end as the extractor runs it, on one device."""
    device = jax.local_devices()[:1]
    frontend = Pretrained(folder, dtype=dtype, batching=case.batching, devices=tuple(device))

    def extract() -> list[np.ndarray]:
        features = dict(frontend(case.clips, case.max_frames))
        return [features[i] for i in range(len(case.clips))]

    return extract


def make_theirs(model: torch.nn.Module, case: Case, gpu: bool) -> Extract:
    """Torch on the same batches, padded to their longest clip, or on a GPU padded as ours are."""
    frames = [num_frames(len(clip)) for clip in case.clips]
    whisper = model.config.model_type == "whisper"
    forward = _whisper(model, case.pad_to_30s, gpu) if whisper else _masked(model, gpu)
    batching = case.batching if not whisper or case.pad_to_30s else Batching(1, 1.0)

    @torch.inference_mode()
    def extract() -> list[np.ndarray]:
        features = {}
        for batch in plan_batches(frames, case.max_frames, batching):
            clips = [case.clips[i] for i in batch.clips]
            size = (batch.size, num_samples(batch.frames + 1) - 1) if gpu else None
            hidden = forward(clips, size).half().cpu().numpy()
            features |= {i: hidden[row, : frames[i]] for row, i in enumerate(batch.clips)}
        return [features[i] for i in range(len(case.clips))]

    return extract


def _masked(model: torch.nn.Module, gpu: bool) -> Callable:
    """Maps clips to the last hidden state of HuBERT and similar models."""
    forward = torch.compile(model) if gpu else model

    def run(clips: Sequence[np.ndarray], size: tuple[int, int] | None) -> torch.Tensor:
        waveform, mask = pad(clips, size)
        mask = None if mask.all() else mask.to(model.device)
        waveform = waveform.to(model.device, model.dtype)
        return forward(waveform, attention_mask=mask).last_hidden_state

    return run


def _whisper(model: torch.nn.Module, pad_to_30s: bool, gpu: bool) -> Callable:
    """Maps clips, padded to 30 s or at their own length, to the last hidden state of Whisper."""
    extractor = transformers.WhisperFeatureExtractor(feature_size=model.config.num_mel_bins)
    forward = torch.compile(model) if gpu else model

    def run(clips: Sequence[np.ndarray], size: tuple[int, int] | None) -> torch.Tensor:
        del size  # 30 s is one shape
        made = extractor(
            list(clips), sampling_rate=16_000, padding="max_length" if pad_to_30s else False
        )
        mel = torch.from_numpy(np.stack(made["input_features"])).to(model.device, model.dtype)
        if pad_to_30s:
            return forward(mel).last_hidden_state
        hidden = torch.nn.functional.gelu(model.conv1(mel))
        hidden = torch.nn.functional.gelu(model.conv2(hidden)).permute(0, 2, 1)
        hidden = hidden + model.embed_positions.weight[: hidden.shape[1]]
        for layer in model.layers:
            hidden = layer(hidden, None)
        return model.layer_norm(hidden)

    return run


def pad(
    clips: Sequence[np.ndarray], size: tuple[int, int] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised waveforms and the mask of their samples, as the preprocessor makes them."""
    rows, samples = size or (len(clips), max(map(len, clips)))
    waveform, mask = torch.zeros(rows, samples), torch.ones(rows, samples, dtype=torch.long)
    for row, clip in enumerate(clips):
        clip = torch.from_numpy(clip)
        scale = (clip.var(correction=0) + 1e-7).sqrt()
        waveform[row, : len(clip)] = (clip - clip.mean()) / scale
        mask[row, len(clip) :] = 0
    return waveform, mask


def compare(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> float:
    """The largest |ours - theirs| / |theirs| over the clips."""
    return max(
        float(np.linalg.norm(a.astype("f4") - b) / np.linalg.norm(b.astype("f4")))
        for a, b in zip(ours, theirs, strict=True)
    )


def count_operations(config: transformers.PreTrainedConfig, frames: int) -> int:
    """Multiplications and additions of matrix products and convolutions for one clip."""
    width = config.hidden_size
    if config.model_type == "whisper":
        mel = 2 * frames * (201 * 2 * 400 + 201 * config.num_mel_bins)  # as plain products
        front = 2 * frames * 3 * config.num_mel_bins * width + frames * 3 * width**2
        layer = 4 * width**2 + 2 * width * config.encoder_ffn_dim + 2 * frames * width
        return 2 * (mel + front + frames * config.encoder_layers * layer)
    length, channels, operations = num_samples(frames), 1, 0
    for size, kernel, stride in zip(
        config.conv_dim, config.conv_kernel, config.conv_stride, strict=True
    ):
        length = (length - kernel) // stride + 1
        operations += 2 * length * kernel * channels * size
        channels = size
    positions = config.num_conv_pos_embeddings * width // config.num_conv_pos_embedding_groups
    layer = 4 * width**2 + 2 * width * config.intermediate_size + 2 * frames * width
    products = channels * width + positions * width + config.num_hidden_layers * layer
    return operations + 2 * frames * products


def measure_writing(width: int) -> float:
    """Seconds of audio that would be written per second if decoding and computing cost nothing."""
    from serkd_jax.data.prepare import extract_features
    from serkd_jax.data.sources import Clip

    frames, count = 326, 1024  # the paper's length for IEMOCAP
    features = np.random.default_rng(0).normal(size=(frames, width)).astype(np.float16)

    class Source:
        name, fingerprint, texts, class_names = "clips", "", ("id",), ()

        def __len__(self) -> int:
            return count

        def read(self, rows: range, max_samples: int) -> list[Clip]:
            return [Clip({"id": f"{row:06d}"}, np.zeros(num_samples(frames))) for row in rows]

    class Frontend:
        name, fingerprint, settings, num_devices = "none", "", {}, 1

        def __init__(self) -> None:
            self.width = width

        def __call__(self, waveforms: Sequence[np.ndarray], *_: object) -> object:
            return ((i, features) for i in range(len(waveforms)))

    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        extract_features(Source(), Frontend(), frames, Path(folder) / "out")
        return count * num_samples(frames) / 16_000 / (time.perf_counter() - start)


if __name__ == "__main__":
    app.run(main)

"""HuBERT here against `transformers.HubertModel` in torch: the same weights, clips and batches.

    pip install -e '.[test]' && python benchmarks/hubert.py

Both turn NumPy waveforms into NumPy float16 features, normalisation included, in one process and by
turns. On CPU, torch runs in float32 with scaled dot-product attention, on as many threads as there
are cores, and pads a batch to its longest clip. On a GPU both compute in bfloat16, torch is
compiled, and its batches have our few shapes. `--json` ends with one line of JSON, in which `ratio`
is our speed over torch's, case by case.
"""

import os

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch is on the same GPU

import json
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from absl import app, flags, logging

from serkd_jax.frontends import (
    ACCELERATOR_BATCHING,
    CPU_BATCHING,
    Batching,
    Hubert,
    plan_batches,
)
from serkd_jax.logmel import num_frames, num_samples

SIZES = {
    "tiny": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "conv_dim": (32,) * 7,
        "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 2,
        "feat_extract_norm": "layer",
    },
    "base": {},  # torch's group norm sees the padding: of mixed lengths it makes something else
    "large": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "feat_extract_norm": "layer",
        "conv_bias": True,
        "do_stable_layer_norm": True,
    },
}

_SIZE = flags.DEFINE_enum("size", "large", list(SIZES), "Of the model.")
_SECONDS = flags.DEFINE_float("seconds", 60, "A case is repeated so long, and at least 3 times.")
_WRITE = flags.DEFINE_bool("write", False, "Also measure the writing of records (TensorFlow).")
_CASES = flags.DEFINE_string("cases", "", "Only cases whose name has this.")
_JSON = flags.DEFINE_bool("json", False, "End with one line of JSON.")


class Case(NamedTuple):
    """Clips, and how they are batched."""

    clips: list[np.ndarray]
    max_frames: int
    batching: Batching


Extract = Callable[[], list[np.ndarray]]


def main(argv: list[str]) -> None:
    """Measures every case and prints a table."""
    del argv
    logging.set_verbosity(logging.WARNING)
    gpu = jax.default_backend() == "gpu"
    dtype = "bfloat16" if gpu else "float32"
    torch.set_num_threads(os.cpu_count())
    torch.manual_seed(0)
    config = transformers.HubertConfig(**SIZES[_SIZE.value], attn_implementation="sdpa")
    model = transformers.HubertModel(config).eval()
    peak = matmul_peak(dtype, 8192 if gpu else 2048)
    about = describe() | {"dtype": dtype, "matmul TFLOP/s": round(peak / 1e12, 3)}
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    print("| case | ours, s/s | torch, s/s | ratio | ours, of matmul peak | difference |")
    print("|---|---|---|---|---|---|")
    ratios = {}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        model = model.to("cuda" if gpu else "cpu", getattr(torch, dtype))
        forward = torch.compile(model) if gpu else model
        for name, case in make_cases(gpu).items():
            if _CASES.value not in name:
                continue
            ours = make_ours(folder, case, dtype)
            theirs = make_theirs(forward, case, model.device, model.dtype, few_shapes=gpu)
            difference = compare(ours(), theirs())
            time_ours, time_theirs = measure(ours, theirs)
            seconds = sum(map(len, case.clips)) / 16_000
            operations = sum(count_operations(config, num_frames(len(clip))) for clip in case.clips)
            ratios[name] = round(time_theirs / time_ours, 3)
            print(
                f"| {name} | {seconds / time_ours:.2f} | {seconds / time_theirs:.2f} | "
                f"{ratios[name]:.2f} | {operations / time_ours / peak:.0%} | {difference:.0e} |",
                flush=True,
            )
    if _WRITE.value:
        written, computed = measure_writing(config.hidden_size), seconds / time_ours
        ratios["writing over computing"] = round(written / computed, 3)
        print(f"The extractor without a model: {written:.0f} s of audio a second.")
    if _JSON.value:
        print(json.dumps({"ratio": ratios, **about}))


def make_cases(gpu: bool) -> dict[str, Case]:
    """One clip, a batch of equal ones, and mixed lengths as the extractor batches them."""
    rng = np.random.default_rng(0)

    def noise(lengths: Sequence[int]) -> list[np.ndarray]:
        return [rng.normal(0, 0.1, length).astype(np.float32) for length in lengths]

    standard = ACCELERATOR_BATCHING if gpu else CPU_BATCHING
    ten, batch = num_samples(499), 32 if gpu else 4
    equal, mixed = noise([ten] * batch), noise(rng.integers(16_000, 240_000, 512 if gpu else 12))
    padded = noise([num_samples(50 * seconds - 1) for seconds in (4, 7, 10, 14)] * (batch // 4))
    return {
        "10 s, one clip": Case(equal[:1], 499, Batching(499, 1.0)),
        f"10 s, a batch of {batch}": Case(equal, 499, Batching(499 * batch, 1.0)),
        f"4, 7, 10, 14 s, a padded batch of {batch}": Case(
            padded, 699, Batching(699 * batch, np.inf)
        ),
        "1 to 15 s, as the extractor runs them": Case(mixed, 749, standard),
    }


def make_ours(folder: str, case: Case, dtype: str) -> Extract:
    """The front-end as the extractor runs it, on one device."""
    device = jax.local_devices()[:1]
    frontend = Hubert(folder, dtype=dtype, batching=case.batching, devices=tuple(device))

    def extract() -> list[np.ndarray]:
        features = dict(frontend(case.clips, case.max_frames))
        return [features[i] for i in range(len(case.clips))]

    return extract


def make_theirs(
    forward: Callable, case: Case, device: torch.device, dtype: torch.dtype, few_shapes: bool
) -> Extract:
    """Torch on the same batches, padded to their longest clip, or for `few_shapes` as ours are."""
    frames = [num_frames(len(clip)) for clip in case.clips]

    @torch.inference_mode()
    def extract() -> list[np.ndarray]:
        features = {}
        for batch in plan_batches(frames, case.max_frames, case.batching):
            clips = [case.clips[i] for i in batch.clips]
            size = (batch.size, num_samples(batch.frames + 1) - 1) if few_shapes else None
            waveform, mask = pad(clips, size)
            mask = None if mask.all() else mask.to(device)
            output = forward(waveform.to(device, dtype), attention_mask=mask)
            hidden = output.last_hidden_state.half().cpu().numpy()
            features |= {i: hidden[row, : frames[i]] for row, i in enumerate(batch.clips)}
        return [features[i] for i in range(len(case.clips))]

    return extract


def pad(
    clips: Sequence[np.ndarray], size: tuple[int, int] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised waveforms and the mask of their samples, as HuBERT's preprocessor makes them."""
    rows, samples = size or (len(clips), max(map(len, clips)))
    waveform, mask = torch.zeros(rows, samples), torch.ones(rows, samples, dtype=torch.long)
    for row, clip in enumerate(clips):
        clip = torch.from_numpy(clip)
        scale = (clip.var(correction=0) + 1e-7).sqrt()
        waveform[row, : len(clip)] = (clip - clip.mean()) / scale
        mask[row, len(clip) :] = 0
    return waveform, mask


def measure(ours: Extract, theirs: Extract) -> tuple[float, float]:
    """Seconds of each at its fastest; by turns, and both have run before."""
    times: tuple[list[float], list[float]] = ([], [])
    while len(times[1]) < 3 or sum(map(sum, times)) < _SECONDS.value:
        for extract, taken in zip((ours, theirs), times, strict=True):
            start = time.perf_counter()
            extract()
            taken.append(time.perf_counter() - start)
    return min(times[0]), min(times[1])


def compare(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> float:
    """The largest over the clips of |ours - theirs| / |theirs|."""
    return max(
        float(np.linalg.norm(a.astype("f4") - b) / np.linalg.norm(b.astype("f4")))
        for a, b in zip(ours, theirs, strict=True)
    )


def count_operations(config: transformers.HubertConfig, frames: int) -> int:
    """Multiplications and additions of matrix products and convolutions for one clip."""
    length, channels, operations = num_samples(frames), 1, 0
    for width, kernel, stride in zip(
        config.conv_dim, config.conv_kernel, config.conv_stride, strict=True
    ):
        length = (length - kernel) // stride + 1
        operations += 2 * length * kernel * channels * width
        channels = width
    width = config.hidden_size
    positions = config.num_conv_pos_embeddings * width // config.num_conv_pos_embedding_groups
    layer = 4 * width**2 + 2 * width * config.intermediate_size + 2 * frames * width
    products = channels * width + positions * width + config.num_hidden_layers * layer
    return operations + 2 * frames * products


def matmul_peak(dtype: str, size: int) -> float:
    """Operations a second of the best of twenty products of square matrices."""
    x = jnp.ones((size, size), dtype)
    product = jax.jit(lambda x: x @ x)
    product(x).block_until_ready()
    times = []
    for _ in range(20):
        start = time.perf_counter()
        product(x).block_until_ready()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


def measure_writing(width: int) -> float:
    """Seconds of audio a second that are written if decoding and computing cost nothing."""
    from pathlib import Path

    from serkd_jax.data.features import extract_features
    from serkd_jax.data.records import tfds
    from serkd_jax.data.sources import Clip

    frames, count = 326, 1024  # the longest of IEMOCAP
    features = np.random.default_rng(0).normal(size=(frames, width)).astype(np.float16)

    class Source:
        name, fingerprint, schema = "clips", "", {"id": tfds.features.Text()}

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


def describe() -> dict[str, object]:
    """Machine and versions."""
    packages = ("jax", "torch", "transformers")
    return {
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "size": _SIZE.value,
        "python": platform.python_version(),
        **{package: metadata.version(package) for package in packages},
    }


if __name__ == "__main__":
    app.run(main)

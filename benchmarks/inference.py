"""Cost of an exported student on a CPU, by format: time, speed, file size and memory.

    pip install -e '.[test]' && python -m benchmarks.inference --model=DIR

DIR is an exported log-mel student; without it, a student of the recipe `configs/emodb.py:logmel` is
exported here with random weights. It is compared with the student of the paper (326 frames of 1024
features, random weights) in every format and in torch, with scaled dot-product attention and the
same weights; and with the `audio-classification` pipeline of transformers with a base-size HuBERT.
Every row has its own process on `--cores` cores, which imports only what it needs. The rows take
turns, and the fastest pass of each counts, so that other load on the machine affects all alike.
`--json` ends with one line of JSON, in which `ratio` is torch's time over ours.
"""

import argparse
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from serkd_jax.audio.logmel import fingerprint, num_samples
from serkd_jax.audio.spectral import SPECTRAL
from serkd_jax.audio.waveform import SAMPLE_RATE
from serkd_jax.deploy.backends import load_classifier, load_frontend
from serkd_jax.deploy.folder import (
    FILES,
    FRONTEND,
    VERSION,
    ModelConfig,
    parse_config,
    read_config,
)


class Cost(NamedTuple):
    """Cost of one row, for each recording or window."""

    front_end: float  # seconds
    model: float
    memory: int  # bytes, the peak of the process


def main() -> None:
    """Measures all rows and prints a table."""
    options = parse_options()
    with tempfile.TemporaryDirectory() as work:
        logmel = options.model
        if not logmel:
            logmel = export_random(Path(work, "logmel"), logmel_config(), options.formats)
        paper = export_random(Path(work, "paper"), paper_config(options.size), options.formats)
        hubert = write_hubert(Path(work, "hubert"), options.size)
        rows = {
            (kind, form, batch): (run, folder, form, batch)
            for kind, folder, forms, batches, run in (
                ("log-mel student", logmel, options.formats, (1, 16), student_cost),
                ("paper's student", paper, [*options.formats, "torch"], (1, 4), student_cost),
                ("HuBERT pipeline", hubert, ["torch"], (1, 4), pipeline_cost),
            )
            for form in forms
            for batch in batches
        }
        # Before the processes start, as their libraries count the cores when they are imported.
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
        passes: dict[tuple, list[Cost]] = {row: [] for row in rows}
        for _ in range(options.rounds):
            for row, (run, *arguments) in rows.items():
                cost = in_process(run, *arguments, options.seconds)
                passes[row].append(cost)
        costs = {row: Cost(*map(min, zip(*tried, strict=True))) for row, tried in passes.items()}
        sizes = {row: size_of(*rows[row][1:3]) for row in rows}
        table = make_table(costs, sizes, num_samples(read_config(logmel).max_frames) / SAMPLE_RATE)
    print(f"{options.cores} of {os.cpu_count()} cores; float32 where the format does not say other")
    print_table(table)
    if options.json:
        print(json.dumps({"cores": options.cores, "rows": table}))


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="exported log-mel student with all formats")
    parser.add_argument("--cores", type=int, default=1, help="how many a process may use")
    parser.add_argument("--seconds", type=float, default=3, help="for each pass; at least 2 calls")
    parser.add_argument("--rounds", type=int, default=3, help="number of passes for each row")
    parser.add_argument("--formats", nargs="+", default=[*FILES], choices=FILES, help="to measure")
    parser.add_argument("--size", default="paper", choices=["paper", "tiny"], help="except for DIR")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    return parser.parse_args()


def in_process(run: Callable, *arguments: object) -> Cost:
    """Calls ``run`` in a new process, with the number of cores as its last argument."""
    with ProcessPoolExecutor(1, get_context("spawn")) as processes:
        return processes.submit(run, *arguments, len(os.sched_getaffinity(0))).result()


def student_cost(folder: Path, form: str, batch: int, seconds: float, cores: int) -> Cost:
    """Cost of an exported student; one whose encoder is not in the folder gets ready features."""
    config, rng = read_config(folder), np.random.default_rng(0)
    front_end = 0.0
    if config.frontend["name"] in SPECTRAL or (folder / FRONTEND).is_dir():
        waveforms = list(rng.normal(0, 0.1, (batch, num_samples(config.max_frames))))
        waveforms = [waveform.astype(np.float32) for waveform in waveforms]
        featurize = load_frontend(folder, config)
        front_end = fastest(lambda: featurize(waveforms), seconds / 4) / batch
        inputs = featurize(waveforms)
    else:
        shape = (batch, config.max_frames, config.num_features)
        features = rng.normal(0, 1, shape).astype(np.float32)
        inputs = features, np.full(batch, config.max_frames, np.int32)
    if form == "torch":
        classify = load_torch(folder, config, cores)
    else:
        classify = load_classifier(folder, config, form, cores)
    return Cost(front_end, fastest(lambda: classify(*inputs), seconds) / batch, peak_memory())


def load_torch(folder: Path, config: ModelConfig, cores: int) -> Callable:
    """The same student in torch; the test of this benchmark compares it with Flax."""
    import torch
    from ml_collections import ConfigDict
    from safetensors.torch import load_file

    from benchmarks.torch_steps import Student, standardize

    torch.set_num_threads(cores)
    sizes = ConfigDict(dict(config.student) | {"dropout": 0.0, "projection_dims": []})
    shape = config.max_frames, config.num_features
    model = Student(sizes, shape, len(config.labels), None).eval()
    stored, tensors = load_file(folder / FILES["safetensors"]), {}
    statistics = stored.pop("statistics.mean"), stored.pop("statistics.spread")
    for name, value in stored.items():
        name = name.replace("layers_", "layers.").replace(".attention.", ".")
        name = re.sub(r"classifier_(\d)", lambda i: f"classifier.{2 * int(i[1])}", name)  # ReLUs
        value = value.T.contiguous() if name.endswith("kernel") else value
        tensors[name.replace(".kernel", ".weight").replace(".scale", ".weight")] = value
    for layer in range(config.student["num_layers"]):
        for kind in ("weight", "bias"):
            parts = [tensors.pop(f"layers.{layer}.{part}_proj.{kind}") for part in "qkv"]
            tensors[f"layers.{layer}.qkv.{kind}"] = torch.cat(parts)
    model.load_state_dict(tensors)

    @torch.inference_mode()
    def classify(features: np.ndarray, num_frames: np.ndarray) -> np.ndarray:
        batch = {"inputs": torch.from_numpy(features), "length": torch.from_numpy(num_frames)}
        return model(standardize(batch, statistics)).logits.numpy()

    return classify


def pipeline_cost(folder: Path, form: str, batch: int, seconds: float, cores: int) -> Cost:
    """Cost of transformers' pipeline on recordings of two seconds, including its front-end."""
    del form
    import torch
    from transformers import pipeline

    torch.set_num_threads(cores)
    classify = pipeline("audio-classification", model=str(folder), device="cpu")
    rng = np.random.default_rng(0)
    clips = [rng.normal(0, 0.1, 2 * SAMPLE_RATE).astype(np.float32) for _ in range(batch)]
    cost = fastest(lambda: list(classify(clips, batch_size=batch)), seconds) / batch
    return Cost(0.0, cost, peak_memory())


def fastest(call: Callable[[], object], seconds: float) -> float:
    """The shortest call within ``seconds``, of at least two, after one that is not timed."""
    call()
    times = []
    while len(times) < 2 or sum(times) < seconds:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def peak_memory() -> int:
    """Peak memory in bytes; the value from getrusage would start at the parent's peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def size_of(folder: Path, form: str) -> int:
    """Size on disk in bytes."""
    return (folder / FILES.get(form, FILES["safetensors"])).stat().st_size


def logmel_config() -> ModelConfig:
    """The configuration of a student of the recipe for EMO-DB."""
    from configs import emodb

    recipe = emodb.get_config("logmel")
    mels = recipe.frontend.num_mels
    frontend = {"name": "logmel", "num_mels": mels, "fingerprint": fingerprint(mels)}
    return model_config(recipe.student, recipe.max_frames, mels, 7, frontend)


def paper_config(size: str) -> ModelConfig:
    """The configuration of the paper's student on IEMOCAP."""
    from configs import common

    recipe, width = common.paper("iemocap"), 1024
    if size == "tiny":
        width, recipe.max_frames = 8, 16
        recipe.student.update({"width": 16, "mlp_dim": 16, "num_heads": 2, "num_layers": 1})
    frontend = {"name": "hubert", "model": "facebook/hubert-large-ll60k", "revision": None}
    frontend |= {"layer": -1, "dtype": "float32", "pad_to_30s": False, "fingerprint": ""}
    return model_config(recipe.student, recipe.max_frames, width, 4, frontend)


def model_config(
    student: Mapping[str, Any], frames: int, width: int, classes: int, frontend: dict
) -> ModelConfig:
    """A configuration as an export writes it."""
    from serkd_jax.deploy.trained import deployed_student

    sizes = deployed_student(student)
    return parse_config(
        {
            "format": VERSION,
            "labels": [f"class {i}" for i in range(classes)],
            "sample_rate": SAMPLE_RATE,
            "max_frames": frames,
            "num_features": width,
            "student": sizes | {"classifier_dims": list(sizes["classifier_dims"])},
            "frontend": frontend,
        }
    )


def export_random(folder: Path, config: ModelConfig, formats: Sequence[str]) -> Path:
    """Exports a student with random weights and statistics."""
    import jax
    import jax.numpy as jnp

    from serkd_jax.deploy.backends import Variables, make_student
    from serkd_jax.deploy.formats import write_format
    from serkd_jax.stages.standardization import Statistics

    folder.mkdir()
    (folder / "config.json").write_text(config.to_json())
    features = jnp.zeros((1, config.max_frames, config.num_features))
    init = jax.jit(make_student(config).init)
    params = jax.device_get(init(jax.random.key(0), features, jnp.ones(1, int))["params"])
    rng, width = np.random.default_rng(0), config.num_features
    mean, spread = rng.normal(0, 1, width), rng.uniform(0.5, 2, width)
    statistics = Statistics(mean.astype(np.float32), spread.astype(np.float32))
    for form in {"safetensors", *formats}:  # safetensors is needed by torch
        write_format(form, folder, config, Variables(params, statistics, {}))
    return folder


def write_hubert(folder: Path, size: str) -> Path:
    """Writes a HuBERT with a classifier and random weights, as transformers saves it."""
    from transformers import HubertConfig, HubertForSequenceClassification, Wav2Vec2FeatureExtractor

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    small |= {"conv_dim": (8,) * 7, "intermediate_size": 16, "num_conv_pos_embeddings": 4}
    small |= {"num_conv_pos_embedding_groups": 2}
    config = HubertConfig(num_labels=4, **(small if size == "tiny" else {}))
    HubertForSequenceClassification(config).save_pretrained(folder)
    Wav2Vec2FeatureExtractor().save_pretrained(folder)
    return folder


def make_table(
    costs: dict[tuple, Cost], sizes: dict[tuple, int], seconds: float
) -> list[dict[str, Any]]:
    """A row for each cost; ``seconds`` is the length of the log-mel student's recordings."""
    spans = {"log-mel student": seconds, "paper's student": 6.525, "HuBERT pipeline": 2.0}
    table = []
    for (kind, form, batch), cost in costs.items():
        peer = costs.get((kind, "torch", batch)) if form != "torch" else None
        table.append(
            {
                "kind": kind,
                "format": form,
                "batch": batch,
                "front_end_ms": 1e3 * cost.front_end,
                "model_ms": 1e3 * cost.model,
                "times_real_time": spans[kind] / (cost.front_end + cost.model),
                "ratio": peer.model / cost.model if peer else None,
                "file_mb": sizes[kind, form, batch] / 1e6,
                "memory_mb": cost.memory / 1e6,
            }
        )
    return table


def print_table(table: list[dict[str, Any]]) -> None:
    """Prints the table; the paper's student is timed without HuBERT, which costs more than it."""
    heads = "of,format,batch,front-end ms,model ms,times real time,torch / this,file MB,memory MB"
    print(f"| {heads.replace(',', ' | ')} |\n{'|---' * 9}|")
    for row in table:
        ratio = f"{row['ratio']:.2f}" if row["ratio"] else ""
        print(
            f"| {row['kind']} | {row['format']} | {row['batch']} | {row['front_end_ms']:.2f} "
            f"| {row['model_ms']:.3g} | {row['times_real_time']:.3g} | {ratio} "
            f"| {row['file_mb']:.2f} | {row['memory_mb']:.0f} |"
        )


if __name__ == "__main__":
    main()

"""Eight virtual CPU devices, set before JAX starts, and what several test files share."""

import functools
import os
import tempfile

import quick_xla

os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 {quick_xla.FLAGS}"
)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is fetched at run time
# One cache for the whole test run: its workers and the programs that they start share it.
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.path.join(
    tempfile.gettempdir(), f"serkd-jax-{os.environ.get('PYTEST_XDIST_TESTRUNUID', os.getpid())}"
)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import numpy as np
import pytest

from layouts import make_iemocap, make_meld, write_wav

# The files that take longest come first, so that no worker is left alone with one of them.
LONGEST = ("test_processes", "test_resume", "test_benchmarks", "test_recipes", "test_every_encoder")
LONGEST += (
    "test_student_kinds",
    "test_features",
    "test_export",
    "test_stages",
    "test_experiment",
    "test_frontends",
)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else 99)


@pytest.fixture(scope="session")
def iemocap(tmp_path_factory):
    """All five sessions; in each, two dialogs of two speakers who say every label once."""
    return make_iemocap(tmp_path_factory.mktemp("iemocap"))


@pytest.fixture(scope="session")
def meld(tmp_path_factory):
    """A dialogue of all emotions in each part, and all the flaws of the real release."""
    return make_meld(tmp_path_factory.mktemp("meld"), dialogues=1)


@pytest.fixture
def emodb(tmp_path):
    """Seven emotions, with the litter that macOS and people leave."""
    names = ("03a01Wa", "03a01Lb", "08b02Ea", "08a05Ab", "16b10Fa", "16b10Tc", "16b10Na")
    for seed, name in enumerate(names):
        write_wav(tmp_path / "emodb" / "wav" / f"{name}.wav", seed)
    (tmp_path / "emodb" / "wav" / "._03a01Wa.wav").write_bytes(b"litter")
    (tmp_path / "emodb" / "wav" / "readme.txt").write_text("hello")
    return tmp_path / "emodb"


@pytest.fixture
def three_wavs(tmp_path):
    for seed, name in enumerate("abc"):
        write_wav(tmp_path / "data" / f"{name}.wav", seed)
    return tmp_path / "data"


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory):
    """Kind -> the folder of a small random encoder in Hugging Face's own format."""
    torch = pytest.importorskip("torch")
    import tiny_encoders

    sizes = {
        "hidden_size": 16,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "conv_dim": (8,) * 7,
        "num_conv_pos_embeddings": 4,
        "num_conv_pos_embedding_groups": 2,
    }

    @functools.cache
    def make(kind: str) -> str:
        variant, changes = f"{kind} large", sizes
        if kind == "whisper":
            variant, changes = "whisper 80", {"d_model": 16}
        config = tiny_encoders.tiny_config(variant, **changes)
        folder = tmp_path_factory.mktemp(kind)
        cls = tiny_encoders.model_class(config)
        torch.manual_seed(0)
        tiny_encoders.save(cls(config), folder)
        return str(folder)

    return make


@pytest.fixture(scope="session")
def hubert_folder(encoder_folder):
    """Of a small random HuBERT."""
    return encoder_folder("hubert")


@pytest.fixture(scope="session")
def hubert_oracle(hubert_folder):
    """Torch's features of a clip from that model: (waveform, layer) -> (frames, 16) float32."""
    torch = pytest.importorskip("torch")
    from transformers import HubertModel

    model = HubertModel.from_pretrained(hubert_folder).eval()

    def features(waveform, layer=-1):
        normalised = (waveform - waveform.mean()) / np.sqrt(waveform.var() + 1e-7)
        with torch.no_grad():
            output = model(torch.tensor(normalised)[None], output_hidden_states=True)
        hidden = output.last_hidden_state if layer == -1 else output.hidden_states[layer]
        return hidden[0].numpy()

    return features

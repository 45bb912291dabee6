"""Small corpora in the layouts, and with the flaws, of the real releases."""

import csv
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile

from serkd_jax.data.corpora import Manifest

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "corpora"
needs_corpora = pytest.mark.skipif(
    not (SHARED / "emobox").is_dir(), reason="no ../shared/corpora beside the repository"
)

# One tone (Hz) for each class, so that a model can learn something.
IEMOCAP_TONES = {
    "neu": 200,
    "hap": 400,
    "exc": 400,
    "sad": 800,
    "ang": 1600,
    "fru": 300,
    "xxx": 500,
}
MELD_TONES = {
    "anger": 200,
    "disgust": 300,
    "fear": 400,
    "joy": 600,
    "neutral": 800,
    "sadness": 1100,
    "surprise": 1600,
}
MELD_FOLDERS = {
    "train": "train_splits",
    "dev": "dev_splits_complete",
    "test": "output_repeated_splits_test",
}
MELD_HEADER = "Sr No.,Utterance,Speaker,Emotion,Sentiment,Dialogue_ID,Utterance_ID,Season,Episode"
MELD_HEADER += ",StartTime,EndTime"


def tone(hertz, seed=0, seconds=0.3, rate=16_000):
    time = np.arange(int(seconds * rate)) / rate
    noise = np.random.default_rng(seed).normal(0, 0.01, len(time))
    return (0.3 * np.sin(2 * np.pi * hertz * time) + noise).astype(np.float32)


def peak_hz(waveform):
    return np.abs(np.fft.rfft(waveform)).argmax() * 16_000 / len(waveform)


def write_wav(path, seed=0, num_samples=2000):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.random.default_rng(seed).normal(0, 0.1, num_samples), 16_000)
    return path


def manifest_of(tmp_path, text, name="m.csv", **settings):
    """A manifest of that text, of the files below `data`."""
    (tmp_path / name).write_text(text)
    return Manifest(str(tmp_path / name), data_dir=str(tmp_path / "data"), **settings)


def make_split(folder):
    """A manifest of 48 tones of three classes, a third of them for testing."""
    with (folder / "corpus.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "label", "speaker", "split"])
        for i in range(48):
            soundfile.write(folder / f"{i}.wav", tone(200 * 2 ** (i % 3), i), 16_000)
            label, split = ("calm", "glad", "sad")[i % 3], "test" if i < 16 else "train"
            rows.writerow([f"{i}.wav", label, f"s{i % 4}", split])
    return folder / "corpus.csv"


def make_iemocap(root, sessions=range(1, 6)):
    """Writes IEMOCAP_full_release: in each of two dialogs of a session, both say every label."""
    release = root / "IEMOCAP_full_release"
    for session in sessions:
        folder = release / f"Session{session}"
        for dialog in (f"Ses0{session}F_impro01", f"Ses0{session}M_script02_1b"):
            lines = ["% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]", ""]
            wavs = folder / "sentences" / "wav" / dialog
            wavs.mkdir(parents=True)
            for sex in "FM":
                for number, (emotion, hertz) in enumerate(IEMOCAP_TONES.items()):
                    turn = f"{dialog}_{sex}{number:03d}"
                    lines += [
                        f"[{number + 6.2901:.4f} - {number + 8.2357:.4f}]\t{turn}\t{emotion}\t"
                        "[2.5000, 3.0000, 3.5000]",
                        "C-E2:\tNeutral;\t()",
                        "C-F1:\tNeutral; Frustration;\t(curious [sic])",
                        "A-E3:\tval 3; act 2; dom  2;\t()",
                        "",
                    ]
                    soundfile.write(wavs / f"{turn}.wav", tone(hertz, number), 16_000)
            annotations = folder / "dialog" / "EmoEvaluation"
            (annotations / "Categorical").mkdir(parents=True, exist_ok=True)
            (annotations / "Categorical" / f"{dialog}_e2_cat.txt").write_text(f"{turn} :Neutral;\n")
            (annotations / f"{dialog}.txt").write_text("\n".join(lines))
            (annotations / f"._{dialog}.txt").write_bytes(b"\x00\x05\x16\x07 [1.0 - 2.0]\tlitter")
            (wavs / f"._{turn}.wav").write_bytes(b"\x00\x05\x16\x07")
    return release


def encode_aac(container, track, audio):
    """Fills the track with the audio, the same in every channel."""
    for start in range(0, len(audio), 1024):
        samples = np.tile(audio[start : start + 1024], (track.layout.nb_channels, 1))
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout=track.layout.name)
        frame.sample_rate, frame.pts = track.rate, start
        container.mux(track.encode(frame))
    container.mux(track.encode(None))


def write_mp4(path, audio, rate=16_000, *, channels=2, options=None):
    """A video of grey frames with an AAC track of the audio; of no track if audio is None."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options=options or {}) as container:
        video = container.add_stream("mpeg4", rate=25)
        video.width = video.height = 16
        video.pix_fmt = "yuv420p"
        layout = {1: "mono", 2: "stereo", 3: "3.0", 6: "5.1"}[channels]
        if audio is not None:
            track = container.add_stream("aac", rate=rate, layout=layout)
        for _ in range(8):
            grey = av.VideoFrame.from_ndarray(np.full((16, 16, 3), 128, np.uint8), format="rgb24")
            container.mux(video.encode(grey))
        container.mux(video.encode(None))
        if audio is not None:
            encode_aac(container, track, audio)
    return path


def write_meld_csv(path, rows):
    """Rows of (dialogue, utterance, speaker, emotion, text), with the real columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        file.write(MELD_HEADER + "\r\n")
        for number, (dialogue, utterance, speaker, emotion, text) in enumerate(rows, start=1):
            values = [number, text, speaker, emotion, "neutral", dialogue, utterance, 4, 7]
            csv.writer(file).writerow([*values, "00:20:57,256", "00:21:00,049"])


def make_meld(root, dialogues=3):
    """Writes MELD.Raw: in each part `dialogues` with an utterance of every emotion, and all flaws.

    train dia125_utt3 cannot be decoded, dev dia110_utt7 is missing, and the test folder also has
    recordings that are no utterances.
    """
    release = root / "MELD.Raw"
    folders = {part: release / part / name for part, name in MELD_FOLDERS.items()}
    for part, folder in folders.items():
        rows = [
            (dialogue, utterance, ("Ross", "Phoebe")[utterance % 2], emotion, "Oh, it’s “lost” it!")
            for dialogue in range(dialogues)
            for utterance, emotion in enumerate(MELD_TONES)
        ]
        for dialogue, utterance, _, emotion, _ in rows:
            audio = tone(MELD_TONES[emotion], dialogue)
            write_mp4(folder / f"dia{dialogue}_utt{utterance}.mp4", audio)
        rows += {
            "train": [(125, 3, "Ross", "neutral", "Oh, no-no-no, see, that-that clock’s fast.")],
            "dev": [(110, 7, "Phoebe", "neutral", "Did they tell you anything?")],
        }.get(part, [])
        beside = folder.parent if part == "train" else release  # as the archives unpack
        write_meld_csv(beside / f"{part}_sent_emo.csv", rows)
        (folder / "._dia0_utt0.mp4").write_bytes(b"\x00\x05\x16\x07")
    whole = (folders["train"] / "dia0_utt0.mp4").read_bytes()
    (folders["train"] / "dia125_utt3.mp4").write_bytes(whole[: len(whole) // 2])
    (folders["test"] / "final_videos_testdia0_utt0.mp4").write_bytes(whole)
    (folders["test"] / "final_videos_testdia1_utt1.mp4").write_bytes(whole)
    return release

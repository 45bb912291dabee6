"""Manifests of EMO-DB and nEMO together, with the classes that both have.

    python -m benchmarks.joined --emodb=EMODB --nemo=NEMO/manifest.csv --out=joined

`joined/all.csv` has the columns path, label, speaker, session (the corpus) and split: the speakers
of `--held_out` are the test part. `joined/train.csv` is all.csv without them, so that
`serkd_jax.pretrain` does not hear them either. With `--config.protocol.split_by=session` a model
is trained on one corpus and tested on the other; with `split`, on both.
"""

import argparse
import csv
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from serkd_jax.data.corpora.base import Utterance
from serkd_jax.data.corpora.emodb import EmoDB
from serkd_jax.data.corpora.manifest import Manifest
from serkd_jax.errors import UserError

COLUMNS = ("path", "label", "speaker", "session", "split")
HELD_OUT = ("emodb-11", "emodb-14", "nemo-KS0", "nemo-WR0")


def main() -> None:
    """Writes the manifests and says what is in them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--emodb", required=True, help="the folder that holds wav")
    parser.add_argument("--nemo", required=True, help="nEMO's manifest")
    parser.add_argument("--out", type=Path, required=True, help="the folder to make")
    parser.add_argument("--held_out", nargs="*", default=HELD_OUT, help="speakers to test on")
    options = parser.parse_args()
    try:
        corpora = {"emodb": EmoDB(options.emodb), "nemo": Manifest(options.nemo)}
        utterances = {name: corpus.list_utterances() for name, corpus in corpora.items()}
        rows = join(utterances, options.held_out)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    write(options.out / "all.csv", rows)
    write(options.out / "train.csv", [row for row in rows if row["split"] == "train"])
    for (corpus, split), n in sorted(Counter((r["session"], r["split"]) for r in rows).items()):
        print(f"{corpus}, {split}: {n} utterances")
    print(f"classes: {', '.join(sorted({row['label'] for row in rows}))}")


def join(corpora: dict[str, Sequence[Utterance]], held_out: Sequence[str]) -> list[dict[str, str]]:
    """The rows of `all.csv`.

    Args:
        corpora: the utterances of each corpus, by its name.
        held_out: speakers of the test part, as CORPUS-SPEAKER.

    Raises:
        UserError: the corpora have fewer than two classes in common, or a speaker is unknown.
    """
    common = set.intersection(*({each.label for each in found} for found in corpora.values()))
    if len(common) < 2:
        raise UserError(f"{' and '.join(corpora)} have {len(common)} classes in common, not two")
    rows = [
        {
            "path": str(Path(each.path).resolve()),
            "label": each.label,
            "speaker": f"{corpus}-{each.speaker}",
            "session": corpus,
            "split": "test" if f"{corpus}-{each.speaker}" in held_out else "train",
        }
        for corpus, found in corpora.items()
        for each in found
        if each.label in common
    ]
    if unknown := set(held_out) - {row["speaker"] for row in rows}:
        known = ", ".join(sorted({row["speaker"] for row in rows}))
        raise UserError(f"held_out has {', '.join(sorted(unknown))}, but the speakers are {known}")
    return rows


def write(path: Path, rows: Sequence[dict[str, str]]) -> None:
    """Writes a manifest."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        table.writerows(rows)


if __name__ == "__main__":
    main()

"""What a run leaves, to compare it with another run."""

import json
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp


def final_arrays(workdir: Path) -> dict[str, np.ndarray]:
    """Every array of every stage's last checkpoint, its losses, and the test predictions."""
    arrays = {}
    for folder in sorted(workdir.glob("fold_*/*/checkpoints")):
        name = str(folder.parent.relative_to(workdir))
        with ocp.CheckpointManager(folder.absolute()) as checkpoints:
            items = ocp.args.Composite(state=ocp.args.StandardRestore())
            state = checkpoints.restore(checkpoints.latest_step(), args=items).state
        for path, leaf in jax.tree_util.tree_leaves_with_path(state):
            arrays[name + jax.tree_util.keystr(path)] = np.asarray(leaf)
        rows = [json.loads(line) for line in (folder.parent / "metrics.jsonl").open()]
        losses = [[row["train/loss"], row["validation/loss"]] for row in rows]
        arrays[f"{name}/losses"] = np.array(losses)
    for path in workdir.glob("fold_*/predictions.npz"):
        with np.load(path) as saved:
            arrays |= {f"{path.parent.name}/{name}": saved[name] for name in saved.files}
    return arrays

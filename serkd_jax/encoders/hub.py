"""Models on the Hugging Face hub."""

from collections.abc import Sequence
from pathlib import Path

from serkd_jax.errors import UserError


def download(name: str, revision: str | None, patterns: Sequence[str], remedy: str) -> Path:
    """The folder of those files of a model that are on the hub, downloaded unless they are there.

    Args:
        name: of the model, such as facebook/hubert-large-ll60k.
        revision: branch, tag or commit; None means the main branch.
        patterns: of the files' names.
        remedy: for the error.

    Raises:
        UserError: the model is not there, is gated, the network is not there, ...
    """
    try:
        import huggingface_hub

        return Path(
            huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=[*patterns])
        )
    except Exception as error:  # of the hub, the network, a proxy ... each has its own
        at = f" at revision {revision!r}" if revision else ""
        raise UserError(
            f"{name!r} is neither a local folder nor a model{at} that could be fetched from the "
            f"Hugging Face hub. Check the spelling; {remedy}. The hub's answer: {error}"
        ) from error

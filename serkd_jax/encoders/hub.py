"""Downloads models from the Hugging Face hub."""

from collections.abc import Sequence
from pathlib import Path

from serkd_jax.errors import UserError


def download(name: str, revision: str | None, patterns: Sequence[str], remedy: str) -> Path:
    """Downloads a model's files that match patterns, unless they are cached, to a folder.

    Args:
        name: the model's name, such as facebook/hubert-large-ll60k.
        revision: branch, tag or commit; None means the main branch.
        patterns: patterns of file names.
        remedy: what the user can do, for the error message.

    Returns:
        The folder; patterns that no file matches are ignored.

    Raises:
        UserError: the model does not exist or is gated, there is no network, ...
    """
    try:
        import huggingface_hub

        return Path(
            huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=[*patterns])
        )
    except Exception as error:  # the hub, the network, a proxy ... each has its own exceptions
        at = f" at revision {revision!r}" if revision else ""
        raise UserError(
            f"{name!r} is neither a local folder nor a model{at} that could be fetched from the "
            f"Hugging Face hub. Check the spelling; {remedy}. The hub's answer: {error}"
        ) from error

"""Errors that the user can act on, and mistakes on the command line."""

import re
import sys
import traceback
from collections.abc import Sequence

LONGEST = 1000  # characters of a message


class UserError(ValueError):
    """Bad input or configuration; the message names the file or key and the remedy.

    `serkd_jax.main` prints it without a stack trace. It is one line that a terminal can show,
    whatever the names and values in it are.
    """

    def __init__(self, message: str):
        line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in readable(message))
        super().__init__(line if len(line) <= LONGEST else f"{line[:600]} ... {line[-300:]}")


def readable(text: str) -> str:
    """Returns text that can be written: bytes of a file name that are not UTF-8 become U+FFFD."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Parses flags for `absl.app.run`; a mistake ends the program with a message of one line.

    Args:
        argv: the command line.

    Returns:
        The words of the command line that are not flags.
    """
    from absl import flags

    try:
        words = flags.FLAGS(argv)
        if "config" in flags.FLAGS:
            _ = flags.FLAGS.config.to_dict  # only this opens the recipe, which may not exist
        return words
    except (flags.Error, OSError) as error:
        *_, told = (line.strip() for line in str(error).splitlines() if line.strip())
        told = told.removeprefix("ValueError: ")
    except Exception as error:
        told = _mistake(error, [word for word in argv if word.startswith("--config")])
    print(f"error: {UserError(told)}", file=sys.stderr)
    sys.exit(1)


def _mistake(error: Exception, words: Sequence[str]) -> str:
    """Says what is wrong with a key on the command line, or where in a recipe something is."""
    if isinstance(error, AttributeError):  # a key that the recipe does not have
        key, *meant = re.findall(r"\w*\w", str(error).replace("\\n", " "))
        if wrong := [word.split("=")[0] for word in words if f".{key}" in word]:
            told = f"{' '.join(wrong)}: the recipe has no such key"
            return (
                f"{told}. Did you mean {meant[meant.index('mean') + 1]}?"
                if "mean" in meant
                else told
            )
    installed = (sys.prefix, sys.base_prefix, __file__, "<")
    places = [
        f"{place.filename}, line {place.lineno}"
        for place in traceback.extract_tb(error.__traceback__)
        if not place.filename.startswith(installed)
    ]
    where = places[-1] if places else " ".join(words)
    return f"{where}: {type(error).__name__}: {error}"

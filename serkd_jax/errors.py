"""Errors that the user can act on, and mistakes on the command line."""

import contextlib
import errno
import re
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence

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


def some_of(names: Iterable[object], most: int = 10) -> str:
    """Returns names joined by commas: the beginnings of the first ones, and how many follow."""
    names = [str(name) for name in names]
    shown = [name if len(name) <= 60 else f"{name[:57]}..." for name in names[:most]]
    return ", ".join(shown) + (f" and {len(names) - most:,} more" if len(names) > most else "")


def differences(
    theirs: Mapping[str, object], mine: Mapping[str, object], keys: Iterable[str]
) -> list[str]:
    """Says of each key whose values differ what it was and what it is."""
    return [
        f"{key}: {theirs.get(key)} -> {mine.get(key)}"
        for key in keys
        if theirs.get(key) != mine.get(key)
    ]


def of_the_machine(error: BaseException | None) -> str:
    """Says in one line what is wrong with a disk, a folder or a file, and the remedy; or nothing.

    Args:
        error: any error; those that led to it are looked at as well, since libraries hide them.
    """
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    found = [one for one in chain if isinstance(one, OSError) and one.errno]
    text = " ".join(map(str, chain))
    place = next((str(one.filename) for one in found if one.filename), "")
    # TensorStore and TensorFlow say it in words, and call it RESOURCE_EXHAUSTED.
    full = any(one.errno in (errno.ENOSPC, errno.EDQUOT) for one in found)
    if full or "No space left on device" in text or "Disk quota exceeded" in text:
        written = re.search(r'"(/[^"]+)"', text)
        place = place or (written[1] if written else "the workdir, the cache or temporary files")
        return f"no space left on the disk that has {place}: free some, and start again to resume"
    if not found or not place:
        return ""
    remedy = {
        errno.EROFS: "it cannot be written to; use another folder",
        errno.EACCES: "give yourself the permission, or use another folder",
        errno.EPERM: "give yourself the permission, or use another folder",
        errno.ENOTDIR: "a part of the path is a file; use another folder",
        errno.EEXIST: "use another folder, or remove it",
        errno.ENAMETOOLONG: "use a shorter name",
    }.get(found[0].errno, "check the disk and the path, and start again to resume")
    return f"{place}: {found[0].strerror}: {remedy}"


@contextlib.contextmanager
def told_in_one_line() -> Iterator[None]:
    """Ends a command at an error that the user can correct, with a line that says so, or Ctrl-C."""
    try:
        yield
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if told := of_the_machine(error):
            sys.exit(f"error: {told}")
        raise


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

"""The error that a user can mend."""


class UserError(ValueError):
    """Bad input or configuration; the message names the file or key and the remedy.

    ``serkd_jax.main`` prints it without a stack trace.
    """

"""The errors a person can cause. Each is one line that says what was given, what was wanted, and the way out."""


def printable(text: object) -> str:
    """Text with a question mark for every character that could move a cursor, hide, or turn what follows around."""
    return "".join(character if character.isprintable() else "?" for character in str(text))


class DpdistillError(Exception):
    """Base of every error that the command line prints as one line, with exit code 2. Its text is printable, whatever a file said."""

    def __init__(self, message: str) -> None:
        super().__init__("\n".join(map(printable, message.split("\n"))))


class InputError(DpdistillError):
    """A file or folder cannot be used as it is.

    Args:
      path: the offending file, as the user named it.
      reason: what is wrong with it, without any value taken from a record.
      hint: the way out.
    """

    def __init__(self, path: object, reason: str, hint: str) -> None:
        self.path, self.reason, self.hint = str(path), reason, hint
        super().__init__(f"{printable(path)}: {reason} ({hint})")


class MisfitError(InputError):
    """Images are too large or too small for the models, or not all of one size and colour: scaled and made one colour they would do."""


class ConfigError(DpdistillError):
    """A setting is unknown, out of range, or does not fit another."""


class BudgetError(DpdistillError):
    """The ledger cannot afford a release. Nothing was charged."""


class LedgerError(DpdistillError):
    """A ledger is damaged, locked by another process, or belongs to other data."""


class ReleaseError(DpdistillError):
    """A release folder does not verify, or cannot be read."""


class StorageError(DpdistillError):
    """The disk is full, or fails. What was charged and released is kept, and the same command goes on from there.

    Args:
      error: what the system said.
    """

    def __init__(self, error: OSError) -> None:
        why = f"{error.filename or 'input or output'}: {error.strerror or error}"
        super().__init__(f"{why}; nothing is lost: once the disk takes it, the same command goes on from here")


class RecordwiseError(DpdistillError):
    """A function handed to the door mixes records, so its sensitivity is unknown. Nothing was read."""


class RanksError(DpdistillError):
    """The processes of one run lost one another, or came to different numbers. Nothing was released."""


class TeacherError(DpdistillError):
    """A teacher does not behave as one: other shapes than promised, or answers that are no numbers."""

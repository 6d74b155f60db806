"""Typed errors. Each knows the exit code that the command line answers with.

Messages name the thing, what was found, what was expected, and the next command to type.
"""

import signal

_FOR_ALL = (signal.SIGHUP, signal.SIGINT, signal.SIGPIPE, signal.SIGTERM, signal.SIGUSR2)
STOPPING = frozenset(128 + number for number in _FOR_ALL)
"""Exit codes of a process that was told to stop, as its sweep was with it. Any other signal (KILL for want of memory,
SEGV) is that process's own misfortune: it has failed."""


class DinoExpError(Exception):
    """Base of every error that is the user's, the disk's or the experiment's, never our own bug."""

    exit_code = 1


def of_os(error: OSError) -> DinoExpError:
    """An error of the operating system in one line: the file, and what was wrong."""
    return DinoExpError(f"{error.filename or 'a file operation'}: {error.strerror or error}")


class UsageError(DinoExpError):
    """A command was called wrongly: an unknown run, checkpoint or argument."""

    exit_code = 2


class ConfigError(DinoExpError):
    """A setting is unknown, of the wrong type, out of range, or impossible beside another."""

    exit_code = 2


class CompositionError(ConfigError):
    """Hydra can make no configuration of some overrides, such as of a choice that is not there."""


class RefusedError(DinoExpError):
    """The command is understood and refused, because carrying it out would break a promise."""

    exit_code = 3


class LockedError(RefusedError):
    """Another process owns the run directory."""


class CheckpointError(DinoExpError):
    """A checkpoint could not be written, or was used wrongly."""


class ManifestTooLargeError(CheckpointError):
    """A checkpoint takes more words to describe than a reader would take in. Nothing was committed."""


class SaveFailedError(CheckpointError):
    """The disk did not take a checkpoint: it is full, gives errors, or gave back other bytes.

    Nothing was committed at `step`, and earlier checkpoints are untouched, so that training may go on without it.
    """

    def __init__(self, step: int, problem: str) -> None:
        super().__init__(f"the checkpoint of step {step} was not saved: {problem}")
        self.step, self.problem = step, problem


class NoCheckpointError(DinoExpError):
    """No checkpoint can be loaded, or more steps would be lost than the settings allow."""

    exit_code = 4


class NothingSavedError(NoCheckpointError):
    """A run has no checkpoint at all."""

    def __init__(self, directory: object) -> None:
        super().__init__(f"{directory}: no checkpoint is there: nothing has been saved yet")
        self.directory = str(directory)


class CorruptCheckpointError(DinoExpError):
    """Bytes on disk are not the bytes that were written."""

    exit_code = 4


class DataError(DinoExpError):
    """An image could not be loaded, or a process that loads images has died."""


class BackupError(DinoExpError):
    """The place of a backup did not answer, refused, or gave back other bytes than it was given."""


class TrainingError(DinoExpError):
    """Training cannot go on: a non-finite loss or a collapsed model."""

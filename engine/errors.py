"""Errors meant for the user: what is wrong, where, what was expected, what to do.

Our own invariants use ``assert``. A launcher prints one of these without a traceback and exits 2.
"""

from __future__ import annotations

EXIT_YOURS, EXIT_LOST_RANK, EXIT_REPLACED = 2, 3, 4
"""Exit codes: an error to mend before trying again; a cluster's fault, to be tried again; a later launch goes on."""


class StillhouseError(Exception):
    """Base of every error that the user can act on."""

    exit_code = EXIT_YOURS


class ConfigError(StillhouseError):
    """The run YAML, the DeepSpeed JSON, the command line or the models named there do not fit together."""


class DataError(StillhouseError):
    """A shard, an index, a manifest or an input file is missing, damaged, unsafe or of another kind."""


class MissingError(DataError):
    """A file that is named is not there."""


class StoreError(DataError):
    """A server does not answer, refuses, or gives another file than before: no record is left out for it."""


class CacheError(StillhouseError):
    """A cache of teacher targets is missing, damaged or made for something else."""


class CheckpointError(StillhouseError):
    """A checkpoint or a run folder cannot be written, is incomplete, or belongs to another run."""


class TrainingError(StillhouseError):
    """Training itself went wrong: a loss that is not finite, a rank that disagrees."""


class LostRankError(StillhouseError):
    """Another rank or its host is gone, hangs or never came. The same command again resumes the run."""

    def __init__(self, text: str, exit_code: int = EXIT_LOST_RANK) -> None:
        super().__init__(text)
        self.exit_code = exit_code


class ReplacedError(StillhouseError):
    """A later launch has taken over this run's folder."""

    exit_code = EXIT_REPLACED

"""Errors meant for the user: what is wrong, where, what was expected, what to do.

Our own invariants use ``assert``. A launcher prints one of these without a traceback and exits 2.
"""

from __future__ import annotations


class StillhouseError(Exception):
    """Base of every error that the user can act on."""


class ConfigError(StillhouseError):
    """The run YAML, the DeepSpeed JSON, the command line or the models named there do not fit together."""


class DataError(StillhouseError):
    """A shard, an index, a manifest or an input file is missing, damaged, unsafe or of another kind."""


class MissingError(DataError):
    """A file that is named is not there."""


class CacheError(StillhouseError):
    """A cache of teacher targets is missing, damaged or made for something else."""


class CheckpointError(StillhouseError):
    """A checkpoint or a run folder cannot be written, is incomplete, or belongs to another run."""


class TrainingError(StillhouseError):
    """Training itself went wrong: a loss that is not finite, a rank that disagrees."""

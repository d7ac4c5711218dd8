"""Errors meant for people, each with the exit code (sysexits) that a door ends with."""


class VlmError(Exception):
    """Base of every refusal: says what was given, what was expected and what to do."""

    exit_code = 1


class DataError(VlmError):
    """The data cannot be used: too many bad samples, or no supervised token."""

    exit_code = 65


class PeerError(VlmError):
    """A process that the run depends on died or hangs; worth a few retries."""

    exit_code = 70


class StorageError(VlmError):
    """A checkpoint or record file could not be read or written."""

    exit_code = 74


class Interrupted(VlmError):
    """The run was asked to stop and saved its state; the same command continues it."""

    exit_code = 75


class ConfigError(VlmError):
    """The config is wrong, or asks for more than this machine has."""

    exit_code = 78

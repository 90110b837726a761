"""What can be wrong with an experiment."""

from pg_siamese.client.connection import CommandError


class ExperimentError(CommandError):
    """An experiment can't be run as it is written: the message says what is wrong."""

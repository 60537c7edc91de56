"""Logging to the console, where text from outside cannot forge a log line of its own."""

import logging
import sys

from registry.core.names import one_line


class OneLine(logging.Formatter):
    """Escapes control characters in messages. Tracebacks keep their lines: Python writes them."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        """The text of ``record`` without its traceback, on one line."""
        return one_line(super().formatMessage(record))


def log_to_stderr(pattern: str = "%(message)s") -> None:
    """Write the messages of every logger, from INFO up, to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(OneLine(pattern))
    logging.basicConfig(level=logging.INFO, handlers=[handler])

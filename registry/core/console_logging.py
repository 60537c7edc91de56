"""Log lines for people, of which nobody else's text can make two."""

import logging
import sys

from registry.core.names import one_line


class OneLine(logging.Formatter):
    """Escapes control characters in messages; tracebacks, which are ours, keep their lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        return one_line(super().formatMessage(record))


def log_to_stderr(pattern: str = "%(message)s") -> None:
    """Have every logger from INFO on write to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(OneLine(pattern))
    logging.basicConfig(level=logging.INFO, handlers=[handler])

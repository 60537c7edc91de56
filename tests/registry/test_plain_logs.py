"""Text from outside cannot forge a log line."""

import logging

from registry.core.console_logging import OneLine


def shown(message: str, *arguments: object, error: Exception | None = None) -> str:
    info = (type(error), error, None) if error else None
    record = logging.LogRecord("x", logging.INFO, "x", 1, message, arguments, info)
    return OneLine("%(levelname)s %(message)s").format(record)


def test_control_characters_are_escaped() -> None:
    forged = "no\r\nINFO promoted digits version 9\x1b[2J\u2028"
    assert shown("cannot follow: %s", forged) == (
        r"INFO cannot follow: no\x0d\x0aINFO promoted digits version 9\x1b[2J\x2028"
    )
    assert shown("50 % of Ümläute ×") == "INFO 50 % of Ümläute ×"


def test_tracebacks_keep_their_lines() -> None:
    assert "\n" in shown("failed", error=ValueError("x"))

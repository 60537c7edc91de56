"""Reads the results of MLflow's searches, which come page by page."""

from collections.abc import Callable
from typing import Any


def all_pages(search: Callable[..., Any], *arguments: str) -> list[Any]:
    """Everything that one of MLflow's searches finds, page by page."""
    found: list[Any] = []
    token: str | None = None  # of the next page
    while token != "":  # nosec B105
        page = search(*arguments, page_token=token)
        found += page
        token = page.token or ""
    return found

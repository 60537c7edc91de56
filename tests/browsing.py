"""A check that every page of the project must pass in a real Chromium."""

from typing import Any


def assert_readable(page: Any) -> None:
    """Fail if the page scrolls sideways, or if axe-core finds an accessibility violation."""
    assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]
    try:
        from axe_playwright_python.sync_playwright import Axe
    except ImportError:  # the extra `dev` is not installed
        return
    found = Axe().run(page)
    assert found.violations_count == 0, f"{page.url}: {found.generate_report()}"

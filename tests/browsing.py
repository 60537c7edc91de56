"""Pages in a real Chromium: what every page of the project must be."""

from typing import Any


def assert_readable(page: Any) -> None:
    """Fail where the page scrolls sideways, or where axe-core finds a fault in it."""
    assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]
    try:
        from axe_playwright_python.sync_playwright import Axe
    except ImportError:  # an environment without the extra `dev`
        return
    found = Axe().run(page)
    assert found.violations_count == 0, f"{page.url}: {found.generate_report()}"

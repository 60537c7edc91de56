"""The version of Convoy that runs."""

import importlib.metadata


def convoy_version() -> str:
    """The number of the installed version; images have Convoy's files, and no installed package."""
    try:
        return importlib.metadata.version("convoy")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed as a package)"

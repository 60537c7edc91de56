"""Print the requirements of pyproject.toml, with some of its extras, for the images to install.

Images copy Convoy's own code in a later step, so that a change of the code does not download all
packages again. Images copy the client's code, too, so the client's requirements replace its name.
"""

import re
import sys
import tomllib
from pathlib import Path
from typing import Any

CLIENT = "convoy-client"


def requirements(extras: list[str]) -> list[str]:
    """The requirements of the project and of ``extras``, including extras that these name.

    Raises:
        KeyError: there is no such extra.
    """
    project = project_in(Path())
    found = {*project["dependencies"]}
    for extra in extras:
        for each in project["optional-dependencies"][extra]:
            own = re.fullmatch(rf"{project['name']}\[(.*)\]", each)
            if own:
                found |= {*requirements(own[1].split(","))}
            elif each.startswith(f"{CLIENT}=="):
                found |= {*project_in(Path("clients/python"))["dependencies"]}
            else:
                found.add(each)
    return sorted(found)


def project_in(folder: Path) -> dict[str, Any]:
    """The table ``project`` of the folder's pyproject.toml."""
    found: dict[str, Any] = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    return found


if __name__ == "__main__":
    print("\n".join(requirements(sys.argv[1:])))

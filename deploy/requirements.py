"""Print the requirements of pyproject.toml, with some of its extras, for the images to install.

Images copy Convoy's own code in a later step, so that a change of the code does not download all
packages again.
"""

import re
import sys
import tomllib
from pathlib import Path


def requirements(extras: list[str]) -> list[str]:
    """The requirements of the project and of ``extras``, including extras that these name.

    Raises:
        KeyError: there is no such extra.
    """
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    found = {*project["dependencies"]}
    for extra in extras:
        for each in project["optional-dependencies"][extra]:
            own = re.fullmatch(rf"{project['name']}\[(.*)\]", each)
            found |= {*requirements(own[1].split(","))} if own else {each}
    return sorted(found)


if __name__ == "__main__":
    print("\n".join(requirements(sys.argv[1:])))

"""Print what pyproject.toml asks for, with some of its extras: images install these, not Convoy.

Its own code is copied after them, so that a change of it does not fetch everything again.
"""

import re
import sys
import tomllib
from pathlib import Path


def requirements(extras: list[str]) -> list[str]:
    """The requirements of the project and of ``extras``, those that name extras of its own opened.

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

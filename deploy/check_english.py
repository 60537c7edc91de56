"""Finds phrases that readers stumble over: ``python deploy/check_english.py``.

The list is fixed and short. A phrase is on it because a named actor and an active verb say the same
thing more clearly. The list finds only some problems; reviewers must find the others.
"""

import re
import subprocess
import sys
from pathlib import Path

FILES = ("*.py", "*.md", "*.html", "*.js", "*.sh", "*.yml", "*.yaml", "*.toml", "Makefile")
THIS = Path(__file__)
# The start of a sentence: after a full stop, an opening quotation or comment mark, or a list mark.
START = r"(?:^|[.!?:]\s+|\"\"\"|# |// |- |\| |<p>|<li>)\s*"
NO_NOUN = (
    r"(?<![Tt]here )\b(?:is|are|was|were) no "
    r"(?!longer|more\b|less\b|later\b|other\b|reply|one\b|way\b)(?!\d)\w+"
)
PHRASES = {
    r"\b[Ww]hoever\b": "name the actor: a client, a worker, an operator",
    r"\b[Ww]hom\b": "name the actor, and use an active verb",
    r"\b[Nn]obody\b": "say who does not: no client, no worker",
    NO_NOUN: "write 'is not a …'",
    START + r"Who\b(?![^.!]*\?)": "begin with the actor",
    START + r"Of an? \b": "begin with the actor",
    r"def test_(?:who|whom|whoever|of_a)_": "name the actor in the test's name",
}


def main() -> int:
    """Print each hit with its place; the exit status is 1 if there is one."""
    listed = subprocess.run(
        ["git", "ls-files", *FILES], capture_output=True, text=True, check=True
    ).stdout.split()
    hits = [hit for name in listed if Path(name).name != THIS.name for hit in check(Path(name))]
    print("\n".join(hits) or "no phrase of the list was found")
    return 1 if hits else 0


def check(path: Path) -> list[str]:
    """A line for each phrase of the list in the file."""
    return [
        f"{path}:{number}: {found[0].strip()!r}: {advice}"
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        for pattern, advice in PHRASES.items()
        if (found := re.search(pattern, line))
    ]


if __name__ == "__main__":
    sys.exit(main())

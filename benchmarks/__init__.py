"""The commands that measured the figures in the docs. Each prints a table; ``--json`` writes it."""

"""The commands behind the figures in the docs: each prints a table, ``--json`` keeps it too."""

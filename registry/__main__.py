"""Runs the command line of ``python -m registry``."""

import sys

from registry.cli.main import main

if __name__ == "__main__":
    sys.exit(main())

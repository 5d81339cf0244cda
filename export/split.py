"""Script that runs ee-split from a checkout. Everything else is in cli.py."""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    # A script's own folder comes first on the path, so that verify.py, cli.py and the rest would be imported
    # as top-level modules.
    sys.path[:] = [place for place in sys.path if place != os.path.dirname(os.path.abspath(__file__))]
    try:
        from offramp.export.cli import main
    except ModuleNotFoundError as missing:
        sys.stderr.write(f"{missing}: run pip install -e '.[export,cpu]' first\n")
        sys.exit(2)
    main(prog_name="export/split.py")

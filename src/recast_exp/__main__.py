"""``python -m recast_exp``."""

import contextlib
import sys
from pathlib import Path

# Python looks for modules in the current folder first, and Hydra for plug-ins: in a folder of data, anybody's files
with contextlib.suppress(OSError):  # a folder that was removed
    if not sys.flags.safe_path and sys.path[:1] == [str(Path.cwd())] != [str(Path(__file__).parents[1])]:
        del sys.path[0]

from recast_exp.cli.main import main

if __name__ == "__main__":
    main()

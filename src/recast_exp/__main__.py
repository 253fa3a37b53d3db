"""``python -m recast_exp``."""

from recast_exp.cli import main

if __name__ == "__main__":
    main()

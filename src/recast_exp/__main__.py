"""``python -m recast_exp``."""

from recast_exp.cli.main import main

if __name__ == "__main__":
    main()

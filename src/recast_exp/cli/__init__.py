"""The command line: what was typed, checked as a whole, then run."""

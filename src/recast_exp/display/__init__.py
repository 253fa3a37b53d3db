"""The display of a run: tables in the terminal, progress, and plots."""

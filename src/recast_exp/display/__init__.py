"""What a person sees of a run: tables in the terminal, progress, and plots."""

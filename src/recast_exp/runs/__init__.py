"""The folders of runs and sweeps: what is written there, read again, and continued. Nothing heavy is imported."""

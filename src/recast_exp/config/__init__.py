"""The configuration: its schema, its grammar, and how Hydra composes it. Nothing heavy is imported."""

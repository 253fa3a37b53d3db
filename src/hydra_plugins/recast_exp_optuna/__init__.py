"""Hydra finds its plugins here, by the name of the package above: `hydra_plugins`, which many distributions share."""

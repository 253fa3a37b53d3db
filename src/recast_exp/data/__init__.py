"""Datasets: their form, their sources, and the way of their images to a model.

A dataset is a module with two functions, `check` and `read`, and a preset in `conf/dataset/` (`registry.py`). It
returns the set as it was published (`types.py`, `layout.py`). One protocol chooses the images of a task from any of
them (`protocol.py`). The images are decoded once (`store.py`) and augmented on the device (`transforms.py`,
`loader.py`, `datamodule.py`). Nothing heavy is imported here.
"""

from recast_exp.data.registry import check_dataset, load_dataset, names, read_official

__all__ = ["check_dataset", "load_dataset", "names", "read_official"]

"""`logger=none`: the same as `logger=csv`."""

from __future__ import annotations

from recast_exp.tracking.trackers.csv import check, start

__all__ = ["check", "start"]

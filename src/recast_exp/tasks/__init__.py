"""Many tasks on one frozen backbone, in Python: `RecastModel`, task files saved and merged, predictions."""

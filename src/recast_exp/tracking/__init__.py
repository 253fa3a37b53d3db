"""Trackers of a run (Weights & Biases, TensorBoard, those of other packages), behind one interface."""

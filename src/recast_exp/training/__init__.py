"""Training: the LightningModule, its optimiser and the loop."""

"""From a backbone to a model for one task, and the file that holds the task."""

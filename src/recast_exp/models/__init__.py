"""From a backbone to a model for one task, the file that holds the task, and the cache of banks."""

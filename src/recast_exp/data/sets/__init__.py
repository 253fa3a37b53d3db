"""One module for each dataset, named as the option of the config group `dataset`."""

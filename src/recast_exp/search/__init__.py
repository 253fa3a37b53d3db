"""Hyperparameter search with Optuna: what is searched, the study and its storage, the trials, the results."""

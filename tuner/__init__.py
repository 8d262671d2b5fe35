"""Hyperparameter tuning of a protein-solubility network, with a sealed test split."""

__version__ = "0.1.0"

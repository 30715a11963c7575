"""Batch normalisation: statistics, running averages, normalisation."""

from .api import BatchNorm, Update, batch_norm, update

__all__ = ["BatchNorm", "Update", "batch_norm", "update"]

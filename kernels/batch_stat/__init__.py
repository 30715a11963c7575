"""Batch normalisation: statistics, running averages, normalisation."""

from .normalization import BatchNorm, batch_norm
from .running_average import Update, update

__all__ = ["BatchNorm", "Update", "batch_norm", "update"]

"""Batch normalisation: statistics, running averages, normalisation."""

from kernels.batch_stat.api import BatchNorm, Update, batch_norm, update

__all__ = ["BatchNorm", "Update", "batch_norm", "update"]

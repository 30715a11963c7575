"""Batch normalisation: statistics, running averages, normalisation."""

from kernels.batch_stat.normalization import BatchNorm, batch_norm
from kernels.batch_stat.running_average import Update, update

__all__ = ["BatchNorm", "Update", "batch_norm", "update"]

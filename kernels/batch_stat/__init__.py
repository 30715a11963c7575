"""Batch normalisation: statistics, running averages, normalisation."""

from kernels.batch_stat.running_average import Update, update

__all__ = ["Update", "update"]

"""What a user sees of a run: throughput, diagnostics of the products, plots."""

from fnl_hf.reports.callbacks import ProductNormsCallback
from fnl_hf.reports.plots import plot_report

__all__ = ["ProductNormsCallback", "plot_report"]

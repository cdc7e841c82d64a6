"""What users see of a run: throughput, diagnostics of the products, plots."""

from typing import Any

from fnl_hf.reports.callbacks import ProductNormsCallback

__all__ = ["ProductNormsCallback", "plot_report", "plot_runs"]


def __getattr__(name: str) -> Any:
    # Only drawing needs matplotlib, training does not.
    if name == "plot_report":
        from fnl_hf.reports.plots import plot_report

        return plot_report
    if name == "plot_runs":
        from fnl_hf.reports.comparison import plot_runs

        return plot_runs
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

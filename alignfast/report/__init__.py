"""One HTML page of a run: figures, plots and samples, readable in light and dark, with no request to anywhere."""

from alignfast.report.run import write_report

__all__ = ["write_report"]

"""The report of continual-learning runs: one self-contained page, and its figures."""

from clipweld.trainer.report.write import write_report

__all__ = ["write_report"]

"""report.html: what a run did and what its student kept of the teacher, in one file that asks nothing of a network."""

from engine.report.page import REPORT, write_report
from engine.report.results import RESULTS, ModelResult, Prediction, Results, Role, Word
from engine.report.table import results_table

__all__ = ["REPORT", "RESULTS", "ModelResult", "Prediction", "Results", "Role", "Word", "results_table", "write_report"]

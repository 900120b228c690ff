"""What a comparison found: a page to read and to pass on, or the table alone."""

from torchcrest.report.explain import explain, export, story, suspect_sheet
from torchcrest.report.page import report
from torchcrest.report.table import table

__all__ = ["explain", "export", "report", "story", "suspect_sheet", "table"]

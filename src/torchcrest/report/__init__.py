"""What a comparison found: a page to read and to pass on, or the table alone."""

from torchcrest.report.page import report
from torchcrest.report.table import table

__all__ = ["report", "table"]

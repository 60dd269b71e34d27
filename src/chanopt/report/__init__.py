"""What was done, and why: the report, as text, JSON and HTML."""

from chanopt.report.report import LayerReport, Report, SegmentReport

__all__ = ["LayerReport", "Report", "SegmentReport"]

"""A job from document to report: open, select, design, plan, execute, verify. What the command line and Python call."""

from reshard_service.conversion.prepare import Prepared, open_source, prepare_target
from reshard_service.conversion.run import JobReport, TargetReport, convert

__all__ = ["JobReport", "Prepared", "TargetReport", "convert", "open_source", "prepare_target"]

"""Checks training data: every record read once, problems named, lengths drawn, labels shown."""

from eve_vlm.data.check.data_sets import DataSet, Numbered, Streamed
from eve_vlm.data.check.plan import Plan, plan_epoch
from eve_vlm.data.check.problems import KINDS, Kind, Problem
from eve_vlm.data.check.run import CheckResult, check_data_sets
from eve_vlm.data.check.view import Segment, printed, view_of

__all__ = [
    "KINDS",
    "CheckResult",
    "DataSet",
    "Kind",
    "Numbered",
    "Plan",
    "Problem",
    "Segment",
    "Streamed",
    "check_data_sets",
    "plan_epoch",
    "printed",
    "view_of",
]

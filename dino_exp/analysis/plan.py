"""How much of a run a report reads."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ReportPlan:
    """Of the weights of checkpoints. What lies between those that are chosen is left out, which the report tells."""

    most_checkpoints: int = 48
    most_bytes: int = 4 << 30

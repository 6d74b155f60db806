"""When to save and what to keep: pure functions, no torch, no files, no clock."""

from dino_exp.checkpoint.policies.keep import (
    BestN,
    EveryNEpochs,
    KeepAny,
    KeepRule,
    LatestN,
    Milestones,
    Pinned,
    ThinMilestones,
    plan_retention,
)
from dino_exp.checkpoint.policies.kinds import (
    derive_kinds,
    rank_best,
    retention_from_json,
    retention_to_json,
)
from dino_exp.checkpoint.policies.milestones import Milestone, milestone_from_text, milestone_steps
from dino_exp.checkpoint.policies.save import (
    AnyOf,
    AtEnd,
    AtMilestones,
    BeforeDeadline,
    EveryEpochs,
    EveryMinutes,
    EverySteps,
    OnImprovement,
    OnSignal,
    SavePolicy,
    may_skip,
)

__all__ = [
    "AnyOf",
    "AtEnd",
    "AtMilestones",
    "BeforeDeadline",
    "BestN",
    "EveryEpochs",
    "EveryMinutes",
    "EveryNEpochs",
    "EverySteps",
    "KeepAny",
    "KeepRule",
    "LatestN",
    "Milestone",
    "Milestones",
    "OnImprovement",
    "OnSignal",
    "Pinned",
    "SavePolicy",
    "ThinMilestones",
    "derive_kinds",
    "may_skip",
    "milestone_from_text",
    "milestone_steps",
    "plan_retention",
    "rank_best",
    "retention_from_json",
    "retention_to_json",
]

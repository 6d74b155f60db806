"""Retention policies as plain JSON, and the kinds of a checkpoint that follow from them.

Each manifest records the policy and the schedule in force, so that a reader derives what is best or a
milestone without any configuration; the newest manifest's policy counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dino_exp.checkpoint.policies.keep import (
    BestN,
    EveryNEpochs,
    KeepAny,
    KeepRule,
    LatestN,
    Milestones,
    Pinned,
    ThinMilestones,
)
from dino_exp.checkpoint.policies.milestones import milestone_from_text
from dino_exp.checkpoint.policies.save import EMERGENCY, SIGNAL
from dino_exp.checkpoint.types import JSON, CheckpointInfo, Schedule
from dino_exp.errors import ConfigError

MAX_RULES = 100
_KINDS = ("latest", "best", "milestone", "pinned", "emergency")


def retention_to_json(policy: KeepAny) -> list[JSON]:
    """Plain JSON that `retention_from_json` reads back, one object for each rule."""
    return [_rule_to_json(rule) for rule in policy.rules]


def _rule_to_json(rule: KeepRule) -> JSON:
    match rule:
        case LatestN():
            return {"rule": "latest", "num": rule.num}
        case BestN():
            return {"rule": "best", "metric": rule.metric, "mode": rule.mode, "num": rule.num}
        case Milestones():
            return {"rule": "milestones", "at": [milestone.text for milestone in rule.milestones]}
        case EveryNEpochs():
            return {"rule": "every_epochs", "num": rule.num_epochs}
        case Pinned():
            return {"rule": "pinned"}
        case ThinMilestones():
            return {"rule": "thin_milestones", "parts": list(rule.parts)}
        case _:
            raise TypeError(f"{type(rule).__name__} has no JSON form: add it to policies/kinds.py")


_READERS: dict[str, Callable[[JSON], KeepRule]] = {
    "latest": lambda given: LatestN(_whole(given["num"])),
    "best": lambda given: BestN(_text(given["metric"]), _text(given["mode"]), _whole(given["num"])),
    "milestones": lambda given: Milestones(tuple(milestone_from_text(_text(text)) for text in given["at"])),
    "every_epochs": lambda given: EveryNEpochs(_whole(given["num"])),
    "pinned": lambda given: Pinned(),
    "thin_milestones": lambda given: ThinMilestones(tuple(_text(part) for part in given["parts"])),
}


def retention_from_json(given: JSON) -> KeepAny:
    """The inverse of `retention_to_json`. Raises ConfigError for anything else."""
    if not isinstance(given, list) or len(given) > MAX_RULES:
        raise ConfigError(f"a retention policy is a list of at most {MAX_RULES} rules")
    try:
        return KeepAny(tuple(_READERS[rule["rule"]](rule) for rule in given))
    except (KeyError, TypeError) as problem:
        raise ConfigError(f"a retention rule is not one of {', '.join(_READERS)}: {problem}") from problem


def _whole(value: JSON) -> int:
    if type(value) is not int:
        raise TypeError("expected a whole number")
    return value


def _text(value: JSON) -> str:
    if not isinstance(value, str) or len(value) > 200:
        raise TypeError("expected a short text")
    return value


def rank_best(policy: KeepAny, infos: Sequence[CheckpointInfo]) -> list[CheckpointInfo]:
    """Checkpoints by the policy's first named metric, best first; none when it ranks by none."""
    for rule in policy.rules:
        if isinstance(rule, BestN):
            return rule.rank(infos)
    return []


def derive_kinds(policy: KeepAny, infos: Sequence[CheckpointInfo], schedule: Schedule) -> dict[int, tuple[str, ...]]:
    """The kinds of each step, out of latest, best, milestone, pinned and emergency, in that order.

    `best` is the one that `@best` means; the best by a further rule is `best:<metric>`, after the others.
    """
    best = {info.step for info in rank_best(policy, infos)[:1]}
    further = _best_by_further_rules(policy, infos)
    newest = max((info.step for info in infos), default=None)
    milestones = [rule for rule in policy.rules if isinstance(rule, Milestones)] or [Milestones()]
    milestone = {step for rule in milestones for step in rule.judge(infos, schedule).keep}
    kinds = {}
    for info in infos:
        emergency = any(reason.startswith((SIGNAL, EMERGENCY)) for reason in info.reasons)
        holds = (info.step == newest, info.step in best, info.step in milestone, info.pinned, emergency)
        held_kinds = [kind for kind, held in zip(_KINDS, holds, strict=True) if held]
        kinds[info.step] = (*held_kinds, *further.get(info.step, ()))
    return kinds


def _best_by_further_rules(policy: KeepAny, infos: Sequence[CheckpointInfo]) -> dict[int, tuple[str, ...]]:
    found: dict[int, tuple[str, ...]] = {}
    for rule in [rule for rule in policy.rules if isinstance(rule, BestN)][1:]:
        for info in rule.rank(infos)[:1]:
            kind = f"best:{rule.metric}"
            found[info.step] = tuple(dict.fromkeys((*found.get(info.step, ()), kind)))
    return found

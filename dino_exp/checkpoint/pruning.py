"""Pruning by hand: which rules count, what would go, and how much that frees. Pure.

The same plan serves `CheckpointReader.plan_prune`, which changes nothing, and `Ledger.plan_prune`, whose plan is then
carried out.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

from dino_exp.checkpoint.layout import pack_step
from dino_exp.checkpoint.manifest import Manifest, chunks_of
from dino_exp.checkpoint.policies import (
    BestN,
    KeepAny,
    KeepRule,
    LatestN,
    Milestones,
    Pinned,
    ThinMilestones,
    derive_kinds,
)
from dino_exp.checkpoint.registry import Row
from dino_exp.checkpoint.types import CheckpointInfo, RetentionPlan, Schedule
from dino_exp.checkpoint.verify import few
from dino_exp.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class PruneRules:
    """What the caller wants instead of the recorded rules; None: as recorded.

    `last` replaces the number of newest. `best` with `metric` and `mode` replaces the rule by that metric, or, where
    there is none, the rule that says what "best" means; without `metric`, that one's number. Milestones and pins
    always stay. `thin` are the beginnings of the names of the tensors that stay of milestones that nothing else keeps.
    """

    last: int | None = None
    best: int | None = None
    metric: str | None = None
    mode: str | None = None
    thin: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.best is None and (self.metric is not None or self.mode is not None):
            raise UsageError("a metric or a mode without a number of best checkpoints: add --keep-best <number>")
        if self.metric is None and self.mode is not None:
            raise UsageError(f"mode {self.mode} of which metric? Add --metric <name>")

    def instead_of(self, recorded: KeepAny) -> KeepAny:
        """The policy to prune by. Raises UsageError where a metric or its mode must be named."""
        rules: list[KeepRule] = list(recorded.rules)
        if self.last is not None:
            rules = [LatestN(self.last), *(rule for rule in rules if not isinstance(rule, LatestN))]
        if self.best is not None:
            rules = self._with_best(rules, self.best)
        if self.thin is not None:
            rules = [*(rule for rule in rules if not isinstance(rule, ThinMilestones)), ThinMilestones(self.thin)]
        rules += [rule for rule in (Pinned(), Milestones()) if not any(type(rule) is type(other) for other in rules)]
        return KeepAny(tuple(rules))

    def _with_best(self, rules: list[KeepRule], num: int) -> list[KeepRule]:
        bests = [rule for rule in rules if isinstance(rule, BestN)]
        same = [rule for rule in bests if self.metric in (None, rule.metric)]
        metric = self.metric or (same[0].metric if same else None)
        mode = self.mode or (same[0].mode if same else None)
        if metric is None:
            raise UsageError("best by which metric? The run records none: add --metric <name> --mode max or min")
        if mode is None:
            raise UsageError(f"is high or low {metric} better? The run does not record it: add --mode max or min")
        new, old = BestN(metric, mode, num), [*same, *bests][:1]
        return [new if rule in old else rule for rule in rules] if old else [*rules, new]


@dataclass(frozen=True, kw_only=True)
class PrunePlan:
    """What pruning keeps and drops. `kinds` are those that a listing shows; `damaged` are neither kept nor dropped.

    `freed_bytes` are about those that dropping and thinning give back; `foreign_bytes` those of packs of dropped
    checkpoints that remain because kept ones build on them.
    """

    infos: tuple[CheckpointInfo, ...]
    kinds: Mapping[int, tuple[str, ...]]
    plan: RetentionPlan
    damaged: Mapping[int, str]
    freed_bytes: int
    foreign_bytes: int


@dataclass(frozen=True)
class Shrunk:
    """What was done: which steps were thinned, which were only written anew, and how many bytes the disk has back."""

    thinned: tuple[int, ...] = ()
    rewritten: tuple[int, ...] = ()
    freed_bytes: int = 0


def plan_prune(
    rows: Mapping[int, Row],
    pins: Collection[int],
    damaged: Mapping[int, str],
    *,
    recorded: KeepAny,
    rules: PruneRules,
    schedule: Schedule,
) -> PrunePlan:
    """Judge `rows` by `recorded`, as `rules` change it.

    Raises UsageError as `PruneRules.instead_of`, and for a metric that no checkpoint has: a slip of the pen must not
    drop the best.
    """
    infos = tuple(replace(row.info, pinned=True) if step in pins else row.info for step, row in sorted(rows.items()))
    if rules.metric is not None and not any(rules.metric in info.metrics for info in infos):
        measured = sorted({name for info in infos for name in info.metrics})
        near = difflib.get_close_matches(rules.metric, measured)
        hint = f"near: {', '.join(near)}" if near else f"measured here: {few(measured) or 'none'}"
        raise UsageError(f"no checkpoint has a metric {rules.metric!r}; {hint}")
    plan = rules.instead_of(recorded).plan(infos, schedule)
    return PrunePlan(
        infos=infos,
        kinds=derive_kinds(recorded, infos, schedule),
        plan=plan,
        damaged=dict(damaged),
        freed_bytes=freed_bytes(rows, plan.drop),
        foreign_bytes=sum(foreign_packs(without(rows, plan.drop)).values()),
    )


def as_done(planned: PrunePlan, dropped: Collection[int], left: Mapping[int, Row], freed: int) -> PrunePlan:
    """The plan as it was carried out: what was to go and did not was pinned after the plan was made.

    `left` are the rows afterwards, `freed` the bytes that the disk has back.
    """
    late = {step: "keep: pinned just now" for step in planned.plan.drop if step not in dropped}
    plan = RetentionPlan(
        keep=tuple(sorted({*planned.plan.keep, *late})),
        drop=tuple(sorted(dropped)),
        reasons={**planned.plan.reasons, **late},
        thin=planned.plan.thin,
    )
    return replace(planned, plan=plan, freed_bytes=freed, foreign_bytes=sum(foreign_packs(left).values()))


def less_damaged(planned: PrunePlan, damaged: Mapping[int, str]) -> PrunePlan:
    """The same once more was found to be damaged, while kept ones were written anew: neither kept nor dropped."""
    plan = planned.plan
    found = {step: why for step, why in damaged.items() if step not in plan.drop}
    return replace(
        planned,
        infos=tuple(info for info in planned.infos if info.step not in found),
        plan=RetentionPlan(
            keep=tuple(step for step in plan.keep if step not in found),
            drop=plan.drop,
            reasons={step: why for step, why in plan.reasons.items() if step not in found},
            thin={step: parts for step, parts in plan.thin.items() if step not in found},
        ),
        damaged={**planned.damaged, **found},
    )


def without(rows: Mapping[int, Row], steps: Collection[int]) -> dict[int, Row]:
    """The rows that are left."""
    return {step: row for step, row in rows.items() if step not in steps}


def pack_sizes(rows: Iterable[Row]) -> dict[str, int]:
    """The bytes of each pack that some row reaches."""
    return {name: size for row in rows for name, size in zip(row.packs, row.pack_bytes, strict=True)}


def foreign_packs(rows: Mapping[int, Row]) -> dict[str, int]:
    """The bytes of packs that are only there because checkpoints of other steps build on them."""
    own = {name for step, row in rows.items() for name in row.packs if pack_step(name) == step}
    return {name: size for name, size in pack_sizes(rows.values()).items() if name not in own}


def thin_gain(manifest: Manifest, prefixes: tuple[str, ...], rows: Mapping[int, Row]) -> int:
    """About how many bytes go if only tensors stay whose names begin with one of `prefixes`.

    None of a pack that another row reaches, which stays as it is.
    """
    shared = {name for step, row in rows.items() if step != manifest.step for name in row.packs}
    kept, gone = (
        {
            (chunk.pack, chunk.start): chunk.stored_bytes
            for name, _, chunk in chunks_of(manifest)
            if name.startswith(prefixes) is stays and chunk.pack not in shared
        }
        for stays in (True, False)
    )
    return sum(size for place, size in gone.items() if place not in kept)


def shared_bytes(rows: Mapping[int, Row]) -> dict[int, int]:
    """Of each checkpoint the bytes of packs that others reach too: they stay if it goes."""
    num_owners = Counter(name for row in rows.values() for name in row.packs)
    return {
        step: sum(size for name, size in zip(row.packs, row.pack_bytes, strict=True) if num_owners[name] > 1)
        for step, row in rows.items()
    }


def freed_bytes(rows: Mapping[int, Row], drop: Collection[int]) -> int:
    """Bytes of the manifests of `drop`, and of those of their packs that no other row reaches."""
    kept = {name for step, row in rows.items() if step not in drop for name in row.packs}
    gone = {
        name: num_bytes
        for step in drop
        for name, num_bytes in zip(rows[step].packs, rows[step].pack_bytes, strict=True)
        if name not in kept
    }
    return sum(gone.values()) + sum(rows[step].identity[0] for step in drop)

"""What is there and what of it is whole: found by looking only, for who changes a folder and for who plans a change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from dino_exp.checkpoint.registry import Row, missing_packs, row_of
from dino_exp.checkpoint.store import Store
from dino_exp.checkpoint.verify import read_verified
from dino_exp.errors import CorruptCheckpointError


def sort_rows(
    store: Store, rows: Mapping[int, Row], damaged: Mapping[int, str]
) -> tuple[dict[int, Row], dict[int, str]]:
    """Rows that are whole by the sizes of their packs, and why each other one is not. Raises OSError."""
    problems = {step: why for step, row in rows.items() if (why := missing_packs(store, row)) is not None}
    return {step: row for step, row in rows.items() if step not in problems}, {**damaged, **problems}


def is_whole(store: Store, step: int) -> bool:
    """Whether a step's manifest can be read and its packs have the sizes that it names. Raises OSError."""
    try:
        manifest, identity = store.read(step, with_tensors=False)
    except CorruptCheckpointError:
        return False
    return missing_packs(store, row_of(manifest, identity, verified=False)) is None


def verify_newest(store: Store, rows: dict[int, Row], damaged: dict[int, str], *, afresh: bool = False) -> int | None:
    """See to it that one resumable checkpoint is verified, so that retention may drop others; its step.

    The newest are read until one is good, which its row notes; a bad one goes from `rows` to `damaged`. What was
    found good earlier is believed, but not with `afresh`. None where no good one is left. Raises OSError.
    """
    for step in sorted((step for step, row in rows.items() if row.info.resumable), reverse=True):
        if rows[step].info.verified and not afresh:
            return step
        try:
            read_verified(store, step)
        except CorruptCheckpointError as damage:
            damaged[step] = str(damage)
            del rows[step]
            continue
        rows[step] = mark_verified(rows[step])
        return step
    return None


def mark_verified(row: Row) -> Row:
    """The row of a checkpoint of which every byte was read and found good."""
    return replace(row, info=replace(row.info, verified=True))

"""Damage in few words: which parts of a checkpoint are hit and which are fine. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from dino_exp.analysis.names import block_of, part_of

_MOST_BLOCKS = 4


def summarise(damaged: Sequence[str], tensors: Collection[str], *, elsewhere: bool = False) -> str:
    """For example `teacher backbone.blocks.7 damaged (2 tensors); student, optimizer, loss fine`.

    `damaged` are names out of `tensors`, all those of the checkpoint; `elsewhere` says that bytes outside any tensor
    are damaged. Without `tensors` the manifest itself cannot be read.
    """
    if not tensors:
        return "the manifest cannot be read, so nothing of it can be used"
    hit = list(dict.fromkeys(damaged))
    parts = list(dict.fromkeys([*_in_order(tensors), *map(part_of, hit)]))
    texts = [_part_text(part, hit, tensors) for part in parts if any(part_of(name) == part for name in hit)]
    if elsewhere and not hit:
        texts.append("bytes outside the tensors damaged")
    fine = [part for part in parts if not any(part_of(name) == part for name in hit)]
    return "; ".join([*texts, *([f"{', '.join(fine)} fine"] if fine else [])])


def _in_order(tensors: Collection[str]) -> list[str]:
    """The parts of a checkpoint, what people ask for first."""
    usual = ("student", "teacher", "optimizer", "loss")
    parts = {part_of(name) for name in tensors}
    return [*(part for part in usual if part in parts), *sorted(parts - set(usual))]


def _part_text(part: str, hit: Sequence[str], tensors: Collection[str]) -> str:
    names = [name for name in hit if part_of(name) == part]
    if len(names) == sum(part_of(name) == part for name in tensors):
        return f"{part} damaged ({_count(len(names))}, all of it)"
    blocks = dict.fromkeys(map(block_of, names))
    shown = ", ".join(list(blocks)[:_MOST_BLOCKS])
    more = f" and {len(blocks) - _MOST_BLOCKS} more places" if len(blocks) > _MOST_BLOCKS else ""
    return f"{part} {shown}{more} damaged ({_count(len(names))})"


def _count(num: int) -> str:
    return f"{num} tensor{'' if num == 1 else 's'}"

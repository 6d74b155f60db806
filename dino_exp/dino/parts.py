"""The parts of a training's state by the beginnings of their tensors' names, for who stores them."""

from __future__ import annotations

COMPANIONS = {"teacher.": "student."}  # a teacher is an average of students, so it resembles the newest

# What may stay of a milestone: the teacher is what evaluation and export use.
THIN_PARTS: dict[str, tuple[str, ...]] = {"teacher": ("teacher.",), "models": ("teacher.", "student.")}

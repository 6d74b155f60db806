"""The end of a time allocation is near: one save for it, in a real training."""

from __future__ import annotations

import time

from support.runs import Lab, events, manifests

BY_THE_DEADLINE_ONLY = (
    "checkpoint.save.every_epochs=null",
    "checkpoint.save.every_minutes=null",
    "checkpoint.keep.milestones=[]",
    "checkpoint.save.before_secs=3600",
)


def test_the_end_of_a_slurm_job_makes_one_save(lab: Lab) -> None:
    lab.environment["SLURM_JOB_END_TIME"] = str(int(time.time()) + 900)
    lab.train("train.stop_after_steps=4", *BY_THE_DEADLINE_ONLY)
    run = lab.only_run()
    first, last = events(run, "saved")
    assert (first["step"], last["step"], last["reasons"]) == (1, 4, ["end"])
    (reason,) = first["reasons"]
    word, secs, unit = reason.removeprefix("deadline ").split()
    assert (word, unit) == ("in", "s")
    assert 0 <= int(secs) <= 900
    assert {step: manifest["reasons"] for step, manifest in manifests(run).items()} == {1: [reason], 4: ["end"]}

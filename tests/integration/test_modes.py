"""Every way to compute a training: half precision, recomputed activations, compiled layers. Each resumes to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.runs import SMOKE, Lab, assert_same_end, last_digest, rows

SMALL = (
    *SMOKE, "model.depth=2", "model.drop_path_rate=0.2", "train.batch_size=256", "optimizer.freeze_last_layer_epochs=1",
)  # fmt: skip
MODES = {
    "bf16": ("train.precision=bf16",),
    "fp16": ("train.precision=fp16",),
    "checkpointing": ("runtime.gradient_checkpointing=true",),
    "bf16, checkpointing": ("train.precision=bf16", "runtime.gradient_checkpointing=true"),
}


@pytest.mark.parametrize(
    "mode", [pytest.param(name, marks=() if name == "fp16" else pytest.mark.slow) for name in MODES]
)
def test_a_training_resumes_to_the_bit(tmp_path: Path, mode: str) -> None:
    lab = Lab(tmp_path, settings=(*SMALL, *MODES[mode]))
    assert_exact_resume(lab)
    row = rows(run_of(lab, "whole"))[-1]
    assert ("loss_scale" in row) == (mode == "fp16")


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("train.precision=bf16", "train.accumulate=3", "loss.use_bn=false")])
def test_compiled_layers_resume_to_the_bit(tmp_path: Path, more: tuple[str, ...]) -> None:
    """Also with parts of several sizes: whoever begins with an evaluation compiles the same as who does not."""
    lab = Lab(tmp_path, settings=(*SMALL, "runtime.compile=true", *more))
    lab.environment["PYTHONWARNINGS"] = "default"  # torch's compiler warns of what torch itself does
    assert_exact_resume(lab)


def run_of(lab: Lab, variant: str) -> Path:
    (run,) = [run for run in lab.runs() if run.name.endswith(f"-{variant}")]
    return run


def assert_exact_resume(lab: Lab) -> None:
    lab.train("run.variant=whole")
    lab.train("run.variant=parts", "train.stop_after_steps=7")
    lab.train("run.variant=parts")
    assert_same_end(run_of(lab, "parts"), run_of(lab, "whole"))


@pytest.mark.slow
def test_recomputed_activations_change_no_bit(tmp_path: Path) -> None:
    lab = Lab(tmp_path, settings=(*SMALL, "train.stop_after_steps=6"))
    lab.train("run.variant=kept")
    lab.train("run.variant=again", "runtime.gradient_checkpointing=true")
    assert last_digest(run_of(lab, "kept")) == last_digest(run_of(lab, "again"))

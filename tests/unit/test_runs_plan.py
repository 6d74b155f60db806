import pytest
from runs_samples import CODE_HEX, sample_record

from dino_exp.runs.plan import decide


@pytest.mark.parametrize(
    ("state", "step", "stop_step", "kind"),
    [
        ("completed", 100, None, "finished"),
        ("completed", 100, 50, "finished"),
        ("interrupted", 100, None, "continue"),  # killed after its last commit: the closing work is left
        ("running", 30, None, "continue"),
        ("preempted", 30, 100, "continue"),
        ("failed", 30, 40, "continue"),
        ("stopped", 30, 30, "stopped_already"),
        ("stopped", 30, 20, "stopped_already"),
        ("stopped", 30, 31, "continue"),
        ("stopped", 30, None, "continue"),
        ("running", 30, 30, "continue"),
        ("running", 31, 30, "stopped_already"),
        ("preempted", 30, 500, "continue"),
    ],
)
def test_what_a_start_means(state, step, stop_step, kind):
    start = decide(sample_record(state=state, step=step), code_id=CODE_HEX, stop_step=stop_step)
    assert start.kind == kind
    assert start.reason
    assert not start.code_changed


def test_without_a_record_the_run_is_new():
    assert decide(None, code_id=CODE_HEX, stop_step=None).kind == "new"


def test_other_code_is_told():
    start = decide(sample_record(state="stopped"), code_id="0" * 64, stop_step=None)
    assert (start.kind, start.code_changed) == ("continue", True)

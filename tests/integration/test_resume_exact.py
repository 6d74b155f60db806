"""Stopped anywhere and continued: the same bits as without a stop."""

from __future__ import annotations

import json
import shlex
import signal
import time
from pathlib import Path

import pytest
from support.runs import SMOKE, Lab, assert_same_end, events, last_digest, manifests, record

STEPS_PER_EPOCH = 5


def renamed(reference: Path, variant: str) -> Path:
    return reference.with_name(reference.name.replace("reference", variant))


@pytest.mark.slow
def test_stop_at_every_step_of_an_epoch(tmp_path: Path) -> None:
    lab = Lab(tmp_path, settings=(*SMOKE, "model.depth=2", "model.drop_path_rate=0.2", "train.batch_size=256"))
    lab.train("run.variant=reference")
    reference = lab.only_run()
    for step in range(STEPS_PER_EPOCH, 2 * STEPS_PER_EPOCH):
        variant = f"stop{step}"
        lab.train(f"run.variant={variant}", f"train.stop_after_steps={step}")
        run = renamed(reference, variant)
        assert record(run)["state"] == "stopped"
        assert record(run)["step"] == step
        lab.train(f"run.variant={variant}")
        assert_same_end(run, reference)


@pytest.mark.parametrize("optimizer", [pytest.param("sgd", marks=pytest.mark.slow), "lars"])
def test_other_optimizers_go_on_from_before_and_after_the_freeze(lab: Lab, optimizer: str) -> None:
    chosen = (f"optimizer={optimizer}", "optimizer.lr=0.1", "optimizer.freeze_last_layer_epochs=1", "train.epochs=2")
    lab.settings = (*lab.settings, *chosen, "train.batch_size=256")
    lab.train("run.variant=reference")
    reference = lab.only_run()
    for stop in (STEPS_PER_EPOCH - 1, STEPS_PER_EPOCH + 2):
        lab.train("run.variant=stopped", f"train.stop_after_steps={stop}")
    lab.train("run.variant=stopped")
    assert_same_end(renamed(reference, "stopped"), reference)


def test_stopping_again_at_the_same_place_touches_nothing(lab: Lab) -> None:
    lab.train("train.stop_after_steps=5")
    before = snapshot(lab.only_run())
    lab.train("train.stop_after_steps=5")
    assert snapshot(lab.only_run()) == before
    lab.train()
    finished = snapshot(lab.only_run())
    assert "Nothing to do" in lab.train()
    assert snapshot(lab.only_run()) == finished
    assert record(lab.only_run())["state"] == "completed"


def snapshot(run: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(run)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(run.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize(
    ("first", "later"),
    [
        pytest.param(("runtime.workers=2",), ("runtime.workers=0",), marks=pytest.mark.slow),
        (("runtime.workers=1", "checkpoint=every_epoch"), ("runtime.workers=3", "checkpoint=best")),
    ],
)
def test_workers_and_checkpoint_policy_change_no_bit(lab: Lab, first: tuple[str, ...], later: tuple[str, ...]) -> None:
    lab.settings = (*lab.settings, "train.batch_size=256")
    lab.train("run.variant=reference")
    lab.train("run.variant=mixed", f"train.stop_after_steps={STEPS_PER_EPOCH - 1}", *first)
    lab.train("run.variant=mixed", *later)
    reference = next(run for run in lab.runs() if run.name.endswith("reference"))
    assert_same_end(renamed(reference, "mixed"), reference)


def test_a_stop_signal_saves_and_exits_with_its_number(lab: Lab) -> None:
    lab.train("run.variant=reference")
    reference = lab.only_run()
    run = renamed(reference, "signalled")
    for num_rows, number in ((2, signal.SIGTERM), (12, signal.SIGINT), (24, signal.SIGUSR2)):
        attempt = lab.fork("run.variant=signalled")
        wait_for_rows(run, num_rows)
        attempt.kill(number)
        assert attempt.wait() == 128 + number
        assert record(run)["state"] == "preempted"
    lab.train("run.variant=signalled")
    assert_same_end(run, reference)
    assert [attempt["outcome"] for attempt in record(run)["attempts"]] == ["preempted"] * 3 + ["completed"]


def wait_for_rows(run: Path, num: int) -> None:
    deadline = time.monotonic() + 100
    while not (run / "metrics.jsonl").exists() or (run / "metrics.jsonl").read_bytes().count(b"\n") < num:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_usr1_saves_and_goes_on(lab: Lab) -> None:
    lab.settings = (*lab.settings, "checkpoint.save.every_epochs=null")
    attempt = lab.fork("train.epochs=40", "train.stop_after_steps=60")
    while not lab.runs():
        time.sleep(0.02)
    wait_for_rows(lab.only_run(), 3)
    attempt.kill(signal.SIGUSR1)
    assert attempt.wait() == 0
    saves = [event for event in events(lab.only_run(), "saved") if "signal SIGUSR1" in event["reasons"]]
    assert len(saves) == 1
    assert record(lab.only_run())["step"] == 60


def test_two_interrupts_abort_at_once(lab: Lab) -> None:
    attempt = lab.fork("train.epochs=400")
    while not lab.runs():
        time.sleep(0.05)
    wait_for_rows(lab.only_run(), 2)
    attempt.kill(signal.SIGINT)
    attempt.kill(signal.SIGINT)
    assert attempt.wait() == 130


def test_resume_by_directory_prefix_and_last(lab: Lab) -> None:
    lab.train("run.variant=reference")
    reference = lab.only_run()
    lab.train("run.variant=other", "train.stop_after_steps=4")
    run = renamed(reference, "other")
    lab.settings = ()
    lab.train(f"resume={run}", "train.stop_after_steps=8")
    lab.train("resume=last", "train.stop_after_steps=12")
    lab.train(f"resume={run.name}")
    assert_same_end(run, reference)
    assert [attempt["resumed_from"] for attempt in record(run)["attempts"]] == [None, 4, 8, 12]


def test_resume_names_a_checkpoint_only_if_it_is_the_newest(lab: Lab) -> None:
    lab.train("train.stop_after_steps=4", "checkpoint.save.every_steps=2")
    lab.settings = ()
    assert "fork=" in lab.train("resume=last@2", "train.stop_after_steps=6", code=3)
    lab.train("resume=last@latest", "train.stop_after_steps=5")
    lab.train("resume=last@5", "train.stop_after_steps=6")
    assert record(lab.only_run())["step"] == 6


def test_settings_of_another_run_are_noticed(lab: Lab) -> None:
    lab.train("train.stop_after_steps=2")
    run = lab.only_run()
    lab.train("train.stop_after_steps=2", "optimizer.lr=1e-3")
    other = next(path for path in lab.runs() if path != run)
    for name in ("config.yaml", "config.canonical.json"):
        (run / name).write_bytes((other / name).read_bytes())
    lab.settings = ()
    assert "run.json names" in lab.train(f"resume={run}", code=3)


def test_a_refusal_leaves_no_mark_on_earlier_attempts(lab: Lab) -> None:
    lab.train("train.stop_after_steps=2")
    run = lab.only_run()
    before = record(run)
    assert "no CUDA device" in lab.train("runtime.device=cuda", "train.stop_after_steps=4", code=2)
    assert record(run) == before
    assert not (run / "FAILED.txt").exists()
    lab.train("runtime.device=cuda", "run.variant=first", code=2)  # where there are none, it says why
    (other,) = (path for path in lab.runs() if path != run)
    assert not (other / "run.json").exists()
    assert "no CUDA device" in (other / "FAILED.txt").read_text()


def test_a_moved_run_resumes_where_it_lies(lab: Lab) -> None:
    lab.train("run.variant=reference")
    reference = lab.only_run()
    lab.train("run.variant=moved", "train.stop_after_steps=7")
    elsewhere = lab.directory / "elsewhere"
    renamed(reference, "moved").rename(elsewhere)
    lab.settings = ()
    lab.train(f"resume={elsewhere}")
    assert_same_end(elsewhere, reference)


def test_a_resume_that_changes_identity_is_refused_with_a_table(lab: Lab) -> None:
    lab.train("train.stop_after_steps=3")
    run = lab.only_run()
    before = snapshot(run)
    lab_settings, lab.settings = lab.settings, ()
    printed = lab.train(f"resume={run}", "optimizer.lr=0.5", code=3)
    assert "optimizer.lr" in printed
    assert "refused" in printed
    assert snapshot(run) == before
    assert lab.runs() == [run]
    advised = [shlex.split(line, comments=True) for line in printed.splitlines() if "# from" in line]
    assert [words[:4] for words in advised] == [
        ["python", "-m", "dino_exp.train", f"fork={run}@3"],
        ["python", "-m", "dino_exp.train", lab_settings[0]],
    ]
    for words in advised:
        lab.train(*words[3:], "train.stop_after_steps=4")
    assert [record(one)["step"] for one in lab.runs()].count(4) == 2


def test_changed_threads_continue_and_say_that_exactness_is_lost(lab: Lab) -> None:
    lab.train("train.stop_after_steps=3")
    run = lab.only_run()
    printed = lab.train("runtime.threads=2", "train.stop_after_steps=6")
    assert "threads was 1, is 2" in printed
    assert "cpu, 2 threads" in printed
    attempt = record(run)["attempts"][1]
    assert attempt["exact"] is False
    assert any("threads" in reason for reason in attempt["why_not_exact"])


def test_a_run_of_other_code_is_continued_only_by_resume(lab: Lab) -> None:
    lab.train("train.stop_after_steps=3")
    other = pretend_other_code(lab.only_run())
    printed = lab.train("train.stop_after_steps=3")
    assert f"resume={other}" in printed
    assert len(lab.runs()) == 2
    lab.settings = ()
    assert "code" in lab.train(f"resume={other}", "run.on_code_change=refuse", "train.stop_after_steps=6", code=3)
    assert "code was 00000000" in lab.train(f"resume={other}", "train.stop_after_steps=6")


def test_a_restarted_job_continues_its_run_although_the_code_was_edited(lab: Lab) -> None:
    lab.environment |= {"SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": "0"}
    lab.train("train.stop_after_steps=3")
    run = pretend_other_code(lab.only_run())
    lab.environment["SLURM_RESTART_COUNT"] = "1"
    assert "code was 00000000" in lab.train("train.stop_after_steps=6")
    assert lab.only_run() == run
    assert record(run)["attempts"][1]["exact"] is False
    lab.environment["SLURM_JOB_ID"] = "78"
    lab.train("train.stop_after_steps=3")
    assert len(lab.runs()) == 2


def pretend_other_code(run: Path) -> Path:
    """Make a run look as if other code had begun it; its new place."""
    path = run / "run.json"
    other = run.with_name(run.name.replace(record_code(run), "0" * 8))
    edit_record(path, lambda members: members["code"].update(id="0" * 64))
    edit_record(path, lambda members: members.update(run_key=other.name))
    edit_record(path, lambda members: members["attempts"][0]["code"].update(id="0" * 64))
    run.rename(other)
    return other


def record_code(run: Path) -> str:
    return run.name.split("-")[2]


def edit_record(path: Path, change: object) -> None:
    import hashlib

    members = json.loads(path.read_text())
    members.pop("digest")
    change(members)  # type: ignore[operator]
    text = json.dumps(members, sort_keys=True, separators=(",", ":"))
    path.write_text(json.dumps({**members, "digest": "sha256:" + hashlib.sha256(text.encode()).hexdigest()}))


def test_damaged_newest_checkpoint_falls_back_aloud(lab: Lab) -> None:
    lab.train("run.variant=reference")
    reference = lab.only_run()
    lab.train("run.variant=hurt", "checkpoint.save.every_steps=5", "train.stop_after_steps=18")
    run = renamed(reference, "hurt")
    newest = max(manifests(run))
    pack = run / "checkpoints" / "packs" / manifests(run)[newest]["packs"][0]["name"]
    content = bytearray(pack.read_bytes())
    content[len(content) // 2] ^= 1
    pack.write_bytes(content)
    lab.train("run.variant=hurt")
    assert_same_end(run, reference)
    assert events(run, "quarantined")[0]["step"] == newest
    assert list((run / "checkpoints" / "quarantine").iterdir())
    assert record(run)["attempts"][-1]["resumed_from"] < newest
    assert events(run, "resumed")[-1]["reached"] == newest  # by the rows, before they were cut


def test_no_loadable_checkpoint_is_exit_4(lab: Lab) -> None:
    lab.train("train.stop_after_steps=3")
    run = lab.only_run()
    for manifest in (run / "checkpoints").glob("step-*.json"):
        manifest.write_bytes(manifest.read_bytes()[:-9])
    printed = lab.train(code=4)
    assert "checkpoint" in printed


def test_equal_state_has_equal_digest_in_another_directory(tmp_path: Path) -> None:
    digests = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        lab = Lab(tmp_path / name)
        lab.train("train.stop_after_steps=4")
        digests.append(last_digest(lab.only_run()))
    assert digests[0] == digests[1]

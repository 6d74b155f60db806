import os
import shutil

import pytest
from runs_samples import CODE_HEX, CONFIG_HEX, sample_attempt, sample_record

from dino_exp.errors import UsageError
from dino_exp.runs.find import all_runs, find_run, split_at
from dino_exp.runs.record import save_record


def _make_run(outputs, variant, started_at):
    key = f"vit_nano-{CONFIG_HEX[:8]}-{CODE_HEX[:8]}-{variant}"
    folder = outputs / "runs" / key
    folder.mkdir(parents=True)
    attempt = sample_attempt(started_at=started_at)
    save_record(folder / "run.json", sample_record(run_key=key, variant=variant, attempts=(attempt,)))
    return folder


@pytest.fixture
def outputs(tmp_path):
    _make_run(tmp_path, "early", "2026-01-01T00:00:00.000000Z")
    _make_run(tmp_path, "late", "2026-03-01T00:00:00.000000Z")
    _make_run(tmp_path, "later", "2026-02-01T00:00:00.000000Z")
    (tmp_path / "runs" / "not-a-run").mkdir()
    return tmp_path


def test_a_run_is_found_by_folder_prefix_and_key(outputs, monkeypatch):
    runs = outputs / "runs"
    early = next(runs.glob("*-early"))
    assert find_run(outputs, str(early)) == early
    assert find_run(outputs, f"{early}/") == early
    assert find_run(outputs, early.name) == early
    assert find_run(outputs, early.name[:-2]) == early
    monkeypatch.chdir(runs)
    assert find_run(outputs, f"./{early.name}").resolve() == early.resolve()


def test_a_key_that_begins_another_is_the_one_that_is_typed_whole(outputs):
    late = next((outputs / "runs").glob("*-late"))
    assert find_run(outputs, late.name) == late


def test_ambiguous_and_unknown_names_say_what_there_is(outputs):
    with pytest.raises(UsageError, match=r"3 runs: .*early.*late.*later"):
        find_run(outputs, "vit_nano")
    with pytest.raises(UsageError, match=r"near: .*early"):
        find_run(outputs, f"vit_nono-{CONFIG_HEX[:8]}-{CODE_HEX[:8]}-early")
    with pytest.raises(UsageError, match="shows the runs"):
        find_run(outputs, "zzz")
    for nowhere in ("", ".", "..", "../..", "no/such/folder", str(outputs / "runs" / "not-a-run")):
        with pytest.raises(UsageError, match=r"no run\.json"):
            find_run(outputs, nowhere)


def test_last_goes_by_the_record_and_not_by_the_times_of_files(outputs):
    runs = outputs / "runs"
    early = next(runs.glob("*-early"))
    os.utime(early, (4e9, 4e9))
    os.utime(early / "run.json", (4e9, 4e9))
    assert find_run(outputs, "last").name.endswith("-late")


def test_last_passes_over_a_damaged_record_and_says_so(outputs, caplog):
    late = next((outputs / "runs").glob("*-late"))
    (late / "run.json").write_text("{")
    assert find_run(outputs, "last").name.endswith("-later")
    assert str(late) in caplog.text


def test_all_runs_are_those_with_a_record_or_with_checkpoints(outputs):
    late = next((outputs / "runs").glob("*-late"))
    (late / "checkpoints").mkdir()
    (late / "run.json").unlink()
    assert [path.name.rpartition("-")[2] for path in all_runs(outputs)] == ["early", "late", "later"]
    with pytest.raises(UsageError, match="no run in"):
        all_runs(outputs / "runs")


def test_last_without_a_run(tmp_path):
    with pytest.raises(UsageError, match=r"python -m dino_exp\.train"):
        find_run(tmp_path, "last")


def test_a_copied_run_is_found_where_it_lies(outputs, tmp_path):
    elsewhere = tmp_path / "usb" / "copy"
    shutil.copytree(find_run(outputs, "last"), elsewhere)
    assert find_run(outputs, str(elsewhere)) == elsewhere


@pytest.mark.parametrize(
    ("named", "parts"),
    [
        ("last", ("last", None)),
        ("last@best", ("last", "best")),
        ("vit_nano-ab@latest", ("vit_nano-ab", "latest")),
        ("outputs/runs/x@120", ("outputs/runs/x", "120")),
        ("/data/me@home/x", ("/data/me@home/x", None)),
        ("/data/me@home/x@0", ("/data/me@home/x", "0")),
    ],
)
def test_a_checkpoint_is_named_after_the_last_at(named, parts):
    assert split_at(named) == parts


@pytest.mark.parametrize("named", ["last@", "last@newest", "x@-1", "@best", "x@1.5", "x@" + "9" * 30])
def test_a_wrong_checkpoint_name_says_what_is_expected(named):
    with pytest.raises(UsageError, match="expected latest, best or a step"):
        split_at(named)

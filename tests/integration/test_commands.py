"""What people type: every experiment, every choice, sweeps, wrong input, and the commands of README."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from support.pictures import small_tree
from support.runs import ENVIRONMENT, Lab, last_digest, manifests, record

ROOT = Path(__file__).parents[2]
CHECKPOINTS = sorted(path.stem for path in (ROOT / "conf" / "checkpoint").glob("*.yaml"))


@pytest.mark.parametrize(
    "choice",
    [
        ("model=vit_s", "checkpoint=rotating"),
        ("model=vit_t", "optimizer=sgd", "scheduler=constant"),
        ("data=synthetic", "augment=dino", "runtime.workers=1"),
        ("train.precision=bf16", "loss.norm_last_layer=false"),
    ],
)
def test_choices_run_a_step(choice: tuple[str, ...], lab: Lab) -> None:
    lab.settings = ("debug=step", "runtime.threads=1")
    lab.train(*choice)
    assert record(lab.only_run())["step"] == 1


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_every_checkpoint_policy(checkpoint: str, lab: Lab) -> None:
    lab.train(f"checkpoint={checkpoint}", "train.batch_size=256")
    run = lab.only_run()
    kept = sorted(manifests(run)) if (run / "checkpoints").exists() else []
    assert record(run)["state"] == "completed"
    expected = {"none": [], "every_epoch": [5, 10], "milestones": [3, 5, 8, 10]}
    if checkpoint in expected:
        assert kept == expected[checkpoint]
    else:
        assert 10 in kept


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("optimizer.lrr=1", "optimizer.lr"),
        ("train.epochs=many", "train.epochs"),
        ("model=vit_x", "vit_s"),
        ("augment=dino", "grey"),
        ("train.batch_size=100000", "batch_size"),
        ("resume=nothing-here", "nothing-here"),
    ],
)
def test_wrong_input_is_one_message_and_exit_2(override: str, says: str, lab: Lab) -> None:
    printed = lab.train(override, code=2)
    assert says in printed
    assert "Traceback" not in printed
    assert not lab.runs()


@pytest.mark.slow
def test_a_sweep_runs_each_job_in_a_process_of_its_own(lab: Lab) -> None:
    lab.train("--multirun", "seed=0,1", "train.stop_after_steps=3")
    swept = {record(run)["config_hash"]: last_digest(run) for run in lab.runs()}
    assert len(swept) == 2
    alone = Lab(lab.directory / "alone")
    alone.directory.mkdir()
    alone.train("seed=1", "train.stop_after_steps=3")
    run = alone.only_run()
    assert swept[record(run)["config_hash"]] == last_digest(run)


def test_a_sweep_goes_on_past_a_failed_job_and_tells(lab: Lab) -> None:
    printed = lab.train("--multirun", "train.batch_size=100000,64", "train.stop_after_steps=2", code=1)
    assert "train.batch_size" in printed
    assert [record(run)["step"] for run in lab.runs()] == [2]


def test_help_and_finished_runs_import_no_torch(lab: Lab) -> None:
    lab.train("train.stop_after_steps=2")
    for arguments in (["--help"], [*lab.command("train.stop_after_steps=2")[3:]]):
        program = (
            "import sys\n"
            f"sys.argv[1:] = {arguments!r}\n"
            "from dino_exp import train\n"
            "try:\n    train.main()\n"
            "except SystemExit as end:\n    assert not end.code, end.code\n"
            "assert 'torch' not in sys.modules\n"
        )
        subprocess.run([sys.executable, "-c", program], check=True, env=lab.environment, stdout=subprocess.PIPE)


def test_checkpoints_list_show_verify(lab: Lab) -> None:
    lab.train()
    run = lab.only_run()
    files = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    listed = json.loads(lab.cli("checkpoints", "list", str(run), "--json"))
    fields = {
        "step", "epoch", "kinds", "metrics", "bytes", "created_at", "config_hash", "git_commit", "code_id",
        "state_digest", "resumable", "verified", "content_bytes", "shared_bytes", "frees_bytes",
    }  # fmt: skip
    assert all(row.keys() == fields for row in listed)
    assert [row["step"] for row in listed] == sorted(manifests(run))
    assert "latest" in listed[-1]["kinds"]
    assert sum("best" in row["kinds"] for row in listed) == 1
    shown = json.loads(lab.cli("checkpoints", "show", f"{run.name}@best", "--outputs", str(lab.outputs), "--json"))
    assert shown.keys() >= {*fields, "parent", "tensors"}
    names = {tensor["name"] for tensor in shown["tensors"]}
    assert {
        "student.backbone.blocks.0.attn.qkv.weight",
        "teacher.head.last_layer.weight_v",
        "optimizer.backbone.norm.weight.exp_avg",
        "loss.center",
    } <= names
    assert {name.partition(".")[0] for name in names} == {"student", "teacher", "optimizer", "loss"}
    verdict = json.loads(lab.cli("checkpoints", "verify", "last", "--outputs", str(lab.outputs), "--json"))
    assert verdict == {"ok": True, "checked": len(listed), "damaged": []}
    for verb in ("list", "show", "verify"):
        assert lab.cli("checkpoints", verb, str(run))
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == files


def test_verify_names_the_damaged_tensor_and_exits_4(lab: Lab) -> None:
    lab.train("train.stop_after_steps=2")
    run = lab.only_run()
    manifest = manifests(run)[2]
    name, entry = next(item for item in manifest["tensors"].items() if item[0].startswith("teacher.backbone.blocks.0"))
    pack = run / "checkpoints" / "packs" / manifest["packs"][0]["name"]
    content = bytearray(pack.read_bytes())
    content[entry["chunks"][0]["start"]] ^= 1
    pack.write_bytes(content)
    verdict = json.loads(lab.cli("checkpoints", "verify", str(run), "--json", code=4))
    assert verdict["ok"] is False
    assert [(place["step"], place["tensor"]) for place in verdict["damaged"]] == [(2, name)]
    assert name in lab.cli("checkpoints", "verify", str(run), code=4)


def test_listing_imports_no_torch(lab: Lab) -> None:
    lab.train("train.stop_after_steps=2")
    for verb in ("list", "verify", "show"):
        program = (
            "import sys\n"
            f"sys.argv[1:] = ['checkpoints', {verb!r}, {str(lab.only_run())!r}, '--json']\n"
            "from dino_exp.cli.app import run\n"
            "assert run() == 0\n"
            "assert not {'torch', 'numpy'} & sys.modules.keys()\n"
        )
        subprocess.run([sys.executable, "-c", program], check=True, env=lab.environment, stdout=subprocess.PIPE)


def test_unknown_runs_and_wrong_words(lab: Lab) -> None:
    assert "nothing" in lab.cli("checkpoints", "list", "nothing", code=2)
    assert "no run" in lab.cli("checkpoints", "list", "last", code=2).lower()
    lab.cli("checkpoints", "frobnicate", code=2)


def readme_commands() -> list[str]:
    lines = (ROOT / "README.md").read_text().splitlines()
    commands = [line.strip().partition(" #")[0].strip() for line in lines if line.startswith("    ")]
    return [command for command in commands if re.match(r"(python -m dino_exp|dino-exp|make) ?", command)]


@pytest.mark.slow
def test_every_readme_command_works(lab: Lab) -> None:
    """In the order of README, at debug size; `make train` and `make test` are what CI and test_fresh_clone run."""
    small = ["experiment=digits_smoke", "train.batch_size=512", "runtime.threads=1"]
    lab.settings = ()
    commands = readme_commands()
    assert len(commands) >= 8
    photographs = small_tree(lab.directory / "photographs", num=150)
    for shown in commands:
        command = shown.replace("<folder>", str(photographs))
        program, *words = shlex.split(command)
        if program == "make":
            subprocess.run(["make", "-n", *words], cwd=ROOT, check=True, stdout=subprocess.PIPE, env=ENVIRONMENT)
        elif program == "dino-exp":
            about_outputs = words[0] == "checkpoints" and words[1] != "restore"
            lab.cli(*words, *(["--outputs", str(lab.outputs)] if about_outputs else []))
        elif "--help" in words:
            lab.train("--help")
        elif words[1] == "dino_exp.evaluate":
            lab.evaluate(*words[2:])
        else:
            named = any(word.startswith(("resume=", "fork=")) for word in words)
            extra = [] if named else [word for word in small if word.partition("=")[0] not in command]
            if "vit_s" in command or "own_images" in command:
                extra = ["debug=step", "runtime.threads=1"]
            if "fork" in command:
                extra = [*extra, "train.stop_after_steps=6"]
            lab.train(*words[2:], *extra)

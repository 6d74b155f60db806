"""Real trainings by several processes, started as torchrun starts them."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch
from support.checkpoints import open_manager, request
from support.golden import A, exactly
from support.rank_checks import fifty_losses, one_batch_norm
from support.runs import SMOKE, Lab, last_digest, manifests, record, rows
from support.tiny_training import build_state

from dino_exp import load_backbone
from dino_exp.checkpoint.policies import AnyOf, KeepAny, LatestN
from dino_exp.checkpoint.reader import CheckpointReader
from dino_exp.dino.optim import set_hyper
from dino_exp.dist.ranks import ONE_RANK

from test_training_step import formula_state, step_once  # isort: skip  (found by `rank_checks`)


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path, settings=(*SMOKE, "checkpoint.save.every_steps=4", "train.stop_after_steps=12"))


def only(lab: Lab, variant: str) -> Path:
    (run,) = (run for run in lab.runs() if run.name.endswith(variant))
    return run


def test_two_ranks_train_what_one_trains_and_twice_the_same(lab: Lab) -> None:
    lab.train("run.variant=one")
    for variant in ("two", "again"):
        lab.train_together(2, f"run.variant={variant}")
    one, two, again = (only(lab, variant) for variant in ("one", "two", "again"))
    assert rows(two) == rows(again)
    assert last_digest(two) == last_digest(again)
    for row, other in zip(rows(one), rows(two), strict=True):
        for name in {"loss", "val_loss"} & row.keys():
            assert other[name] == pytest.approx(row[name], rel=1e-5), (row["step"], name)


@pytest.mark.parametrize(
    ("size", "parallel", "accumulate"), [(2, "ddp", 1), (2, "fsdp", 2), (3, "fsdp", 1), (4, "ddp", 1)]
)
def test_the_official_trace_in_float64(size: int, parallel: str, accumulate: int, tmp_path: Path) -> None:
    told = Lab(tmp_path).call_together(size, "golden_trace", parallel, str(accumulate))
    assert told["losses"] == exactly(A["losses"])
    assert told["center_sum"] == exactly(A["center_sum"])
    assert told["student_abs_sum"] == exactly(A["student_abs_sum"])
    alone = [step_once(state, step, want_health=True) for state in [formula_state()] for step in range(1, 10)]
    norms = [[one.grad_norm, one.update_ratio, one.health.entropy_ratio] for one in alone]
    for one, other in zip(norms, told["norms"], strict=True):
        assert other == pytest.approx(one, rel=1e-10)


@pytest.mark.parametrize(("size", "parallel"), [(2, "ddp"), (3, "fsdp")])
def test_lars_over_ranks_goes_by_the_norms_of_whole_tensors(size: int, parallel: str, tmp_path: Path) -> None:
    told = Lab(tmp_path).call_together(size, "golden_trace", parallel, "1", "lars")
    state = formula_state(name="lars")
    alone = [step_once(state, step, want_health=True) for step in range(1, 10)]
    assert told["losses"] == exactly([one.loss for one in alone])
    assert [norms[1] for norms in told["norms"]] == pytest.approx([one.update_ratio for one in alone], rel=1e-10)
    assert told["student_abs_sum"] == exactly(
        sum(one.detach().abs().sum().item() for one in state.student.parameters())
    )


@pytest.mark.parametrize("rows_of_each", [[4, 4], [5, 3], [1, 6, 2]])
def test_batch_norm_over_ranks_is_that_of_all_rows(rows_of_each: list[int], tmp_path: Path) -> None:
    told = Lab(tmp_path).call_together(len(rows_of_each), "batch_norm", json.dumps(rows_of_each))
    alone = one_batch_norm(rows_of_each)
    assert told["same"] == [1, 1], "all ranks have the same statistics"
    for name, values in alone.items():
        torch.testing.assert_close(
            torch.tensor(told[name][:2] if name == "statistics" else told[name], dtype=torch.float64),
            torch.tensor(values[:2] if name == "statistics" else values, dtype=torch.float64),
            rtol=1e-12,
            atol=1e-12,
        )


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-10)])
def test_fifty_steps_of_two_ranks_have_the_losses_of_one(dtype: str, tolerance: float, tmp_path: Path) -> None:
    told = Lab(tmp_path).call_together(2, "fifty_steps", dtype)
    assert told["losses"] == pytest.approx(fifty_losses(dtype, ONE_RANK), rel=tolerance)


def test_a_state_keeps_its_digest_from_hop_to_hop(tmp_path: Path) -> None:
    """1, 2, 3 ranks and one again, replicated and in shares."""
    folder = tmp_path / "checkpoints"
    save_tiny(folder)
    reader, digest = CheckpointReader(folder), CheckpointReader(folder).state_digest(1)
    lab = Lab(tmp_path)
    for step, (size, parallel) in enumerate([(2, "ddp"), (3, "fsdp"), (2, "fsdp"), (3, "ddp")], start=2):
        told = lab.call_together(size, "hop", parallel, str(folder), str(step), str(step))
        assert (told["sharded"] > 0) == (parallel == "fsdp")
        assert reader.state_digest(step) == digest
        assert reader.verify([step])["ok"]
    state = build_state()
    reader.restore(state, optional=("optimizer.",))
    manager = open_manager(folder, save=AnyOf(()), keep=KeepAny((LatestN(9),)), attempt=9)
    manager.save(state, request(6))
    committed = manager.drain()
    assert committed is not None
    assert committed.state_digest == digest


def save_tiny(folder: Path) -> None:
    """A state with moments that are not all zero, as step 1."""
    state = build_state()
    for parameter in state.student.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    set_hyper(state.optimizer, lr=0.01, weight_decay=0.1)
    state.optimizer.step()
    state.step = 1
    manager = open_manager(folder, save=AnyOf(()), keep=KeepAny((LatestN(9),)))
    manager.save(state, request(1))
    manager.drain()


@pytest.mark.slow
def test_one_process_looks_after_what_many_wrote_in_shares(lab: Lab) -> None:
    """Listing, verifying, thinning, compaction, backup, export and a fork, of checkpoints that FSDP wrote."""
    lab.train_together(2, "runtime.parallel=fsdp", "checkpoint=milestones", "train.stop_after_steps=null")
    run = lab.only_run()
    shown = {step: json.loads(lab.cli("checkpoints", "show", f"{run}@{step}", "--json")) for step in (11, 33, 44)}
    assert any(len(entry["chunks"]) == 2 for entry in manifests(run)[44]["tensors"].values())
    assert manifests(run)[44]["state_digest"] is None
    assert json.loads(lab.cli("checkpoints", "verify", str(run), "--json"))["ok"]
    lab.cli("checkpoints", "backup", str(run), str(lab.directory / "backup"))
    lab.cli("checkpoints", "restore", str(lab.directory / "backup"), str(lab.directory / "restored"))
    lab.cli("checkpoints", "prune", str(run), "--keep-last", "1", "--thin", "teacher", "--compact")
    assert json.loads(lab.cli("checkpoints", "verify", str(run), "--json"))["ok"]
    assert manifests(run)[11]["full_state_digest"] == shown[11]["state_digest"]
    restored = lab.directory / "restored"
    again = json.loads(lab.cli("checkpoints", "show", f"{restored}@33", "--json"))
    assert again["state_digest"] == shown[33]["state_digest"]
    lab.cli("checkpoints", "export", f"{run}@44", "--to", str(lab.directory / "teacher.safetensors"))
    assert load_backbone(f"{run}@44")(torch.zeros(1, 1, 16, 16)).shape == (1, 16)
    lab.train(f"fork={restored}@33", "train.epochs=3", "train.stop_after_steps=36")
    child = next(other for other in lab.runs() if other != run)
    assert record(child)["parent"]["state_digest"] == shown[33]["state_digest"]
    assert record(child)["state"] == "stopped"


@pytest.mark.slow
def test_half_precision_in_shares_trains_as_replicated(lab: Lab) -> None:
    for parallel in ("ddp", "fsdp"):
        lab.train_together(2, "train.precision=bf16", f"runtime.parallel={parallel}", f"run.variant={parallel}")
    for row, other in zip(rows(only(lab, "ddp")), rows(only(lab, "fsdp")), strict=True):
        if "loss" in row:
            assert other["loss"] == pytest.approx(row["loss"], rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_share_in_parts_is_the_same_step(parallel: str, lab: Lab) -> None:
    """`train.accumulate` is another run by its key, and the same mathematics."""
    lab.train("loss.use_bn=false", "run.variant=whole")
    lab.train_together(
        2, "loss.use_bn=false", "train.accumulate=3", f"runtime.parallel={parallel}", "run.variant=parts"
    )
    for row, other in zip(rows(only(lab, "whole")), rows(only(lab, "parts")), strict=True):
        for name in {"loss", "grad_norm", "kl"} & row.keys():
            assert other[name] == pytest.approx(row[name], rel=1e-4), (row["step"], name)


def test_without_an_agent_all_hear_the_last_words_of_rank_0(lab: Lab) -> None:
    """The store of the rendezvous ends with rank 0, which says why there is nothing to do."""
    size = 2
    for words, code, says in (
        ((), 0, "completed|stopped"),
        ((), 0, "Nothing to do"),
        (("resume=nothing",), 2, "nothing"),
    ):
        crew = lab.launch(size, *words, agent=False)
        codes = crew.wait()
        printed = [crew.output(rank) for rank in range(size)]
        assert codes == [code] * size, printed
        assert re.search(says, printed[0]), printed[0]
        assert not any("rendezvous" in text or "Traceback" in text for text in printed), printed


@pytest.mark.parametrize("what", ["link", pytest.param("pipe", marks=pytest.mark.slow)])
def test_the_log_of_no_rank_leads_out_of_the_run(lab: Lab, what: str) -> None:
    lab.train_together(2, "train.stop_after_steps=2")
    log, victim = lab.only_run() / "train.rank1.log", lab.directory / "victim"
    victim.write_text("precious")
    log.unlink()
    if what == "link":
        log.symlink_to(victim)
    else:
        os.mkfifo(log)
    printed = lab.train_together(2, "train.stop_after_steps=4", "runtime.timeout_secs=20", codes=[3, 3])
    assert "train.rank1.log is a link or a special file" in "".join(printed)
    assert victim.read_text() == "precious"
    log.unlink()
    lab.train_together(2, "train.stop_after_steps=4")

"""What several processes compute together, printed by the first as JSON. Each function is called in every rank."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

DEVICE = torch.device("cpu")


def golden_trace(parallel: str, accumulate: str, optimizer: str = "adamw") -> int:
    """The official code's nine steps in float64, each rank with its images."""
    import test_training_step as official

    from dino_exp.dist.place import place_of
    from dino_exp.dist.ranks import joined
    from dino_exp.training.parallel import Replicated, local_part
    from dino_exp.training.sharded import Sharded
    from support.golden import images

    torch.set_num_threads(1)
    rule = official.replace_rule(accumulate=int(accumulate))
    with joined(place_of(os.environ), DEVICE, 60) as ranks:
        state = official.formula_state(name=optimizer)
        if parallel == "ddp":
            spread: Any = Replicated(state.student, state.teacher, ranks)
        else:
            spread = Sharded(state.student, state.teacher, ranks, precision="fp32")
            state.optimizer = official.build_optimizer(
                optimizer, state.student, whole_norms=spread.whole_norms, local_part=local_part
            )
        losses, norms = [], []
        for step in range(1, 10):

            def crops(images_BCHW: torch.Tensor, sample_ids_B: torch.Tensor, epoch: int, step: int = step) -> Any:
                at = step - 1
                made = [images(official.BATCH, 32, 0.1 + at), images(official.BATCH, 32, 0.7 + at)]
                made += [images(official.BATCH, 16, 0.3 * local + at) for local in range(3)]
                return [crop[sample_ids_B] for crop in made]

            ours = ranks.place.share_of(official.BATCH)
            batch = official.batch_of(step).at(slice(ours.start, ours.stop))
            metrics = official.train_step(
                state, batch, augment=crops, schedules=official.SCHEDULES, rule=rule, want_health=True, parallel=spread
            )
            losses.append(metrics.loss)
            norms.append([metrics.grad_norm, metrics.update_ratio, metrics.health.entropy_ratio])
        whole = [whole_of(parameter) for parameter in state.student.parameters()]
        told = {
            "losses": losses,
            "norms": norms,
            "center_sum": state.center_1K.sum().item(),
            "student_abs_sum": sum(tensor.abs().sum().item() for tensor in whole),
        }
        tell(ranks, told)
    return 0


def batch_norm(rows_of_each: str) -> int:
    """Outputs, gradients and statistics of one layer over uneven shares of rows, in float64."""
    from dino_exp.dist.place import place_of
    from dino_exp.dist.ranks import joined
    from dino_exp.models.batch_norm import RankedBatchNorm

    counts = json.loads(rows_of_each)
    generator = torch.Generator().manual_seed(0)
    rows_RH = torch.randn(sum(counts), 5, dtype=torch.float64, generator=generator) * 3 + 7
    slope_RH = torch.randn(sum(counts), 5, dtype=torch.float64, generator=generator)
    with joined(place_of(os.environ), DEVICE, 60) as ranks:
        layer = RankedBatchNorm(5, dtype=torch.float64)
        layer.ranks = ranks
        with torch.no_grad():
            layer.weight.copy_(torch.linspace(0.5, 2, 5))
        first = sum(counts[: ranks.place.rank])
        here = slice(first, first + counts[ranks.place.rank])
        own = rows_RH[here].clone().requires_grad_()
        made = layer(own)
        (made * slope_RH[here]).sum().backward()
        layer(own.detach() * 2)
        gathered = [ranks.gather(tensor, 0).tolist() for tensor in (made.detach(), own.grad)]  # type: ignore[arg-type]
        sums = [ranks.add_(gradient.clone()).tolist() for gradient in (layer.weight.grad, layer.bias.grad)]
        statistics = [layer.running_mean.tolist(), layer.running_var.tolist(), layer.num_batches_tracked.item()]
        same = [ranks.stack(statistic).unique(dim=0).shape[0] for statistic in (layer.running_mean, layer.running_var)]
        tell(ranks, {"made": gathered[0], "input": gathered[1], "sums": sums, "statistics": statistics, "same": same})
    return 0


def one_batch_norm(counts: list[int]) -> dict[str, Any]:
    """The same by torch's own layer, in one process."""
    generator = torch.Generator().manual_seed(0)
    rows_RH = torch.randn(sum(counts), 5, dtype=torch.float64, generator=generator) * 3 + 7
    slope_RH = torch.randn(sum(counts), 5, dtype=torch.float64, generator=generator)
    layer = nn.BatchNorm1d(5, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(0.5, 2, 5))
    own = rows_RH.clone().requires_grad_()
    made = layer(own)
    (made * slope_RH).sum().backward()
    layer(own.detach() * 2)
    statistics = [layer.running_mean.tolist(), layer.running_var.tolist(), layer.num_batches_tracked.item()]
    return {
        "made": made.tolist(),
        "input": own.grad.tolist(),
        "sums": [layer.weight.grad.tolist(), layer.bias.grad.tolist()],
        "statistics": statistics,
    }


def hop(parallel: str, folder: str, attempt: str, step: str) -> int:
    """Load the newest checkpoint into a state that lies over the ranks, and save it again under another step."""
    from dino_exp.checkpoint.manager import CheckpointManager
    from dino_exp.checkpoint.policies import KeepAny, LatestN
    from dino_exp.checkpoint.sharding.member import Member
    from dino_exp.checkpoint.sharding.team import Leader
    from dino_exp.dino.optim import build_optimizer
    from dino_exp.dist.place import place_of
    from dino_exp.dist.ranks import joined
    from dino_exp.training.parallel import Replicated
    from dino_exp.training.sharded import Sharded
    from support.checkpoints import SAVE, request
    from support.tiny_training import build_state

    with joined(place_of(os.environ), DEVICE, 60) as ranks:
        state = build_state()
        if parallel == "ddp":
            Replicated(state.student, state.teacher, ranks)
        else:
            Sharded(state.student, state.teacher, ranks, precision="fp32")
            state.optimizer = build_optimizer("adamw", state.student)
        side = ranks.connect()
        optional = ("optimizer.",)
        if ranks.place.is_first:
            manager = CheckpointManager(
                folder,
                save=SAVE,
                keep=KeepAny((LatestN(9),)),
                attempt=int(attempt),
                writers=Leader(ranks.council, side),
            )
            manager.restore(state, optional=optional)
            manager.save(state, request(int(step)))
            manager.drain()
        else:
            member = Member(folder, ranks.council, side, save=SAVE, attempt=int(attempt))
            member.restore(state, optional=optional)
            member.save(state, request(int(step)))
            member.drain()
        tell(ranks, {"sharded": sum(hasattr(one, "to_local") for one in state.state_dict().values())})
    return 0


def whole_of(tensor: torch.Tensor) -> torch.Tensor:
    full = getattr(tensor, "full_tensor", None)
    return (tensor if full is None else full()).detach()


def tell(ranks: Any, told: dict[str, Any]) -> None:
    if ranks.place.is_first:
        print("TOLD " + json.dumps(told), flush=True)


def train_tiny(folder: str, attempt: str, parallel: str, timeout_secs: str = "20", trouble: str = "") -> int:
    """One attempt at the run of `support.tiny_training` by several processes, written as `Work` and its member do.

    `trouble`: "data 1 5": rank 1 cannot load the images of step 5; "forward 1 5": its forward pass fails there.
    """
    import contextlib

    from dino_exp.attempts.beginning import signals_of
    from dino_exp.checkpoint.manager import CheckpointManager
    from dino_exp.checkpoint.policies import AnyOf, AtEnd, KeepAny, LatestN, OnSignal
    from dino_exp.checkpoint.sharding.member import Member
    from dino_exp.checkpoint.sharding.team import Leader
    from dino_exp.data.loader import BatchStream
    from dino_exp.dino.optim import build_optimizer
    from dino_exp.dist.place import place_of
    from dino_exp.dist.ranks import joined
    from dino_exp.errors import DinoExpError
    from dino_exp.runs.rows import RowCount, RowWriter
    from dino_exp.runs.signals import SignalFlags
    from dino_exp.training.loop import Training, run_training
    from dino_exp.training.parallel import Replicated
    from dino_exp.training.sharded import Sharded
    from support.tiny_training import (
        AUGMENT,
        BATCH,
        PLAN,
        RULE,
        SCHEDULES,
        TRAIN,
        EverySecondStep,
        QuickEvaluator,
        SavedSteps,
        build_state,
    )  # fmt: skip

    torch.set_num_threads(1)
    place, checkpoints = place_of(os.environ), Path(folder) / "checkpoints"
    try:
        with contextlib.ExitStack() as stack:
            flags = stack.enter_context(SignalFlags())
            ranks = stack.enter_context(joined(place, DEVICE, float(timeout_secs)))
            state = build_state()
            if parallel == "ddp":
                spread: Any = Replicated(state.student, state.teacher, ranks)
            else:
                spread = Sharded(state.student, state.teacher, ranks, precision="fp32")
                state.optimizer = build_optimizer("adamw", state.student)
            save, side = AnyOf((EverySecondStep(), AtEnd(), OnSignal())), ranks.connect()
            rows: Any
            if place.is_first:
                manager: Any = CheckpointManager(
                    checkpoints, save=save, keep=KeepAny((LatestN(2),)), attempt=int(attempt), require_finite=True,
                    writers=Leader(ranks.council, side),
                )  # fmt: skip
                rows, position = RowWriter(Path(folder) / "metrics.jsonl"), {"metrics_rows": 0, "metrics_bytes": 0}
                if ranks.from_first(manager.latest_step() is not None):
                    position = dict(manager.restore(state, optional=("optimizer.",)).manifest.aside)
                rows.open_at(position["metrics_rows"], position["metrics_bytes"])
                ranks.from_first(rows.num_rows)
            else:
                manager = Member(checkpoints, ranks.council, side, save=save, attempt=int(attempt), require_finite=True)
                if ranks.from_first(False):
                    manager.restore(state, optional=("optimizer.",))
                rows = RowCount(ranks.from_first(0))
            stream = BatchStream(TRAIN, seed=0, batch_size=BATCH, start_step=state.step, place=place)
            where, who, when = trouble.split() if trouble else ("", "-1", "-1")
            is_mine = int(who) == place.rank

            def batches() -> Any:
                for batch in stream:
                    if is_mine and where == "data" and batch.step == int(when):
                        raise DinoExpError("image 3 could not be loaded")
                    yield batch

            def augment(images: Any, ids: Any, epoch: int) -> Any:
                if is_mine and where == "forward" and state.step + 1 == int(when):
                    raise MemoryError("out of memory")
                return AUGMENT(images, ids, epoch)

            print("BEGUN", flush=True)
            outcome = run_training(
                Training(
                    state=state, batches=batches(), augment=augment, schedules=SCHEDULES, rule=RULE, plan=PLAN,
                    evaluator=QuickEvaluator(AUGMENT.clean),  # type: ignore[arg-type]
                    rows=rows, manager=manager, signals=signals_of(flags, ranks), progress=SavedSteps(), record={},
                    guard=lambda: None, on_row=lambda row, best: None, on_trouble=lambda failure: None,
                    parallel=spread,
                )
            )  # fmt: skip
            print(f"ENDED {outcome.state} {outcome.step}", flush=True)
            return 0 if outcome.signum is None else 128 + outcome.signum
    except (DinoExpError, MemoryError) as error:
        print("ERROR " + "; ".join([str(error), *getattr(error, "__notes__", [])]), flush=True)
        return 1


def fifty_steps(dtype: str) -> int:
    """The losses of fifty steps of the digits recipe, batch norm included."""
    from dino_exp.dist.place import place_of
    from dino_exp.dist.ranks import joined

    with joined(place_of(os.environ), DEVICE, 60) as ranks:
        tell(ranks, {"losses": fifty_losses(dtype, ranks)})
    return 0


def fifty_losses(dtype: str, ranks: Any) -> list[float]:
    from dino_exp import build
    from dino_exp.config.check import config_from_mapping
    from dino_exp.config.compose import compose
    from dino_exp.dino.optim import build_optimizer
    from dino_exp.training.state import TrainState
    from dino_exp.training.step import train_step

    torch.set_num_threads(1)
    kind = getattr(torch, dtype)
    config = config_from_mapping(compose(["experiment=digits", "runtime.parallel=ddp"]))
    data = build.build_data(config.data)
    plan = build.build_plan(config, len(data.train))
    made = build.build_state(config, data.train.channels, DEVICE)
    student, teacher = made.student.to(kind), made.teacher.to(kind)
    state = TrainState(student, teacher, build_optimizer("adamw", student), made.center_1K.to(kind))
    spread = build.spread(config, state, ranks)
    schedules, cut = build.build_schedules(config, plan.steps_per_epoch), build.build_augment(config)

    def augment(images: torch.Tensor, ids: torch.Tensor, epoch: int) -> list[torch.Tensor]:
        return [crop.to(kind) for crop in cut(images, ids, epoch)]

    rule = build.build_rule(config)
    with build.build_batches(config, data.train, 0, ranks.place) as batches:
        return [
            train_step(state, next(batches), augment=augment, schedules=schedules, rule=rule, parallel=spread).loss
            for _ in range(50)
        ]


def fetched_together(address: str, root: str) -> int:
    """The fingerprint that each rank sees of a data set that lies on a server at first."""
    from test_data_fetching import published_at

    from dino_exp.build import Preparation, build_data
    from dino_exp.build import cifar as build_cifar
    from dino_exp.config.check import config_from_mapping
    from dino_exp.config.compose import compose
    from dino_exp.dist import council
    from dino_exp.dist.place import place_of
    from dino_exp.dist.ranks import joined

    build_cifar.COLLECTIONS["cifar10"] = published_at(address)
    council._SIGN_SECS = 0.0  # so that signs of life are given
    words = ["data=cifar10", "augment=dino", f"data.root={root}", "data.download=true"]
    data = config_from_mapping(compose(words)).data
    with joined(place_of(os.environ), DEVICE, 60) as ranks:
        made = build_data(data, Preparation(cache=Path(root) / "cache", ranks=ranks))
        tell(ranks, {"fingerprints": ranks.council.gather("seen", made.train.fingerprint())})
    return 0


def measured_together() -> int:
    """What an evaluator of several ranks measures; all must have the same."""
    from test_training_evaluator import measured

    from dino_exp.dist.place import place_of
    from dino_exp.dist.ranks import joined

    torch.set_num_threads(1)
    with joined(place_of(os.environ), DEVICE, 60) as ranks:
        found = measured(ranks)
        assert ranks.council.gather("found", found) == [found] * ranks.place.size
        tell(ranks, found)
    return 0

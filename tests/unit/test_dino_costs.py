"""What a step costs by formula, against torch's own counters on real steps."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from dino_exp import build
from dino_exp.config.check import config_from_mapping
from dino_exp.config.compose import compose
from dino_exp.config.schema import Config
from dino_exp.data.loader import Batch
from dino_exp.dino.costs import (
    MOMENTS,
    Arithmetic,
    Dimensions,
    backbone_flops,
    forward_flops,
    head_flops,
    step_flops,
    step_memory,
    usual_step_flops,
)
from dino_exp.training.state import TrainState
from dino_exp.training.step import train_step

COLOUR = ("data=synthetic", "augment=dino", "loss=dino", "data.image_size=32", "data.local_size=16")
CPU = torch.device("cpu")
VIT_S = Dimensions(
    channels=3, patch_size=16, embed_dim=384, depth=12, num_heads=6, mlp_dim=1536, head_widths=(384, 2048, 2048, 256),
    head_norms=False, num_prototypes=65536, global_size=224, local_size=96, num_local=8,
)  # fmt: skip


def config(*overrides: str) -> Config:
    return config_from_mapping(compose(overrides))


def dimensions(of: Config, channels: int) -> Dimensions:
    return build.build_dimensions(of, channels)


class Steps:
    """The steps of a training, one by one."""

    def __init__(self, of: Config) -> None:
        data = build.build_data(of.data)
        plan = build.build_plan(of, len(data.train))
        self.channels, self.rule = data.train.channels, build.build_rule(of)
        self.state: TrainState = build.build_state(of, self.channels, CPU)
        build.prepare_layers(of.runtime, self.state)
        self.schedules, self.augment = build.build_schedules(of, plan.steps_per_epoch), build.build_augment(of)
        with build.build_batches(of, data.train, 0) as batches:
            self.batches: list[Batch] = [next(batches) for _ in range(2)]

    def take(self) -> None:
        train_step(
            self.state, self.batches.pop(0), augment=self.augment, schedules=self.schedules, rule=self.rule
        )  # fmt: skip


def test_vit_s_has_the_known_figures() -> None:
    assert usual_step_flops(VIT_S) / 1e9 == pytest.approx(113.8, abs=0.05)
    assert backbone_flops(VIT_S, 224, every_token=True) / 2e9 == pytest.approx(
        4.6, abs=0.05
    )  # as timm counts: 4.6 GMACs
    assert step_flops(VIT_S) / 1e9 == pytest.approx(105.7, abs=0.1)


def test_a_forward_pass_is_what_torch_counts() -> None:
    of = config(*COLOUR, "model=vit_nano", "loss.out_dim=64", "loss.num_layers=2")
    steps = Steps(of)
    crops = steps.augment(steps.batches[0].images.at(slice(0, 3)), torch.arange(3), 0)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        steps.state.student(crops)
    resized = 2 * (16 // 8) ** 2 * (32 // 8) ** 2 * of.model.embed_dim  # the table of positions, once for all images
    assert counter.get_total_flops() == 3 * forward_flops(dimensions(of, 3)) + resized


@pytest.mark.parametrize(
    "overrides",
    [
        ("experiment=digits", "train.batch_size=16"),
        (*COLOUR, "loss.out_dim=512", "train.batch_size=8"),
        ("experiment=digits", "train.batch_size=16", "model.depth=3", "runtime.gradient_checkpointing=true"),
    ],
    ids=["digits", "colour", "twice"],
)
def test_a_step_is_what_torch_counts(overrides: tuple[str, ...]) -> None:
    of = config(*overrides)
    steps = Steps(of)
    with FlopCounterMode(display=False) as augmented:
        steps.augment(steps.batches[0].images, steps.batches[0].sample_ids_B, 0)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        steps.take()
    counted = (counter.get_total_flops() - augmented.get_total_flops()) / of.train.batch_size
    recomputes = of.runtime.gradient_checkpointing
    assert step_flops(dimensions(of, steps.channels), recomputes=recomputes) == pytest.approx(counted, rel=0.005)


def test_parts_add_up() -> None:
    two = forward_flops(VIT_S, num_local=0)
    assert two == 2 * (backbone_flops(VIT_S, 224) + head_flops(VIT_S))
    assert step_flops(VIT_S) < usual_step_flops(VIT_S)


@pytest.mark.parametrize(
    "overrides",
    [
        ("experiment=digits",),
        ("experiment=digits", "train.batch_size=128", "train.precision=bf16"),
        ("experiment=digits", "optimizer=sgd", "loss.out_dim=8192"),
        (*COLOUR, "train.batch_size=16", "loss.out_dim=16384"),
        ("experiment=digits", "model.depth=6", "runtime.gradient_checkpointing=true"),
        (*COLOUR, "model=vit_t", "train.batch_size=16", "train.accumulate=4", "loss.out_dim=8192", "loss.use_bn=false"),
    ],
    ids=["nano", "half", "many prototypes", "colour", "twice", "in parts"],
)
def test_the_memory_of_a_step_is_as_measured(overrides: tuple[str, ...]) -> None:
    of = config(*overrides)
    steps = Steps(of)
    steps.take()  # moments exist from here on
    steps.state.optimizer.zero_grad(set_to_none=True)
    lasting = sum(value.numel() * value.element_size() for value in tensors_of(steps.state))
    counts = [(one.numel(), one.requires_grad) for one in steps.state.student.parameters()]
    estimate = step_memory(
        dimensions(of, steps.channels),
        Arithmetic(
            half=of.train.precision == "bf16",
            written_out=of.train.precision == "bf16",
            recomputes=of.runtime.gradient_checkpointing,
            in_parts=of.train.accumulate > 1,
        ),
        num_parameters=sum(count for count, _ in counts),
        num_trained=sum(count for count, trained in counts if trained),
        batch_size=of.train.batch_size // of.train.accumulate,
        moments=MOMENTS[of.optimizer.name],
    )
    assert estimate.lasting == pytest.approx(lasting, rel=0.02)
    assert estimate.peak == pytest.approx(lasting + peak_of(steps), rel=0.12)


def tensors_of(state: TrainState) -> list[torch.Tensor]:
    return [value for value in state.state_dict().values() if isinstance(value, torch.Tensor)]


def peak_of(steps: Steps) -> int:
    """The most bytes of tensors that the next step holds at once, beyond what was there before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        steps.take()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak

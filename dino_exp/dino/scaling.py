"""Loss scaling, without which small gradients vanish in float16 (Micikevicius et al. 2018, section 3.2).

The rule is that of torch's GradScaler; here its state lies in two tensors, which a checkpoint holds like any other, and
nobody waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}  # by the names of `train.precision`
FIRST_SCALE = 65536.0
GROWTH, BACKOFF = 2.0, 0.5
GROWTH_STEPS = 2000  # so many steps without an overflow, and the scale is doubled
LEAST_SCALE = 1.0  # below it nothing is scaled any more: the gradients themselves are infinite


class LossScaler:
    """What the loss is multiplied by (`scale`), and how many steps in a row had finite gradients (`good_steps`)."""

    def __init__(self, device: torch.device) -> None:
        self.scale = torch.full((), FIRST_SCALE, device=device)
        self.good_steps = torch.zeros((), device=device)

    def state(self) -> dict[str, Tensor]:
        """The live tensors by name."""
        return {"scale": self.scale, "good_steps": self.good_steps}

    @torch.no_grad()
    def update_(self, finite: Tensor, applies: Tensor) -> None:
        """After a step whose gradients were `finite` or not; nothing changes unless the step `applies`."""
        good = torch.where(finite, self.good_steps + 1, 0.0)
        grows = good >= GROWTH_STEPS
        scale = torch.where(finite, torch.where(grows, self.scale * GROWTH, self.scale), self.scale * BACKOFF)
        self.scale.copy_(torch.where(applies, scale, self.scale))
        self.good_steps.copy_(torch.where(applies, good.masked_fill(grows, 0.0), self.good_steps))

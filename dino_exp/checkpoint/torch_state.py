"""The state of a plain PyTorch loop by names: a model's tensors, and an optimizer's moments by parameter.

Not torch's own helpers for optimizers: `get_optimizer_state_dict` makes a hidden step before the first one, and
`set_optimizer_state_dict` fails where some parameters have no moments yet.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from dino_exp.errors import CheckpointError

OPTIMIZER = "optimizer."
_MODEL = "model."
_MOMENTS: Mapping[type, Set[str]] = {AdamW: {"step", "exp_avg", "exp_avg_sq"}, SGD: {"momentum_buffer"}}
_AMSGRAD = {"max_exp_avg_sq"}


class TorchState:
    """A model, its optimizer and some JSON values (`step`, what a scheduler needs) as one `Stateful`.

    Moments may be absent on one side: restore with `optional=(OPTIMIZER,)`. Learning rates and other settings of the
    optimizer are not part of it: they belong to the settings, or to a schedule that is a function of the step.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, **values: Any) -> None:
        self.model, self.optimizer, self.values = model, optimizer, values

    def state_dict(self) -> dict[str, Any]:
        """Live tensors under `model.` and `optimizer.`, and the values under their own names."""
        tensors = {_MODEL + name: value for name, value in self.model.state_dict().items()}
        moments = optimizer_moments(self.optimizer, dict(self.model.named_parameters()))
        return {**tensors, **{OPTIMIZER + name: value for name, value in moments.items()}, **self.values}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave, in place.

        Raises CheckpointError for moments that do not fit, and then nothing was touched.
        """
        moments = {name.removeprefix(OPTIMIZER): state[name] for name in state if name.startswith(OPTIMIZER)}
        load_moments(self.optimizer, dict(self.model.named_parameters()), moments)
        for name, tensor in self.model.state_dict().items():
            tensor.copy_(state[_MODEL + name])
        self.values.update({name: state[name] for name in self.values})


def optimizer_moments(optimizer: Optimizer, named_parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The live moments as `<parameter>.<moment>`, for example `backbone.norm.weight.exp_avg`.

    A parameter that was never updated (a frozen last layer) has none, and none is made for it.
    """
    return {
        f"{name}.{moment}": value
        for name, parameter in named_parameters.items()
        for moment, value in optimizer.state.get(parameter, {}).items()
        if value is not None
    }


def load_moments(
    optimizer: Optimizer, named_parameters: Mapping[str, nn.Parameter], moments: Mapping[str, Tensor]
) -> None:
    """Make copies of `moments` the optimizer's whole state; parameters without any are left without.

    The inverse of `optimizer_moments`, for a fresh optimizer or a used one. One that is not torch's AdamW or SGD may
    say in `moment_names` which moments a parameter has; otherwise they are taken as they come. Raises CheckpointError,
    changing nothing, for a moment of no trained parameter, an incomplete set, or another shape or type.
    """
    grouped: dict[str, dict[str, Tensor]] = {}
    for full_name, value in moments.items():
        name, _, moment = full_name.rpartition(".")
        grouped.setdefault(name, {})[moment] = value
    group_of = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    problems = []
    for name, found in grouped.items():
        parameter = named_parameters.get(name)
        if parameter is None or id(parameter) not in group_of:
            problems.append(f"{name}: no trained parameter of this name")
        else:
            problems += _problems(name, parameter, found, _expected(optimizer, group_of[id(parameter)]))
    if problems:
        raise CheckpointError(
            f"optimizer moments do not fit the model: {'; '.join(problems[:5])} ({len(problems)} problems); "
            "was the checkpoint written for this model and optimizer?"
        )
    optimizer.state.clear()
    for name, found in grouped.items():
        optimizer.state[named_parameters[name]] = _copied(optimizer, named_parameters[name], found)


def _expected(optimizer: Optimizer, group: Mapping[str, Any]) -> Set[str] | None:
    """The moments of a parameter in this group; None where nobody here knows."""
    names: Set[str] | None = _MOMENTS.get(type(optimizer), getattr(optimizer, "moment_names", None))
    return names | _AMSGRAD if names is not None and group.get("amsgrad") else names


def _problems(name: str, parameter: Tensor, found: dict[str, Tensor], expected: Set[str] | None) -> list[str]:
    if expected is None:  # an optimizer that is not known here knows its own moments
        return []
    if set(found) != expected:
        return [f"{name}: expected moments {sorted(expected)}, found {sorted(found)}"]
    problems = []
    for moment, value in found.items():
        # The count of steps is of torch's default type, which may have been another one.
        count_type = value.dtype if value.is_floating_point() else torch.float32
        want = ((), count_type) if moment == "step" else (tuple(parameter.shape), parameter.dtype)
        if want != (tuple(value.shape), value.dtype):
            problems.append(f"{name}.{moment}: expected {want}, found {tuple(value.shape)}, {value.dtype}")
    return problems


def _copied(optimizer: Optimizer, parameter: Tensor, found: dict[str, Tensor]) -> dict[str, Tensor]:
    # AdamW counts steps on the CPU unless it is fused; elsewhere each step would wait for the device.
    step_device = parameter.device if optimizer.defaults.get("fused") else torch.device("cpu")
    return {
        moment: value.to(step_device if moment == "step" else parameter.device, copy=True)
        for moment, value in found.items()
    }

"""Steps whose loss or gradient is not finite: skipped, counted, explained."""

import math

import speechbrain as sb
import torch
from torch.optim import SGD, Adam


class NonFiniteGuard:
    """Steps optimisers only on finite gradients, and ends hopeless runs.

    One NaN gradient would leave every weight NaN, and SpeechBrain would train
    on to a normal end. So many steps in a row as `patience` may be skipped.
    """

    def __init__(self, patience: int):
        self.patience = patience
        self.in_a_row = 0

    def step(
        self,
        optimizer: torch.optim.Optimizer,
        max_grad_norm: float = math.inf,
        limit: float | None = None,
    ) -> torch.Tensor:
        """Clips the gradient and steps, unless the gradient is not finite.

        With a limit each gradient is first shortened to that norm, but those of
        groups that have `clip_each`, False.

        torch's fused Adam and SGD decide that on the device. For others the
        host waits for the gradient's norm. Returns 1 if the step was skipped,
        or 0, as a scalar on the device.
        """
        parameters = [
            parameter
            for group in optimizer.param_groups
            for parameter in group["params"]
        ]
        if limit is not None:
            clip_each(
                [
                    parameter.grad
                    for group in optimizer.param_groups
                    if group.get("clip_each", True)
                    for parameter in group["params"]
                    if parameter.grad is not None
                ],
                limit,
            )
        norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
        skipped = (~norm.isfinite()).float()
        if isinstance(optimizer, Adam | SGD) and optimizer.defaults.get(
            "fused"
        ):
            if isinstance(optimizer, SGD):
                begin_momentum(optimizer)
            optimizer.found_inf = skipped
            optimizer.step()
        elif not skipped:
            optimizer.step()
        optimizer.zero_grad()
        return skipped

    def count(self, skipped: torch.Tensor) -> None:
        """Counts a step: 1 if it was skipped, or 0, on the device."""
        self.in_a_row = (self.in_a_row + 1) * skipped

    def check(self, brain: sb.Brain) -> None:
        """Ends the run if too many steps in a row were skipped.

        The ValueError says how training went until then, and what to try.
        """
        skipped = int(self.in_a_row)
        if skipped <= self.patience:
            return
        broken = [
            name
            for name, module in brain.modules.items()
            if not all(p.isfinite().all() for p in module.parameters())
        ]
        lr = brain.optimizer.param_groups[0]["lr"]
        none = skipped >= brain.step  # of the epoch's steps was finite
        remedy = f"a lower lr, which is {lr:.2g} here"
        if brain.precision != "fp32":
            remedy += ", or --precision=fp32"
        if broken and none and brain.epoch == 1:
            advice = (
                f"The weights of {', '.join(broken)} are not finite: they were "
                "so when loaded. Begin with other weights "
                "(pretrained_encoder)."
            )
        elif broken:
            advice = (
                f"An earlier step made the weights of {', '.join(broken)} "
                f"infinite. Begin anew with {remedy}."
            )
        elif none:
            advice = f"No step of the epoch was finite. Try {remedy}."
        else:
            advice = (
                f"The epoch's other steps had a mean loss of "
                f"{float(brain.tally.average):.4g}. Try {remedy}."
            )
        raise ValueError(
            f"The last {skipped} steps, up to step {brain.step} of epoch "
            f"{brain.epoch}, had a loss or a gradient that is not finite, more "
            f"in a row than the {self.patience} that "
            "--nonfinite_patience allows. None of them changed a parameter. "
            f"{advice}"
        )


def begin_momentum(optimizer: SGD) -> None:
    """Gives parameters with a gradient a momentum of zero, if they have none.

    torch would allocate it without a value, and a first step that is skipped
    leaves it so: the second would add whatever the memory held.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            state = optimizer.state[parameter]
            if parameter.grad is not None:
                if state.get("momentum_buffer") is None:
                    state["momentum_buffer"] = torch.zeros_like(parameter)


def clip_each(gradients: list[torch.Tensor], limit: float) -> None:
    """Shortens each gradient to a norm of `limit` at most, in place.

    As `torch.nn.utils.clip_grad_norm_` of one parameter after the other, whose
    launches would take a GPU's host longer than the step.
    """
    norms = torch.stack(torch._foreach_norm(gradients))
    shares = (limit / (norms + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(gradients, shares.unbind())

"""Skips, counts and explains steps whose loss or gradient is not finite."""

import math

import speechbrain as sb
import torch
from torch.optim import SGD, Adam


class NonFiniteGuard:
    """Steps optimisers only on finite gradients, and ends hopeless runs.

    One NaN gradient would make every weight NaN, and SpeechBrain would train on
    to a normal end. At most `patience` steps in a row may be skipped.
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

        With a `limit` each parameter's gradient is first clipped to that norm,
        except in groups whose `clip_each` is False.

        Returns a scalar on the device: 1 if the step was skipped, otherwise 0.
        torch's fused Adam and SGD skip on the device. For other optimisers the
        host waits for the gradient's norm.
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
        """Counts skipped steps in a row; `skipped` is 1 or 0, on the device."""
        self.in_a_row = (self.in_a_row + 1) * skipped

    def check(self, brain: sb.Brain) -> None:
        """Ends the run if too many steps in a row were skipped.

        Raises ValueError, which says how training went so far, and what to try.
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
        all_skipped = skipped >= brain.step  # in this epoch
        remedy = f"a lower lr, which is {lr:.2g} here"
        if brain.precision != "fp32":
            remedy += ", or --precision=fp32"
        if broken and all_skipped and brain.epoch == 1:
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
        elif all_skipped:
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
    """Gives parameters that have a gradient a zero momentum, if they have none.

    torch allocates the momentum without a value, and a skipped first step
    leaves it so. The second step would then add arbitrary memory.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            state = optimizer.state[parameter]
            if parameter.grad is not None:
                if state.get("momentum_buffer") is None:
                    state["momentum_buffer"] = torch.zeros_like(parameter)


def clip_each(gradients: list[torch.Tensor], limit: float) -> None:
    """Clips each gradient to a norm of at most `limit`, in place.

    The result is that of `torch.nn.utils.clip_grad_norm_` on each parameter in
    turn, whose kernel launches would take a GPU's host longer than the step.
    """
    norms = torch.stack(torch._foreach_norm(gradients))
    shares = (limit / (norms + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(gradients, shares.unbind())

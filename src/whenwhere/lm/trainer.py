"""Routed models under the `Trainer` of `transformers`."""

from typing import Any

from torch import nn
from transformers import TrainerCallback

from .losses import set_step


class StepCallback(TrainerCallback):  # type: ignore[misc]
    """Tells a routed model at which step of how many its training is, also after a resumption; see `set_step`.

    Needed where β is scheduled, as by default in STT:

        Trainer(model, arguments, train_dataset=texts, callbacks=[lm.StepCallback()])
    """

    def on_step_begin(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **more: Any) -> None:
        """Before every update, once for all of its micro-batches."""
        del args, control, more
        assert model is not None
        set_step(model, state.global_step, state.max_steps)

"""Ways in which a generation ends early, as functions of a case and its pipeline."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
from diffusers import DiffusionPipeline
from pipelines import CASES, build, run
from torch import nn

STEPS = 6

Interruption = Callable[..., None]  # of a case, its pipeline, and whether that runs with guidance


def can_be_interrupted(interruption: str, case: str) -> bool:
    """Callbacks are missing from some pipelines, and some that have them do not heed `_interrupt`."""
    kind = type(build(case))
    return "callback" not in interruption or (
        hasattr(kind, "_callback_tensor_inputs") and (interruption != "callback abort" or hasattr(kind, "interrupt"))
    )


def _by_error_in_a_block(error: type[BaseException]) -> Interruption:
    """Fail when the last module of the network that has weights is called for the third time."""

    def interrupt(case: str, pipe: DiffusionPipeline, guidance: bool = True) -> None:
        network = getattr(pipe, CASES[case].denoiser)
        calls: list[int] = []

        def fail(*_: object) -> None:
            calls.append(1)
            if len(calls) == 3:
                raise error("in the middle")

        innermost = [m for m in network.modules() if isinstance(m, nn.Linear | nn.Conv2d)][-1]
        handle = innermost.register_forward_pre_hook(fail)
        with pytest.raises(error, match="in the middle"):
            run(case, pipe, steps=STEPS, guidance=guidance)
        handle.remove()

    return interrupt


def _by_error_in_a_callback(case: str, pipe: DiffusionPipeline, guidance: bool = True) -> None:
    def fail(_: object, step: int, *__: object) -> dict[str, Any]:
        if step == 2:
            raise ArithmeticError("in the middle")
        return {}

    with pytest.raises(ArithmeticError, match="in the middle"):
        run(case, pipe, steps=STEPS, guidance=guidance, callback=fail)


def _by_abort(case: str, pipe: DiffusionPipeline, guidance: bool = True) -> None:
    seen = []

    def abort(pipe: Any, step: int, *_: object) -> dict[str, Any]:
        seen.append(step)
        pipe._interrupt = step == 2
        return {}

    run(case, pipe, steps=STEPS, guidance=guidance, callback=abort)
    assert seen[-1] == 2


INTERRUPTIONS: Mapping[str, Interruption] = {
    "error": _by_error_in_a_block(ArithmeticError),
    "keyboard interrupt": _by_error_in_a_block(KeyboardInterrupt),
    "callback error": _by_error_in_a_callback,
    "callback abort": _by_abort,
}

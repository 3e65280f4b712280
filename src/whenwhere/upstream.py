"""Caches of diffusers itself, put on a denoiser and taken off without a trace: what `Upstream` needs.

They are hooks on modules. diffusers tells them of a new generation only if the one before ended well, and of the call
they are in only in some pipelines; both are told here, at the denoiser. Configurations are named by string, so
diffusers is imported only where one is given.
"""

import copy
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from .clock import Step
from .decision import Call, Decision, Output, Slot

# The configurations of diffusers, each with the function that applies it.
CONFIGURATIONS = {
    "FirstBlockCacheConfig": "apply_first_block_cache",
    "MagCacheConfig": "apply_mag_cache",
    "PyramidAttentionBroadcastConfig": "apply_pyramid_attention_broadcast",
    "TaylorSeerCacheConfig": "apply_taylorseer_cache",
}

_IN_TURNS = "its blocks over space and over time take turns and hand on tensors of different shapes"
# What diffusers puts on without a word and then fails with in the first steps, and why.
FAILING = {
    ("FirstBlockCacheConfig", "SD3Transformer2DModel"): "its last block returns no text to take a difference of",
    ("FirstBlockCacheConfig", "LatteTransformer3DModel"): _IN_TURNS,
    ("MagCacheConfig", "LatteTransformer3DModel"): _IN_TURNS,
}


def configuration(name: str) -> Callable[..., object] | None:
    """The class of a configuration by its name in any case, with or without "Config"; `None` if it is none."""
    names = {known.lower(): known for known in CONFIGURATIONS}
    found = names.get(name.lower(), names.get(f"{name.lower()}config"))
    if found is None:
        return None
    made: Callable[..., object] = getattr(importlib.import_module("diffusers"), found)
    return made


def put_on(denoiser: nn.Module, config: Any, present: Callable[[], Step]) -> Callable[[], None]:
    """Apply a configuration; the answer takes it off again, so that every module is as it was found.

    Args:
        denoiser: whose modules get hooks.
        config: one of `CONFIGURATIONS`.
        present: the step that is running, for those that ask for its timestep.

    Raises:
        ValueError: diffusers refuses the model, or attaches nothing to it and says nothing.
    """
    before = {module: _state_of(module) for module in denoiser.modules()}
    name = type(config).__name__
    config = copy.copy(config)
    if getattr(config, "current_timestep_callback", 0) is None:
        config.current_timestep_callback = lambda: present().timestep

    def take_off() -> None:
        for module, state in before.items():
            _restore(module, *state)

    try:
        getattr(importlib.import_module("diffusers.hooks"), CONFIGURATIONS[name])(denoiser, config)
    except Exception as error:
        take_off()
        raise ValueError(f"{name} does not fit {type(denoiser).__name__}, says diffusers: {error!r}") from error
    if not any(_names_of(module) - set(names) for module, (_, names, _) in before.items()):
        take_off()
        raise ValueError(
            f"{name} attaches nothing to {type(denoiser).__name__}, and diffusers says nothing: the names it looks for "
            "are in its configuration (identifiers, use_lite_mode). FORA and DeltaDiT work on every transformer."
        )
    registry = _registry_of(denoiser)
    if registry is not None:
        registry.invalidate_child_registries_cache()
    return take_off


def _registry_of(module: nn.Module) -> Any:
    return vars(module).get("_diffusers_hook")


def _names_of(module: nn.Module) -> set[str]:
    registry = _registry_of(module)
    return set() if registry is None else set(registry.hooks)


def _state_of(module: nn.Module) -> tuple[bool, tuple[str, ...], Any]:
    """Whether there is a registry of hooks, their names, and the forward of the instance."""
    return _registry_of(module) is not None, tuple(_names_of(module)), vars(module).get("forward")


def _restore(module: nn.Module, registered: bool, names: tuple[str, ...], forward: Any) -> None:
    registry = _registry_of(module)
    if registry is None:
        return
    for name in reversed(list(registry.hooks)):
        if name not in names:
            registry.remove_hook(name, recurse=False)
    registry.invalidate_child_registries_cache()
    if not registered:
        del vars(module)["_diffusers_hook"]
    if forward is None:
        vars(module).pop("forward", None)
    else:
        vars(module)["forward"] = forward


def reset(denoiser: nn.Module) -> None:
    """Let all hooks forget what they remember."""
    for module in denoiser.modules():
        registry = _registry_of(module)
        if registry is not None:
            registry.reset_stateful_hooks(recurse=False)


@contextmanager
def in_context(denoiser: nn.Module, step: Step) -> Iterator[None]:
    """Tell the hooks which call they are in; each of several separate calls within a step has a state of its own."""
    mixin: Any = importlib.import_module("diffusers").CacheMixin
    with mixin.cache_context(denoiser, f"pass {step.pass_}"):
        yield


@dataclass(frozen=True, slots=True)
class InContext(Decision):
    """Run the denoiser with its hooks knowing which call it is.

    Attributes:
        renew: whether they forget what they remember, so that everything is computed.
    """

    renew: bool

    symbol: ClassVar[str] = "#"
    name: ClassVar[str] = "computed"
    neutral: ClassVar[bool] = True

    def apply(self, call: Call, slot: Slot) -> Output:  # noqa: ARG002
        """Reset where a generation begins, or the batch changes; run."""
        assert call.module is not None
        rows = call.notes.setdefault("rows", {})
        changed = rows.get(call.step.pass_, len(call.tokens)) != len(call.tokens)
        rows[call.step.pass_] = len(call.tokens)
        if self.renew or changed:
            reset(call.module)
        with in_context(call.module, call.step):
            return call.run()

    def fresh(self) -> Decision:
        """Forget, and compute everything."""
        return InContext(renew=True)


@dataclass(frozen=True, slots=True)
class Skipped(Decision):
    """What a trace says of a site that a hook did not run; never planned."""

    symbol: ClassVar[str] = "."
    name: ClassVar[str] = "skipped by diffusers"
    stops: ClassVar[bool] = True

    def apply(self, call: Call, slot: Slot) -> Output:
        """It is written down, not carried out."""
        raise NotImplementedError

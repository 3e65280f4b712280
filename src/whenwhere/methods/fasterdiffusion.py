"""Faster Diffusion: rethinking the role of the encoder for diffusion model inference (Li et al., NeurIPS 2024,
https://arxiv.org/abs/2312.09608).

From step to step the encoder of a U-Net puts out nearly the same, the decoder does not. So the encoder and the middle
run at key steps only, and every step in between decodes what they put out, with its own time embedding and text. As
such a step does not look at the latents, the decoders of several steps can run in one batch. A little of the initial
noise, added to the late latents, brings texture back.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import nn

from ..attach import attach
from ..clock import Step
from ..decision import Compute, Decision, Reuse, outline, whole
from ..decisions.ahead import Again, Ahead, Handed, Once
from ..decisions.encoderchange import EncoderNotes, EncoderRecorder
from ..decisions.keysteps import PRESETS, Keys, Rule, ascending, chosen, rescaled, spread_by_change
from ..decisions.prior import Inject, Prior
from ..method import Method, Setting
from ..ranges import at_least, one_of
from ..site import Kind, Side, Site

__all__ = ["PRESETS", "FasterDiffusion", "rescaled"]


@dataclass(frozen=True)
class FasterDiffusion(Method):
    """Faster Diffusion.

    Attributes:
        every: n, at least 1: without `keys`, every n-th step is a key step; 1 makes all of them one.
        keys: the key steps, ascending from 0; or the name of a preset (see `PRESETS`), for its number of steps only;
            or a function that gives them for a number of steps, such as
            `lambda steps: rescaled("sd-50", steps)`, which moves a preset. It must always give the same.
        alpha: at least 0: the share of the initial noise that is added to the latents before every late step; 0 is off.
        start: in (0, 1): where lateness begins, as a fraction of the executed schedule.
        split: for models without skip connections: how many blocks make the encoder. Experimental: the paper reports
            18 of DiT-XL's 28, without code.
        batch_cap: at least 1: the decoders of at most so many steps run in one batch; 1 runs them one by one.
        noise_last: add the noise of a step after its network has run, as the authors' parallel form does.

    Raises:
        ValueError: a field out of range, here or when the model and the number of steps are known.
        TypeError: a field of the wrong type.
    """

    every: int = 4
    keys: Keys = ()
    alpha: float = 0.003
    start: float = 0.5
    split: int = 0
    batch_cap: int = 1
    noise_last: bool = False

    kinds: ClassVar = frozenset({Kind.MODEL, Kind.STEM, Kind.STAGE, Kind.BLOCK, Kind.CONTROL, Kind.SCHEDULER})
    reads_timestep: ClassVar = True  # the decoders of the steps ahead need theirs
    idle_reason: ClassVar = "every step is a key step; choose a larger `every`, or fewer `keys`."

    def __post_init__(self) -> None:
        at_least(1, every=self.every, batch_cap=self.batch_cap)
        at_least(0, split=self.split)
        one_of("noise_last", self.noise_last, (False, True))
        if isinstance(self.keys, str):
            one_of("keys", self.keys, tuple(PRESETS))
        elif callable(self.keys):
            object.__setattr__(self, "keys", self.keys if isinstance(self.keys, Rule) else Rule(self.keys))
        else:
            object.__setattr__(self, "keys", ascending(tuple(self.keys)) if len(self.keys) else ())
        if not self.alpha >= 0:
            raise ValueError(f"alpha must be at least 0, got {self.alpha}")
        if not 0 < self.start < 1:
            raise ValueError(f"start must be a fraction of the schedule between 0 and 1, got {self.start}")

    @classmethod
    def measured(
        cls, pipe: Any, generate: Callable[[], object], threshold: float, guidance: bool | None = None, **fields: Any
    ) -> Self:
        """The method with key steps chosen by how much the encoder's outputs change in plain runs (equation 2).

        A step is a key step where the changes since the last one add up to more than the threshold at any resolution;
        the paper names a threshold and no rule. The keys are for this number of steps.

        Args:
            pipe: as for `attach`.
            generate: calls the pipeline as it will be used; prompts and seeds should vary (the paper took 100).
            threshold: at least 0, in squared units of the features.
            guidance: as for `attach`.
            fields: the other fields.

        Raises:
            ValueError: a negative threshold, no encoder, or runs that are not whole or differ in length.
        """
        notes = EncoderNotes()
        with attach(pipe, EncoderRecorder(notes), guidance=guidance):
            generate()
        return cls(keys=spread_by_change(notes.changes(), threshold), **fields)

    def asks(self, site: Site) -> bool:
        """The encoder and the middle; beside them what the settings need."""
        if site.kind is Kind.SCHEDULER:
            return self.alpha > 0
        if site.kind is Kind.MODEL:
            return self.batch_cap > 1
        return site.kind is Kind.CONTROL or (site.kind in self.kinds and self._encodes(site))

    def _encodes(self, site: Site) -> bool:
        if site.side is not None:
            return site.side is not Side.DECODER
        return site.kind is Kind.BLOCK and site.block is not None and site.block < self.split

    def check(self, sites: Sequence[Site], model: str) -> None:
        """A model has an encoder and a decoder, or is given them by `split`; a recall needs a decoder left."""
        joined = any(site.side is Side.DECODER for site in sites)
        if joined and self.split:
            raise ValueError(f"{self}: skip connections tell where the encoder of {model} ends; leave split at 0.")
        if joined:
            return
        if any(site.kind is Kind.JOINT_ATTENTION for site in sites):
            raise ValueError(f"{self}: {model} has neither skip connections nor a published split. FORA works on it.")
        blocks = max((site.blocks for site in sites), default=0)
        if not 0 < self.split < blocks:
            raise ValueError(
                f"{self}: {model} has no skip connections that would tell an encoder from a decoder. Name the blocks "
                f"that make the encoder by split, 1 to {blocks - 1} (experimental), or use FORA or DeltaDiT."
            )

    def conflict(self, other: Method, sites: Sequence[Site]) -> str:
        """Several steps in one call leave nobody else a say in each of them."""
        if self.batch_cap > 1:
            return (
                "it runs the decoders of several steps in one call, where others cannot decide step by step; set "
                "batch_cap=1."
            )
        return super().conflict(other, sites)

    def fit(self, denoiser: nn.Module, pipe: object = None) -> Self:  # noqa: ARG002
        """Refuse adapters, whose residuals are added to the encoder's outputs in place, and so to what is kept."""
        if getattr(pipe, "adapter", None) is not None:
            raise ValueError(f"{self} cannot keep what a T2I-Adapter changes in place; DeepCache works with adapters.")
        return self

    def review(self, setting: Setting) -> None:
        """The key steps must fit; what starts from a picture has no initial noise to add."""
        self.schedule(setting.steps)
        if self.alpha and setting.skipped:
            raise ValueError(
                f"{self}: this run starts from a picture ({setting.skipped} steps are skipped), so its first latents "
                "are no pure noise, and adding them again would add the picture. Set alpha=0."
            )

    def schedule(self, steps: int) -> tuple[int, ...]:
        """The key steps among this many.

        Raises:
            ValueError: a key beyond the last step, a preset for another number of steps, or a function's answer that
                is no set of key steps.
        """
        return chosen(self.keys, self.every, steps)

    def decide(self, site: Site, step: Step) -> Decision | None:
        """Key steps run the encoder and keep, the others recall; several decoders may run ahead."""
        if site.kind is Kind.SCHEDULER:
            return self._noise(step, step.branches if site.branched else 1)
        keys = (*self.schedule(step.count), step.count)
        following = bisect_right(keys, step.index)
        behind = step.index - keys[following - 1]  # steps since the last key step
        place, width = behind % self.batch_cap, min(self.batch_cap, keys[following] - step.index)
        if site.kind is Kind.MODEL and place:
            return Handed(place)
        if site.kind is Kind.MODEL:
            return Ahead(step.timesteps[step.index : step.index + width]) if width > 1 else None
        carries = site.side is Side.ENCODER or site.carries or site.block == self.split - 1
        keep = whole if carries or site.kind is Kind.CONTROL else outline
        if site.kind is Kind.CONTROL or width == 1 or place:
            return Reuse(keep) if behind else Compute(keep)
        return Again(width, keep) if behind else Once(width, keep)

    def _noise(self, step: Step, branches: int) -> Decision | None:
        """After every step whose successor is late, or into every late one. The first starts from the initial noise."""
        late = max(1, round(self.start * step.count))
        due = step.index >= late if self.noise_last else step.index + 1 >= late and not step.last
        if step.index == 0 and step.count > 1:
            return Prior(self.alpha if due else 0.0, branches=branches)
        return Inject(self.alpha, self.noise_last) if due else None

"""What all routed methods have in common: their parameters.

Names and defaults follow Mixture-of-Depths (Raposo et al., 2024, https://arxiv.org/abs/2404.02258) and the routed
layers of the Subjective Depth and Timescale Transformers, which share its machinery.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Literal, Self

from torch import Tensor

from ..ranges import at_least, one_of
from .gates import GATES, Gate
from .networks import Guess, Student
from .router import Router
from .select import as_fraction
from .tokens import Tokens

Scope = Literal["block", "attention", "mlp"]
CacheOverflow = Literal["error", "force_skip", "evict_oldest"]
KVScope = Literal["selected", "all", "reuse"]
DecodeRouting = Literal["router", "student", "all", "none"]
PrefillRouting = Literal["threshold", "topk"]
TrainingOutput = Literal["gated", "dense", "masked"]
DecodeCompute = Literal["branch", "gather", "masked"]


@dataclass(frozen=True, kw_only=True)
class Routing(ABC):
    """The shared parameters of MoD, SDT and STT.

    Attributes:
        capacity: γ in (0, 1], the share of tokens a routed layer processes; one number, or one per routed layer.
        routed_layers: R, counted from 0; empty for every second layer: 1, 3, 5, ... Layer 0 stays dense.
        gate: the weight of the change: the router's own ("raw", "sigmoid" or "soft"), 1 with the router's gradient
            ("ste"), or 1 without any ("hard").
        always_run: places in the text that are always selected, counted in k; "first" is (0,). The first token is an
            anchor of attention in pretrained models.
        scope: what is routed: the whole "block", or its "attention" or "mlp" alone while the other half processes all
            tokens. The change of a token is then that of the half, and the stream in front of it is what is scored.
        kv_scope: whose keys and values a routed layer has: those of "selected" tokens, of "all" tokens, or those of
            selected ones, where a skipped token stands for another look at the last selected one ("reuse").
        student: the network that imitates the router, for decoding; "none" builds nothing.
        student_weight: λ_student.
        decode_routing: who decides in evaluation, by a threshold: the "router", the "student", or nobody.
        prefill_routing: whether a prompt is routed as in decoding, by "threshold", or by "topk" over all of it.
        decode_compute: how tokens of a step are processed: all or nothing ("branch"), only the sequences that
            need it ("gather"), or always everything ("masked", whose shapes do not depend on the data).
        cache_slots: how many entries a sequence has in the cache of a routed layer at most; 0 for as many as it needs.
        cache_overflow: when they are full: an "error", tokens are skipped ("force_skip"), or the oldest entry makes
            place ("evict_oldest").

    Raises:
        ValueError: something is out of range.
    """

    capacity: float | tuple[float, ...] = 0.5
    routed_layers: tuple[int, ...] = ()
    gate: Gate = "ste"
    always_run: tuple[int, ...] | Literal["first"] = ()
    scope: Scope = "block"
    kv_scope: KVScope = "selected"
    student: Student = "mlp"
    student_weight: float = 0.01
    decode_routing: DecodeRouting = "router"
    prefill_routing: PrefillRouting = "threshold"
    decode_compute: DecodeCompute = "gather"
    cache_slots: int = 0
    cache_overflow: CacheOverflow = "error"

    gates: ClassVar[tuple[str, ...]] = GATES

    def __post_init__(self) -> None:
        one_of("gate", self.gate, self.gates)
        one_of("scope", self.scope, ("block", "attention", "mlp"))
        one_of("kv_scope", self.kv_scope, ("selected", "all", "reuse"))
        one_of("student", self.student, ("none", "mlp", "linear2"))
        one_of("decode_routing", self.decode_routing, ("router", "student", "all", "none"))
        one_of("prefill_routing", self.prefill_routing, ("threshold", "topk"))
        one_of("decode_compute", self.decode_compute, ("branch", "gather", "masked"))
        one_of("cache_overflow", self.cache_overflow, ("error", "force_skip", "evict_oldest"))
        at_least(0, cache_slots=self.cache_slots)
        if self.cache_slots and (self.scope == "mlp" or self.kv_scope != "selected"):
            raise ValueError("cache_slots bounds the entries of selected tokens; it needs kv_scope='selected', no mlp.")
        for share in self.capacity if isinstance(self.capacity, tuple) else (self.capacity,):
            as_fraction(share)
        for name, value in asdict(self).items():
            if name.endswith("_weight") and value < 0:
                raise ValueError(f"{name} must be at least 0, got {value}")
        if self.scope == "mlp" and self.kv_scope != "selected":
            raise ValueError(f"scope='mlp' routes no keys and values; leave out kv_scope={self.kv_scope!r}.")
        if self.decode_routing == "student" and self.student == "none":
            raise ValueError("decode_routing='student' needs a student; set student='mlp' or 'linear2'.")
        if self.student != "none" and not self.student_weight:
            raise ValueError("a student with student_weight=0 learns nothing; set student='none' or a weight.")

    def layers(self, count: int) -> tuple[int, ...]:
        """R of a model with so many layers.

        Raises:
            ValueError: the model has none to route, or the given ones do not fit.
        """
        if count < 2:
            raise ValueError(
                f"{type(self).__name__} needs at least 2 layers, a dense one before a routed; found {count}."
            )
        chosen = self.routed_layers or tuple(range(1, count, 2))
        if len(set(chosen)) != len(chosen) or list(chosen) != sorted(chosen):
            raise ValueError(f"routed_layers must rise without duplicates, got {chosen}.")
        if chosen[0] == 0:
            raise ValueError("layer 0 cannot be routed: positions in the text are read from its keys and values.")
        if chosen[0] < 0 or chosen[-1] >= count:
            raise ValueError(f"routed_layers must be in 1 ... {count - 1}, got {chosen}.")
        return chosen

    def capacities(self, count: int) -> tuple[float, ...]:
        """γ of every routed layer of a model with so many layers.

        Raises:
            ValueError: there are more or fewer capacities than routed layers.
        """
        routed = len(self.layers(count))
        if not isinstance(self.capacity, tuple):
            return (self.capacity,) * routed
        if len(self.capacity) != routed:
            raise ValueError(f"{len(self.capacity)} capacities for {routed} routed layers; give one for each, or one.")
        return self.capacity

    @property
    def score_threshold(self) -> float | None:
        """The score from which on tokens are selected in training; `None` for the best `capacity` of them."""
        return None

    @property
    def training_output(self) -> TrainingOutput:
        """What a layer puts out in training: selected tokens among themselves, or parts of a run on all of them."""
        return "gated"

    def always(self, tokens: Tokens) -> Tensor | None:
        """(B, T), where a token is always selected."""
        places = (0,) if self.always_run == "first" else self.always_run
        if not places:
            return None
        mask: Tensor = sum(tokens.rank == place for place in places) > 0  # type: ignore[assignment]
        return mask

    def to_dict(self) -> dict[str, Any]:
        """As JSON, with the method's name."""
        return {"method": type(self).__name__} | asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Read what `to_dict` wrote, apart from the method's name.

        Raises:
            ValueError: there are settings this version does not know.
        """
        given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items() if k != "method"}
        unknown = given.keys() - {f.name for f in fields(cls)}
        if unknown:
            raise ValueError(f"{cls.__name__} has no {', '.join(sorted(unknown))}; saved by a later version?")
        return cls(**given)

    def bypass_network(self, width: int, eps: float) -> Guess | None:
        """A new guess of what a skipped layer would have added, if there shall be one; most methods have none."""
        del width, eps
        return None

    @property
    @abstractmethod
    def weights(self) -> Mapping[str, float]:
        """λ of every loss of the router, by its name."""

    @abstractmethod
    def router(self, width: int, eps: float) -> Router:
        """A new router for one layer of a model of this width, whose norms have this eps."""

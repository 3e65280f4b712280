"""Multiply-adds and cache entries of a routed model, from a formula; a test counts the same.

Per token and layer: lin = 2 d H d_h + 2 d H_kv d_h + 3 d f, and 2 n H d_h for n visible keys.
"""

from dataclasses import dataclass
from typing import Any

from .criterion import Surprising
from .networks import prior_width
from .routing import Routing
from .select import budget


@dataclass(frozen=True, slots=True)
class Cost:
    """What one text costs.

    Attributes:
        macs: multiply-adds of all decoder layers and routers, causal products counted where keys are visible.
        attention: those of them in the two products of attention.
        entries: of the cache: pairs of key and value vectors, over all layers.
        cache_bytes: their bytes, with two bytes a number unless said otherwise.
    """

    macs: int
    attention: int
    entries: int
    cache_bytes: int


def cost(config: Any, routing: Routing | None, tokens: int, teacher: bool = False, number_bytes: int = 2) -> Cost:
    """What one text of so many tokens costs, without embedding and output head.

    Args:
        config: of the model.
        routing: the method; `None` for the dense model.
        tokens: T.
        teacher: whether STT's teacher runs, as in training.
        number_bytes: of a number in the cache.

    Raises:
        ValueError: the model is trained without skipping, so that what skipping saves is not its cost.
    """
    if routing is not None and routing.training_output == "dense":
        raise ValueError(
            "output='dense' trains a model that never skips, and what it would save says nothing about it; "
            "give the cost of output='gated'."
        )
    heads, shared = config.num_attention_heads, config.num_key_value_heads
    width, size = config.hidden_size, getattr(config, "head_dim", None) or config.hidden_size // heads
    projections = 2 * width * heads * size + 2 * width * shared * size
    network = 3 * width * config.intermediate_size
    product = 2 * heads * size  # per query and visible key
    count = config.num_hidden_layers
    pairs = tokens * (tokens + 1) // 2
    routed = () if routing is None else routing.layers(count)
    macs = (count - len(routed)) * (tokens * (projections + network) + pairs * product)
    attention, entries = (count - len(routed)) * pairs * product, (count - len(routed)) * tokens
    for capacity in () if routing is None else routing.capacities(count):
        assert routing is not None
        run, attends = budget(capacity, tokens), routing.scope != "mlp"
        every, asking = routing.kv_scope == "all" or not attends, run if attends else tokens
        thinking = tokens if routing.scope == "attention" else run
        # selected tokens lie anywhere; on average each sees as many of all tokens as the middle one does
        seen = asking * ((tokens if every else asking) + 1) // 2
        own = asking * projections + every * (tokens - asking) * 2 * width * shared * size + thinking * network
        macs += own + seen * product + tokens * _router(routing, width, teacher)
        attention += seen * product
        entries += tokens if every else run
        if teacher and hasattr(routing, "teacher_grad"):
            whole = attends * (tokens * projections + pairs * product)
            macs += whole + (routing.scope != "attention") * tokens * network
            attention += attends * pairs * product
    return Cost(macs, attention, entries, entries * 2 * shared * size * number_bytes)


def _router(routing: Routing, width: int, teacher: bool) -> int:
    """Multiply-adds of router, student and bypass, for one token."""
    pair = hasattr(routing, "teacher_grad") or routing.student == "linear2"
    entering, middle = width * (1 + pair), max(16, width // 8)
    student = {"none": 0, "linear2": entering, "mlp": entering * middle + middle}[routing.student]
    asks_student = routing.decode_routing == "student" or teacher
    if not isinstance(routing, Surprising):
        return width + student * asks_student
    guess = width * width if routing.prior == "linear" else 3 * width * prior_width(width, routing.guess_factor)
    head = 2 * width * width if routing.surprise == "kl" else 0
    router = 0 if hasattr(routing, "teacher_grad") and not teacher else guess + head
    return router + student * asks_student + guess * (routing.bypass == "prior")

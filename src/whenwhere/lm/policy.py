"""Who selects in a call of a routed model."""

from typing import Any

from .call import Knob, Policy

_IMPLEMENTATIONS = ("eager", "sdpa")


def decide(model: Any, asked: Knob, caching: bool, past: int) -> Policy:
    """Who selects in this call.

    Args:
        model: a `RoutedCausalLM`.
        asked: what the call asks for.
        caching: whether keys and values are kept.
        past: how many tokens came in earlier calls.

    Raises:
        ValueError: the best of a text are asked for when only its end is at hand, or there is nobody to decide.
    """
    routing, implementation = model.routing, model.config._attn_implementation
    if implementation not in _IMPLEMENTATIONS:
        raise ValueError(
            f"routed layers need attention in {_IMPLEMENTATIONS}, which take masks; got {implementation!r}."
        )
    if model.training:
        _check_training(model, caching)
    policy = asked.policy
    if policy == "auto":
        first = caching and not past and routing.prefill_routing == "topk"
        policy = "topk" if model.training or first else routing.decode_routing
    if policy == "topk" and past:
        raise ValueError("policy='topk' compares all tokens of a text; after a cached beginning only its end is here.")
    if policy == "student":
        _check_student(model)
    return policy


def _check_training(model: Any, caching: bool) -> None:
    if caching:
        raise ValueError("training goes over whole texts; give no past_key_values, and no use_cache=True.")
    if getattr(model.routing, "beta_mode", "learned") == "scheduled" and not model.stepped:
        raise ValueError("beta_mode='scheduled' needs to know the step: whenwhere.lm.set_step(model, step, steps).")


def _check_student(model: Any) -> None:
    students = [layer.student for layer in model.routed]
    if any(student is None for student in students):
        raise ValueError("policy='student' needs a student; route with student='mlp' or 'linear2' and train it.")
    if not model.config.routing_calibrated and not all(bool(student.trained) for student in students):
        raise ValueError("the student was never trained; train the routed model, or use another policy.")

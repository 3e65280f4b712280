"""Who selects in a call of a routed model, and the call itself."""

from typing import Any

from torch import Tensor

from .call import Call, Knob, Policy, places

_IMPLEMENTATIONS = ("eager", "sdpa")


def check_texts(entering: Tensor | None, labels: Tensor | None) -> None:
    """Refuse a call without tokens, and labels (B, T) that are not one for each token.

    Raises:
        ValueError: it is one of these.
    """
    if entering is None:
        raise ValueError("give input_ids or inputs_embeds.")
    if labels is not None and labels.shape[:2] != entering.shape[:2]:
        raise ValueError(f"labels are {tuple(labels.shape)}, tokens {tuple(entering.shape[:2])}: one for each token.")


def begin(
    model: Any,
    asked: Knob,
    entering: Any,
    attention_mask: Any,
    position_ids: Tensor | None,
    cache: Any,
    use_cache: bool | None,
) -> Call:
    """The record of a call that starts; the arguments are those of the model's.

    Raises:
        ValueError: as `decide`.
    """
    past = 0 if cache is None else cache.get_seq_length()
    caching = cache is not None or (model.config.use_cache if use_cache is None else use_cache)
    chosen = decide(model, asked, caching, past)
    rows, tokens = entering.shape[:2]
    keep, rank = places((rows, tokens), past, attention_mask, position_ids, entering.device)
    return Call(chosen, asked, model.training, model.config.routing_calibrated, keep, rank, past)


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

"""Conditional computation in language models: Mixture-of-Depths, Subjective Depth, Subjective Timescale.

    model = AutoModelForCausalLM.from_pretrained(directory)         # Llama, Qwen2, Qwen3 or Mistral
    routed = lm.route(model, lm.SDT.recommended())                  # shares the model's parameters

    optimiser = torch.optim.AdamW(lm.parameter_groups(routed))      # train as usual; a model in training mode adds
    routed.train()(**batch, labels=batch["input_ids"]).loss         # the routers' losses: lm.routing_loss(routed)
    lm.set_step(routed, step, steps)                                # where β is scheduled (STT)
    Trainer(routed, ..., callbacks=[lm.StepCallback()])             # the same under transformers' Trainer

    lm.calibrate(routed, batches)                                   # thresholds for capacities, after training
    routed.save_pretrained(path)                                    # AutoModelForCausalLM.from_pretrained(path)
    routed.generate(**prompt, capacity=0.3)                         # or threshold=..., speed=...
    routed(**batch, policy="topk")                                  # scores of whole texts, not causal

    with lm.turned(routed, lm.Knob(capacity=0.3)): ...              # or routed.knob = lm.Knob(...)
    routed.realised, routed.notes                                   # what the last call selected, by layer
    lm.router_metrics(routed)                                       # and how well routers and students did
    with lm.watched(routed): ...                                    # collapsed routers warn, what is no number raises
    lm.cost(routed.config, routed.routing, tokens)                  # multiply-adds and cache, next to dense
    lm.cache_bytes(cache)                                           # measured
    lm.score(routed, ids).perplexity                                # of a text, as in decoding
    print(lm.trace(routed, tokenizer, "a text"))                    # layers x tokens
    lm.route_vision(vit, lm.SDT(surprise="relative"))               # the same surprise in a vision Transformer
    lm.export_onnx(routed, path)                                    # the graph of scoring, for other runtimes

In training mode the best tokens of whole texts are selected; in evaluation mode a threshold decides about every token
by itself, so that losses are those of decoding. `notes[layer].mask` (B, T) is the trace; `Knob(selection=...)` replays
one.
"""

from .cache import cache_bytes
from .calibrate import calibrate
from .call import Knob, Note
from .convert import route
from .cost import Cost, cost
from .losses import parameter_groups, routing_loss, set_step
from .mod import MoD
from .models import (
    RoutedLlamaForCausalLM,
    RoutedMistralForCausalLM,
    RoutedQwen2ForCausalLM,
    RoutedQwen3ForCausalLM,
)
from .onnx import export_onnx
from .routing import Routing
from .score import Score, score
from .sdt import SDT
from .stt import STT
from .trace import TokenTrace, trace
from .trainer import StepCallback
from .vision import route_vision
from .watch import router_metrics, watched
from .within import turned

__all__ = [
    "SDT",
    "STT",
    "Cost",
    "Knob",
    "MoD",
    "Note",
    "RoutedLlamaForCausalLM",
    "RoutedMistralForCausalLM",
    "RoutedQwen2ForCausalLM",
    "RoutedQwen3ForCausalLM",
    "Routing",
    "Score",
    "StepCallback",
    "TokenTrace",
    "cache_bytes",
    "calibrate",
    "cost",
    "export_onnx",
    "parameter_groups",
    "route",
    "route_vision",
    "router_metrics",
    "routing_loss",
    "score",
    "set_step",
    "trace",
    "turned",
    "watched",
]

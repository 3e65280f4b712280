"""Recall with both scopes of keys and values: what is lost of a token that a layer skips.

In the first half of a text a few pairs of a key and a value, one token each, stand among fillers; in the second half
some of the keys stand alone, and behind each the value of its pair is asked for. The first of two layers cannot look
back, because its attention adds nothing. What is recalled is looked up in the second, routed one: with
`kv_scope="selected"` both the pair and the key that asks must be selected, with "all" the key that asks alone. A dense
model learns the task first; every method then goes on from it, and so does the dense model, for as many steps.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from language import Recipe, build, lottery
from torch import Tensor

from whenwhere import lm
from whenwhere.train.language import LanguageConfig, Prepare, learn_language

SCOPES = ("selected", "all")
METHODS = ("random", "mod", "sdt-relative")


@dataclass(frozen=True)
class Recall:
    """The task, and how it is learned."""

    names: int = 4  # keys, and as many values
    pairs: int = 3  # in a text
    asked: int = 4  # keys that stand alone
    tokens: int = 24  # of a text
    capacity: float = 0.375  # 9 tokens, of which 7 are needed
    begun: int = 300  # steps of the dense model
    steps: int = 150  # of every method, from there
    batch_size: int = 64
    learning_rate: float = 3e-3
    evaluation: int = 512  # texts

    @property
    def recipe(self) -> Recipe:
        """The model's shape; token 0 pads, then come fillers, keys, pairs and values."""
        vocabulary = 1 + self.names * (self.names + 3)
        return Recipe(vocabulary, 32, 2, 2, 64, self.tokens, self.batch_size, self.learning_rate)

    def draw(self, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Texts (B, T), and as labels the values that are asked for."""
        names, half, row = self.names, self.tokens // 2, torch.arange(rows)[:, None]
        ids = 1 + torch.randint(names, (rows, self.tokens), generator=generator)
        keys = torch.rand(rows, names, generator=generator).argsort(1)[:, : self.pairs]
        values = torch.randint(names, keys.shape, generator=generator)
        place = torch.rand(rows, half, generator=generator).argsort(1)
        ids[row, place[:, : self.pairs]] = 1 + 2 * names + names * keys + values
        which = torch.randint(self.pairs, (rows, self.asked), generator=generator)
        place = half + torch.rand(rows, half - 1, generator=generator).argsort(1)[:, : self.asked]
        ids[row, place] = 1 + names + keys.gather(1, which)
        labels = torch.full_like(ids, -100)
        labels[row, place + 1] = 1 + names * (names + 2) + values.gather(1, which)
        return ids, labels


def routings(capacity: float) -> dict[str, lm.Routing | None]:
    """By method and scope."""
    found: dict[str, lm.Routing | None] = {"dense": None}
    for scope in SCOPES:
        plain = lm.MoD(capacity=capacity, kv_scope=scope, gate="hard", aux_weight=0.0, z_weight=0.0, student="none")
        found[f"random {scope}"] = plain
        found[f"mod {scope}"] = lm.MoD(capacity=capacity, kv_scope=scope, student="none")
        found[f"sdt-relative {scope}"] = lm.SDT(capacity=capacity, kv_scope=scope, surprise="relative")
    return found


def recall_one(task: Recall, name: str, seed: int, folder: Path) -> dict[str, Any]:
    """Train and score one model; what is finished already is read."""
    out = folder / f"recall-{name.replace(' ', '-')}-{seed}"
    if (out / "result.json").exists():
        return json.loads((out / "result.json").read_text(encoding="utf-8"))
    print(f"recall {name}, seed {seed}", flush=True)
    dense, routing = begun(task, seed, folder), routings(task.capacity)[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = dense if routing is None else lm.route(dense, routing)
    random = name.startswith("random")

    def prepare(model: Any, batch: Tensor, generator: torch.Generator) -> None:
        if random:
            model.knob = lottery(model, batch, task.capacity, generator)

    learn(task, task.steps, model, seed + 100, out, prepare)
    row = {"method": name.split()[0], "scope": name.partition(" ")[2], "seed": seed, "steps": task.steps}
    row |= accuracy(task, model, random)
    (out / "result.json").write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
    return row


def begun(task: Recall, seed: int, folder: Path) -> Any:
    """The dense model that has learned the task; the first call of a seed teaches it."""
    model = build(task.recipe, None, seed)
    blind(model.model.layers[0].self_attn.o_proj.weight)
    learn(task, task.begun, model, seed, folder / f"recall-begun-{seed}")
    return model


def learn(task: Recall, steps: int, model: Any, seed: int, out: Path, prepare: Prepare | None = None) -> None:
    """Train on texts drawn anew; a run that is over is read."""
    config = LanguageConfig(1e9, steps, task.batch_size, task.tokens, task.learning_rate, 5e-3, seed=seed)
    learn_language(model, lambda generator: task.draw(task.batch_size, generator), config, out, prepare=prepare)


def blind(weight: Tensor) -> None:
    """An attention whose output projection is this adds nothing, now and after training."""
    with torch.no_grad():
        weight.zero_()
    weight.requires_grad_(False)


@torch.no_grad()
def accuracy(task: Recall, model: Any, random: bool) -> dict[str, float]:
    """The share of values that are recalled, selected causally; and the share of tokens that ran."""
    generator = torch.Generator().manual_seed(10_000)
    ids, labels = task.draw(task.evaluation, generator)
    if random:
        model.knob = lottery(model, ids, task.capacity, generator)
    elif hasattr(model, "routed"):
        lm.calibrate(model, [task.draw(task.evaluation, generator)[0]])
    found = model(ids, use_cache=False).logits[:, :-1].argmax(-1)
    asked = labels[:, 1:] != -100
    right = (found == labels[:, 1:])[asked].double().mean()
    ran = model.realised[1] if hasattr(model, "routed") else 1.0
    return {"recalled": float(right), "realised": ran}

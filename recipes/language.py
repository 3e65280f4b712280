"""Compare dense, MoD, SDT, STT and random routing on small language models, trained with the same multiply-adds.

    python recipes/build_corpus.py --out data/corpus
    python recipes/language.py --corpus data/corpus --steps 2000 --budget 3600 --out runs/language

`--steps` are those of the dense model; the others take as many as cost the same, and none trains longer than `--budget`
seconds. The same line goes on with an interrupted comparison. Every finished run is evaluated on held-out text, with
the thresholds of decoding, at several capacities of one checkpoint; results go to `results.json` and `table.md`.
"""

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from language_tables import curve, quality
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from whenwhere import lm
from whenwhere.lm.select import budget as places
from whenwhere.train.language import LanguageConfig, LanguageState, learn_language, shift, staying

ROUTINGS: dict[str, lm.Routing | None] = {
    "dense": None,
    "random": lm.MoD(gate="hard", aux_weight=0.0, z_weight=0.0, student="none"),  # its router is never asked
    "norm": lm.SDT(criteria="cu", m_cu_init=1e-6, gate="hard", prior_weight=0.0),  # u rises with D_st, and nothing else
    "mod": lm.MoD(),
    "sdt-paper": lm.SDT.paper(),
    "sdt-relative": lm.SDT.recommended(),
    "sdt-hard": lm.SDT(surprise="relative", always_run="first", gate="hard"),  # the score selects, and does no more
    "stt": lm.STT.recommended(),
}
CAPACITIES = (0.125, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Recipe:
    """What is trained; how long is the command line's choice."""

    vocabulary: int = 4096
    width: int = 160
    layers: int = 6
    heads: int = 5
    middle: int = 448  # of the MLPs
    context: int = 128
    batch_size: int = 8
    learning_rate: float = 2e-3
    calibration: int = 16_384  # tokens of the training text
    evaluation: int = 16_384  # tokens of the held-out text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, required=True, help="train.txt and held-out.txt")
    parser.add_argument("--steps", type=int, required=True, help="of the dense model")
    parser.add_argument("--budget", type=float, required=True, help="seconds of training, of every run")
    parser.add_argument("--out", type=Path, default=Path("runs/language"))
    parser.add_argument("--methods", nargs="+", choices=ROUTINGS, default=list(ROUTINGS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bfloat16", action="store_true", help="autocast: faster on CPUs with AMX, and on GPUs")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)  # tiny numbers slow a CPU down
    recipe = Recipe()
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = learn_pieces(args.corpus / "train.txt", recipe.vocabulary, args.out / "tokenizer")
    texts = {part: encode(tokenizer, args.corpus / f"{part}.txt") for part in ("train", "held-out")}
    rows = []
    for seed in args.seeds:
        for method in args.methods:
            rows.append(compare_one(recipe, method, seed, texts, args))
            (args.out / "results.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
            tables = f"{quality(rows)}\n\n{curve(rows)}\n"
            (args.out / "table.md").write_text(tables, encoding="utf-8")
    print(tables)


def learn_pieces(file: Path, size: int, folder: Path) -> PreTrainedTokenizerFast:
    """Byte-pair encoding of the training text; learned once."""
    if not folder.exists():
        pieces = Tokenizer(models.BPE())
        pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        pieces.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=["<end>"], initial_alphabet=alphabet)
        pieces.train([str(file)], trainer)
        PreTrainedTokenizerFast(tokenizer_object=pieces, eos_token="<end>").save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def encode(tokenizer: PreTrainedTokenizerFast, file: Path) -> Tensor:
    """A text as token numbers, (N,)."""
    return torch.tensor(tokenizer.backend_tokenizer.encode(file.read_text(encoding="utf-8")).ids)


def build(recipe: Recipe, routing: lm.Routing | None, seed: int) -> Any:
    """An untrained model; the dense part is the same for every method."""
    config = LlamaConfig(
        vocab_size=recipe.vocabulary,
        hidden_size=recipe.width,
        intermediate_size=recipe.middle,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        dense = LlamaForCausalLM(config)
        return dense if routing is None else lm.route(dense, routing)


def macs(recipe: Recipe, model: Any) -> int:
    """Multiply-adds of the forward pass over one window in training, with the output head."""
    head = recipe.context * recipe.width * recipe.vocabulary
    return lm.cost(model.config, getattr(model, "routing", None), recipe.context, teacher=True).macs + head


def compare_one(
    recipe: Recipe, method: str, seed: int, texts: dict[str, Tensor], args: argparse.Namespace
) -> dict[str, Any]:
    """Train, calibrate, save and score one model; what is finished already is read."""
    out = args.out / f"{method}-{seed}"
    if (out / "result.json").exists():
        return json.loads((out / "result.json").read_text(encoding="utf-8"))
    print(f"{method}, seed {seed}", flush=True)
    model = build(recipe, ROUTINGS[method], seed).to(args.device)
    one = macs(recipe, model)
    steps = round(args.steps * macs(recipe, build(recipe, None, seed)) / one)
    config = LanguageConfig(
        budget=args.budget,
        steps=steps,
        batch_size=recipe.batch_size,
        context=recipe.context,
        learning_rate=recipe.learning_rate,
        network_rate=recipe.learning_rate,
        bfloat16=args.bfloat16,
        seed=seed,
    )
    state = learn_language(model, texts["train"], config, out, prepare=at_random if method == "random" else None)
    row = {"method": method, "seed": seed, "recipe": asdict(recipe), "steps asked": steps}
    row |= {"macs": 3 * one * recipe.batch_size * state.step, "parameters": model.num_parameters()}
    row |= evaluate(recipe, method, state, texts)
    model.save_pretrained(out / "model")
    (out / "result.json").write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
    return row


def at_random(model: Any, batch: Tensor, generator: torch.Generator) -> None:
    """Let the next call process tokens drawn by lot, as many as the method would."""
    model.knob = lottery(model, batch, 0.5, generator)


def lottery(model: Any, batch: Tensor, capacity: float, generator: torch.Generator) -> lm.Knob:
    """A knob that selects a share of every text by lot, in every routed layer anew."""
    count = places(capacity, batch.shape[1])
    ranks = [torch.rand(batch.shape, generator=generator).argsort(1).argsort(1) for _ in model.routed]
    chosen = {layer.index: (rank < count).to(batch.device) for layer, rank in zip(model.routed, ranks, strict=True)}
    return lm.Knob(selection=chosen, policy="all")


def evaluate(recipe: Recipe, method: str, state: LanguageState, texts: dict[str, Tensor]) -> dict[str, Any]:
    """Losses on the held-out text by capacity, as in decoding, and the shift where there is surprise."""
    model, held_out = state.model, texts["held-out"]
    first = len(held_out) // 8  # so that both held-out books are there
    ids = held_out[first : first + recipe.evaluation]
    row: dict[str, Any] = {"steps": state.step, "tokens": state.tokens, "seconds": round(state.seconds, 1), "curve": []}
    settings: list[tuple[str, lm.Knob | Any]] = [("dense", None)]
    if method == "random":
        generator = torch.Generator().manual_seed(1)
        settings = [
            (f"{share:g}", lambda batch, share=share: lottery(model, batch, share, generator)) for share in CAPACITIES
        ]
        model.knob = lm.Knob()
    elif method != "dense":
        sample = texts["train"][: recipe.calibration // recipe.context * recipe.context].view(-1, recipe.context)
        lm.calibrate(model, torch.split(sample, 16))
        settings = [(f"{share:g}", lm.Knob(capacity=share)) for share in CAPACITIES]
        settings.append(("0.5 topk", lm.Knob("topk", 0.5)))
        if method in ("mod", "sdt-paper"):
            settings.append(("0.5 student", lm.Knob("student", 0.5)))
    for name, knob in settings:
        found = lm.score(model, ids, recipe.context, 16, knob)
        row["curve"].append({"capacity": name, "nats": found.nats, "realised": found.realised})
    return row | (looked(model, ids[: 16 * recipe.context].view(16, -1)) if method not in ("dense", "random") else {})


def looked(model: Any, batch: Tensor) -> dict[str, Any]:
    """What routers and students did while the best tokens of whole texts were selected, as the mean of the layers."""
    with torch.no_grad():
        model(batch.to(model.device), policy="topk", use_cache=False)
    layers = [asdict(measured) for measured in lm.router_metrics(model).values()]
    row: dict[str, Any] = {
        name: mean(layer[name] for layer in layers)
        for name in ("gate_mean", "score_deviation", "tied", "accuracy", "trivial", "auc")
        if layers[0][name] is not None
    }
    details = [note.details for note in model.notes.values()]
    if details[0]:
        row |= {"shift": shift(model.notes), "alone": staying(model)}
        left = [float(found["change"].mean() / found["static"].mean()) for found in details]
        row["explained"] = 1 - mean(left)
    return row


if __name__ == "__main__":
    main()

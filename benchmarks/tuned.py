"""Tuned schedules beside published defaults, fewer steps and stopped guidance, on prompts and seeds nobody tuned on.

`python benchmarks/tuned.py` tunes both models of the zoo that take many steps for about 1.5 and 2 times fewer
multiply-adds; names of models tune only these. It writes docs/results/tuned-MODEL.json and the tables of docs/tune.md,
between their marks. A run that was stopped goes on with the targets that are not in runs/ yet.
"""

import argparse
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from methods_table import interval

from whenwhere.bench.choice import Choice, Rival
from whenwhere.bench.model import open_model
from whenwhere.bench.prompts import builtin_prompts
from whenwhere.bench.tune import tune
from whenwhere.bench.tune_search import Goal
from whenwhere.bench.variant import Task

MODELS = ("emoji-pixart", "emoji-unet")
TARGETS = (1.5, 2.0)
HELD_OUT = 32  # prompts, each with so many
SEEDS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=MODELS, help="of the zoo; both that have many steps without")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--prompts", type=int, default=8, help="to tune on, with one seed each")
    parser.add_argument("--held-out", type=int, default=HELD_OUT, help=f"prompts to judge on, with {SEEDS} seeds each")
    parser.add_argument("--trials", type=int, default=16, help="variants that are drawn for a target")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    args = parser.parse_args()
    args.runs.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for name in args.models:
        model, prompts = open_model(name, "cpu"), builtin_prompts(name)
        tuned_on = Task(model, prompts[args.held_out :][: args.prompts], [0], 1, args.steps, model.guidance)
        held_out = replace(tuned_on, prompts=prompts[: args.held_out], seeds=range(1, 1 + SEEDS))
        choices = [choose(tuned_on, held_out, target, args.trials, args.runs) for target in TARGETS]
        write(choices, tuned_on, held_out, args.docs)


def choose(tuned_on: Task, held_out: Task, target: float, trials: int, runs: Path) -> Choice:
    """The choice for a target; where it was made before on the same model, that one."""
    model, file = tuned_on.model, runs / f"tuned-{tuned_on.model.name}-{target:g}.json"
    if file.exists() and (found := Choice.load(file)).revision == model.revision and found.steps == tuned_on.steps:
        return found
    calibration = file.with_suffix(".calibration.json")
    told = Told(f"{model.name}, {target:g}x: ")
    found = tune(tuned_on, held_out, Goal("macs", target), trials, calibration, told)
    found.save(file)
    return found


class Told:
    """Prints what runs next, once."""

    def __init__(self, prefix: str) -> None:
        self.prefix, self.last = prefix, ""

    def __call__(self, text: str) -> None:
        if text != self.last:
            print(self.prefix + text, flush=True)
        self.last = text


def write(choices: Sequence[Choice], tuned_on: Task, held_out: Task, docs: Path) -> None:
    """The numbers as JSON, and the table into the page."""
    name = tuned_on.model.name
    found = {
        "tuned on": {"prompts": list(tuned_on.prompts), "seeds": list(tuned_on.seeds)},
        "held out": {"prompts": list(held_out.prompts), "seeds": list(held_out.seeds)},
        "choices": [asdict(choice) | {"calibration": Path(choice.calibration).name} for choice in choices],
    }
    text = json.dumps(found, indent=1, ensure_ascii=False)
    (docs / "results" / f"tuned-{name}.json").write_text(text + "\n", encoding="utf-8")
    page = docs / "tune.md"
    marks = re.compile(rf"(<!-- tuned: {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
    before = page.read_text(encoding="utf-8")
    if not marks.search(before):
        raise ValueError(f"{page} has no place for {name}: write <!-- tuned: {name} --> and <!-- end --> into it.")
    table = "\n".join(lines(choices, tuned_on, held_out))
    page.write_text(marks.sub(lambda m: f"{m[1]}{table}\n{m[2]}", before), encoding="utf-8")


def lines(choices: Sequence[Choice], tuned_on: Task, held_out: Task) -> Iterable[str]:
    """Markdown: every choice and its rivals."""
    here = choices[0].environment
    yield (
        f"Tuned on {len(tuned_on.prompts)} prompts with one seed each, judged on {len(held_out.prompts)} others with "
        f"{len(held_out.seeds)} other seeds each. {choices[0].steps} steps of {choices[0].scheduler}, guidance "
        f"{choices[0].guidance:g}, revision `{choices[0].revision}`. {here['processor']}, {here['threads']} thread, "
        f"torch {here['torch']}, {here['date'][:10]}."
    )
    yield ""
    yield "| | setting | fewer MACs | speed-up | PSNR, dB | SSIM | the choice leads by, dB | |"
    yield "|---|---|---|---|---|---|---|---|"
    for choice in choices:
        yield f"| **{choice.goal.removeprefix('macs ')}x** |{' |' * 7}"
        yield line(choice.own, own=True)
        for rival in choice.rivals:
            yield line(rival, own=False)


def line(rival: Rival, own: bool) -> str:
    cells = [
        rival.name,
        f"`{re.sub('calibration=[^,]*, ', '', rival.label)}`",
        f"{rival.macs_ratio:.2f}x",
        f"{interval(rival.speed_up, 2)}x",
        interval(rival.psnr, 1),
        interval(rival.ssim, 3),
        "" if own else interval(rival.lead, 1),
        "" if own else rival.verdict,
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()

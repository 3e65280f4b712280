"""Tables of experiments on language models: means over the seeds, with standard deviations where there are several."""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

Row = dict[str, Any]
NAMES = {
    "dense": "dense",
    "random": "random",
    "norm": "norm of the change",
    "mod": "MoD",
    "sdt-paper": "SDT, paper",
    "sdt-relative": "SDT, relative",
    "sdt-hard": "SDT, relative, hard gate",
    "stt": "STT",
}
MOMENTS = (0.05, 0.1, 0.25, 0.5, 0.75, 1.0)


def by_method(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The runs of every method, in the order of `NAMES`."""
    rows = list(rows)
    found = {method: [row for row in rows if row["method"] == method] for method in NAMES}
    return {method: runs for method, runs in found.items() if runs}


def at(run: Row, capacity: str, what: str = "nats") -> float | None:
    """A number of a run at a capacity; `None` where it was not measured there."""
    return next((point[what] for point in run["curve"] if point["capacity"] == capacity), None)


def spread(values: Iterable[float | None], digits: int) -> str:
    """A mean with its standard deviation; nothing where there are no values."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    return f"{mean(known):.{digits}f}" + (f" ± {stdev(known):.{digits}f}" if len(known) > 1 else "")


def lines(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    parts = [" | ".join(head), "|".join("---" for _ in head), *(" | ".join(row) for row in rows)]
    return "\n".join(f"| {part} |".replace("| ---", "|---").replace("--- |", "---|") for part in parts)


def quality(rows: Sequence[Row]) -> str:
    """Held-out loss at equal compute, and against the lot of the same seed."""
    lots = {run["seed"]: at(run, "0.5") for run in rows if run["method"] == "random"}
    body = []
    for method, runs in by_method(rows).items():
        losses = [at(run, "0.5") if method != "dense" else at(run, "dense") for run in runs]
        ahead = [
            loss - lots[run["seed"]]
            for run, loss in zip(runs, losses, strict=True)
            if loss is not None and lots.get(run["seed"]) is not None
        ]
        realised = spread([100 * share for run in runs if (share := at(run, "0.5", "realised")) is not None], 1)
        body.append(
            [
                NAMES[method],
                str(len(runs)),
                f"{mean(run['steps'] for run in runs):.0f}",
                f"{mean(run['macs'] for run in runs) / 1e12:.2f}",
                spread(losses, 3),
                "" if method == "random" else spread(ahead, 3),
                realised and f"{realised} %",
                spread([at(run, "0.5 student") for run in runs], 3),
                spread([at(run, "0.5 topk") for run in runs], 3),
            ]
        )
    head = ["method", "seeds", "steps", "10^12 multiply-adds", "**nats, causal**", "less the lot's", "realised"]
    return lines([*head, "by a student", "by top-k: *not causal*"], body)


def curve(rows: Sequence[Row]) -> str:
    """Held-out loss of one checkpoint by capacity."""
    found = by_method(row for row in rows if row["method"] != "dense")
    points = [point["capacity"] for run in next(iter(found.values()), []) for point in run["curve"]]
    names = [name for name in dict.fromkeys(points) if name.replace(".", "").isdigit()]
    body = [[NAMES[m], *(spread([at(run, name) for run in runs], 3) for name in names)] for m, runs in found.items()]
    return lines(["method", *names], body)


def routers(rows: Sequence[Row]) -> str:
    """What routers and students do on held-out text."""
    columns: dict[str, tuple[str, int]] = {
        "mean gate": ("gate_mean", 3),
        "deviation of the score": ("score_deviation", 3),
        "student's accuracy": ("accuracy", 3),
        "of always the same": ("trivial", 3),
        "its area": ("auc", 3),
        "explained by the guess": ("explained", 3),
    }
    found = by_method(row for row in rows if "gate_mean" in row)
    body = [
        [NAMES[m], *(spread([run.get(name) for run in runs], digits) for name, digits in columns.values())]
        for m, runs in found.items()
    ]
    return lines(["method", *columns], body)


def moved(rows: Sequence[Row]) -> str:
    """Both halves of the shift over training: the difference of correlations, and the share that stays selected."""
    halves: dict[str, Callable[[Row], float]] = {
        "corr(u, CE) - corr(u, CU)": lambda line: line["shift"],
        "stay selected without CU": lambda line: line["expected alone"],
        "stay selected without CE": lambda line: line["unexpected alone"],
    }
    body = []
    for method, runs in by_method(row for row in rows if row["method"].startswith(("sdt", "stt"))).items():
        for name, read in halves.items():
            cells = [spread([read(near(run["training"], share)) for run in runs], 2) for share in MOMENTS]
            body.append([NAMES[method], name, *cells])
    return lines(["method", "", *(f"{share:.0%}" for share in MOMENTS)], body)


def near(training: Sequence[Row], share: float) -> Row:
    """The line of a run that is nearest to a share of its steps."""
    goal = share * training[-1]["step"]
    return min(training, key=lambda line: abs(line["step"] - goal))


def recall(rows: Sequence[Row]) -> str:
    """The share of values that are recalled, by method and scope."""
    body = []
    for method, runs in by_method(rows).items():
        for scope in dict.fromkeys(run["scope"] for run in runs):
            ours = [run for run in runs if run["scope"] == scope]
            percent = [spread([100 * run[what] for run in ours], 1) for what in ("recalled", "realised")]
            body.append([NAMES[method], f"`{scope}`" if scope else "", str(len(ours)), *(f"{p} %" for p in percent)])
    return lines(["method", "`kv_scope`", "seeds", "recalled", "tokens that ran"], body)


def conversion(rows: Sequence[Row]) -> str:
    """Perplexity of a converted model by capacity, and the share of tokens that ran, after every stage of training."""
    names = ["0.5", "0.75", "0.9", "1"]
    stages = {"new": "new routers", "routers": "routers trained", "adapters": "adapters too"}
    body = []
    for run in rows:
        cells = []
        for name in names:
            asked = "dense" if run["method"] == "dense" and name == "1" else name
            nats, share = at(run, asked), at(run, asked, "realised")
            cells.append("" if nats is None or share is None else f"{math.exp(nats):,.1f} ({share:.0%})")
        peek = at(run, "0.5 topk")
        stage = stages[run["stage"]] if run["method"] != "dense" else {"new": "as it is"}.get(run["stage"], "adapters")
        took = f"{run['seconds']:.0f}" if "seconds" in run else ""
        body.append([NAMES[run["method"]], stage, took, *cells, "" if peek is None else f"{math.exp(peek):,.1f}"])
    return lines(["model", "", "seconds", *names, "0.5 by top-k: *not causal*"], body)


def collect(folder: Path) -> dict[str, list[Row]]:
    """All finished runs of a folder: of the text, with thinned losses of training, and of recall."""
    found: dict[str, list[Row]] = {"text": [], "recall": []}
    for file in sorted(folder.glob("*/result.json")):
        row: Row = json.loads(file.read_text(encoding="utf-8"))
        if "curve" in row:
            log = (file.parent / "loss.jsonl").read_text(encoding="utf-8").splitlines()
            row["training"] = [json.loads(line) for line in log]
        found["text" if "curve" in row else "recall"].append(row)
    return found


def between(page: str, name: str, text: str) -> str:
    """A page with a text between `<!-- experiments: name -->` and `<!-- end -->`.

    Raises:
        ValueError: the page has no such markers.
    """
    before, opening, rest = page.partition(f"<!-- experiments: {name} -->\n")
    _, closing, after = rest.partition("<!-- end -->")
    if not opening or not closing:
        raise ValueError(f"the page has no markers for {name}: <!-- experiments: {name} --> and <!-- end -->.")
    return f"{before}{opening}{text}\n{closing}{after}"

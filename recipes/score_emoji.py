"""Score a model that draws emoji: a grid of pictures, KID on EfficientNet-Lite0 features, agreement with the prompts.

Every number stands beside its scale: real pictures against real ones, and wrong prompts. Run it as
`python recipes/score_emoji.py emoji-unet`; it writes docs/images/emoji-unet-grid.png and docs/results/emoji-unet.json.
With `--steps 4`, where that is not what the catalogue says, the names are emoji-unet-4-grid.png and emoji-unet-4.json.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageDraw
from torch import Tensor

from whenwhere import zoo
from whenwhere.bench import drawing
from whenwhere.metrics.alignment import AlignmentHeads, cosines, load_heads
from whenwhere.metrics.features import PictureFeatures, SentenceFeatures, kernel_distance
from whenwhere.train.data import Picture, read_pictures, read_tiles, withhold

GRID = """
red apple, noto style; blue apple, flat style; banana, twemoji style; purple banana; strawberry, shaded style;
watermelon, noto style; pineapple, flat style; cherries, blob style; hamburger, noto style; pizza, twemoji style;
doughnut, shaded style; birthday cake, flat style; ice cream, noto style; beer mug, emojione style; bread; cookie;
dog, noto style; cat face, flat style; fox, twemoji style; lion, shaded style; pig, blob style; blue pig; panda;
frog, noto style; penguin, flat style; owl, twemoji style; octopus, noto style; turtle, shaded style; snail;
butterfly, emojione style; lady beetle, flat style; unicorn, noto style; sunflower, twemoji style; tulip, flat style;
cactus, noto style; palm tree, blob style; evergreen tree; grinning face, flat style; green grinning face;
smiling face with sunglasses; crying face, noto style; angry face, shaded style; robot, twemoji style; alien; ghost;
skull, flat style; automobile, noto style; green bus; tractor, twemoji style; bicycle, flat style; airplane, noto style;
rocket, shaded style; sailboat, emojione style; house, noto style; castle, flat style; sun; crescent moon, blob style;
rainbow, noto style; snowman, twemoji style; fire, flat style; star, shaded style; purple heart; balloon, noto style;
christmas tree, emojione style
"""


@dataclass(frozen=True)
class Recipe:
    data: Path = Path("data/emoji")
    withheld: int = 30  # as in the training recipe
    split_seed: int = 0
    pictures: int = 480  # drawn from training prompts
    repeats: int = 4  # of every recombined prompt
    subset_size: int = 200  # of the kernel distance
    steps: int = 20
    guidance: float = 3.0
    batch: int = 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=zoo.names())
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    parser.add_argument("--only-grid", action="store_true")
    parser.add_argument("--steps", type=int, help="else as the catalogue says")
    args = parser.parse_args()
    entry = zoo.entry(args.model)
    recipe = Recipe(steps=args.steps or entry.steps, guidance=entry.guidance)
    name = args.model if recipe.steps == entry.steps else f"{args.model}-{recipe.steps}"
    pipeline = zoo.load(args.model)
    draw_grid(pipeline, recipe).save(folder(args.docs / "images") / f"{name}-grid.png", optimize=True)
    if args.only_grid:
        return
    told = {"command": " ".join(["python", *sys.argv]), "date": datetime.now(UTC).date().isoformat()}
    scores = told | {"settings": asdict(recipe) | {"data": str(recipe.data)}} | score(pipeline, recipe)
    text = json.dumps(scores, indent=2)
    (folder(args.docs / "results") / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    print(text)


def folder(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path


def draw_grid(pipeline: DiffusionPipeline, recipe: Recipe) -> Image.Image:
    """64 prompts, eight in a row, each picture three times enlarged over its prompt."""
    prompts = " ".join(GRID.split()).split("; ") if reads_words(pipeline) else sorted(pipeline.labels)[::2][:64]
    pictures = draw(pipeline, prompts, recipe, seed=0)
    sheet = Image.new("RGB", (8 * 132, 8 * 128), "white")
    pen = ImageDraw.Draw(sheet)
    for number, (prompt, picture) in enumerate(zip(prompts, pictures, strict=True)):
        left, top = number % 8 * 132 + 18, number // 8 * 128
        image = Image.fromarray(picture.permute(1, 2, 0).numpy())
        sheet.paste(image.resize((96, 96), Image.Resampling.NEAREST), (left, top + 2))
        name, _, style = prompt.partition(", ")
        pen.text((left + 48, top + 104), name, fill="black", anchor="mm", font_size=9)
        pen.text((left + 48, top + 116), style, fill="gray", anchor="mm", font_size=9)
    return sheet


def draw(pipeline: DiffusionPipeline, prompts: list[str], recipe: Recipe, seed: int) -> Tensor:
    """One uint8 picture (B, 3, 32, 32) per prompt, each from its own seed."""
    drawn = []
    for start in range(0, len(prompts), recipe.batch):
        part = prompts[start : start + recipe.batch]
        seeds = range(seed + start, seed + start + len(part))
        drawn.append((drawing.draw(pipeline, part, seeds, recipe.steps, recipe.guidance) * 255).round().byte())
    return torch.cat(drawn)


def score(pipeline: DiffusionPipeline, recipe: Recipe) -> dict[str, object]:
    """Kernel distance and agreement with the prompts, of drawn and of real pictures."""
    labels = (recipe.data / "clear.txt").read_text(encoding="utf-8").split("\n")[:-1]
    split = withhold(read_pictures(recipe.data, labels), recipe.withheld, recipe.split_seed)
    generator = torch.Generator().manual_seed(1)
    order = torch.randperm(len(split.training), generator=generator).tolist()
    training = [split.training[number] for number in order[: recipe.pictures]]
    recombined = split.recombined * recipe.repeats
    if not reads_words(pipeline):  # a class has no style, so there is nothing to recombine
        training, recombined = [replace(picture, style="") for picture in training], []
    features, judge = PictureFeatures(), Judge(load_heads(), SentenceFeatures(), sorted(labels))
    began = time.perf_counter()
    drawn = draw(pipeline, [prompt(picture) for picture in training], recipe, seed=1000)
    seconds = time.perf_counter() - began
    seen = features(drawn)
    real = features(read_tiles(recipe.data, [split.training[number] for number in order]))

    def distance(one: Tensor, other: Tensor) -> dict[str, float]:
        mean, spread = kernel_distance(one, other, subset_size=recipe.subset_size, generator=generator)
        return {"mean": round(mean, 4), "spread": round(spread, 4)}

    agreed = {"training prompts": agreement(judge, training, seen, real[: len(training)])}
    if recombined:
        unseen = features(draw(pipeline, [prompt(picture) for picture in recombined], recipe, seed=5000))
        held = features(read_tiles(recipe.data, split.recombined))
        agreed["recombined prompts"] = agreement(judge, recombined, unseen, held.repeat(recipe.repeats, 1))
    return {
        "seconds_per_picture": round(seconds / len(drawn), 3),
        "KID (EfficientNet-Lite0)": {
            "drawn against real": distance(real, seen),
            "real half against real half": distance(real[0::2], real[1::2]),
        },
        "prompt alignment": agreed,
    }


def reads_words(pipeline: DiffusionPipeline) -> bool:
    """Whether prompts are free text; a model of classes knows its labels alone."""
    return not hasattr(pipeline, "labels")


def prompt(picture: Picture) -> str:
    return styled(picture.label, picture.style)


def styled(label: str, style: str) -> str:
    return f"{label}, {style} style" if style else label


@dataclass(frozen=True)
class Judge:
    """What pictures are compared with: prompts in the common space, and the labels to choose from."""

    heads: AlignmentHeads
    sentences: SentenceFeatures
    labels: list[str]

    def pictures(self, features: Tensor) -> Tensor:
        return self.heads(features, torch.zeros(len(features), 384))[0]

    def prompts(self, texts: list[str]) -> Tensor:
        return self.heads(torch.zeros(len(texts), 1280), self.sentences(texts))[1]


@torch.no_grad()
def agreement(judge: Judge, pictures: list[Picture], drawn: Tensor, real: Tensor) -> dict[str, float]:
    """Mean cosines of drawn and real pictures with their own prompt and with that of another concept."""
    ours, theirs = judge.pictures(drawn), judge.pictures(real)
    own = judge.prompts([prompt(picture) for picture in pictures])
    wrong = own[[another(pictures, number) for number in range(len(pictures))]]
    return {
        "pictures": len(pictures),
        "drawn": round(float(cosines(ours, own).mean()), 3),
        "real": round(float(cosines(theirs, own).mean()), 3),
        "drawn, wrong prompt": round(float(cosines(ours, wrong).mean()), 3),
        "real, wrong prompt": round(float(cosines(theirs, wrong).mean()), 3),
        "drawn, label found": round(found(judge, pictures, ours), 3),
        "real, label found": round(found(judge, pictures, theirs), 3),
    }


def another(pictures: list[Picture], number: int) -> int:
    """The next picture of a different concept."""
    following = (*range(number + 1, len(pictures)), *range(number))
    return next(other for other in following if pictures[other].label != pictures[number].label)


@torch.no_grad()
def found(judge: Judge, pictures: list[Picture], images: Tensor) -> float:
    """The share of pictures nearer to their own label than to any other concept the model knows, in their style."""
    right = 0
    for style in sorted({picture.style for picture in pictures}):
        rows = [number for number, picture in enumerate(pictures) if picture.style == style]
        texts = judge.prompts([styled(label, style) for label in judge.labels])
        guesses = (images[rows] @ texts.T).argmax(dim=1).tolist()
        right += sum(judge.labels[guess] == pictures[row].label for guess, row in zip(guesses, rows, strict=True))
    return right / len(pictures)


if __name__ == "__main__":
    main()

"""Train the heads of the prompt alignment score, without the emoji that the diffusion model has never seen.

Frozen features are computed once, which takes minutes; the heads then train in seconds. Run it as
`python recipes/alignment.py`; the features are kept in `--cache` for the next time.
"""

import argparse
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_model
from torch import Tensor
from torch.nn import functional

from whenwhere.metrics.alignment import WEIGHTS, AlignmentHeads, contrast, cosines, recall
from whenwhere.metrics.features import PictureFeatures, SentenceFeatures
from whenwhere.train.colours import COLOURS
from whenwhere.train.data import CaptionOdds, Picture, caption, read_pictures, read_tiles, with_colours, withhold


@dataclass(frozen=True)
class Recipe:
    data: Path = Path("data/emoji")
    withheld: int = 30  # as in the diffusion recipe, so that the same pairs stay unseen
    seed: int = 0
    others: int = 2000  # pictures of concepts the diffusion model does not know, for a richer space
    repainted: int = 1000
    captions: int = 4  # different captions of each picture
    steps: int = 3000
    batch_size: int = 256
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    dropout: float = 0.1  # of the features
    odds: CaptionOdds = field(default_factory=lambda: CaptionOdds(empty=0.0, colour=0.3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=Path("runs/alignment.pt"))
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    args = parser.parse_args()
    recipe = Recipe()
    pictures, pixels, seen = material(recipe)
    if not args.cache.exists():
        args.cache.parent.mkdir(parents=True, exist_ok=True)
        torch.save(PictureFeatures()(pixels), args.cache)
    features = torch.load(args.cache, weights_only=True)
    heads = fit(recipe, features[seen], [pictures[number] for number in seen.tolist()])
    save_model(heads.half(), str(args.out))
    judge(heads.float().eval(), pictures, features, seen)


def material(recipe: Recipe) -> tuple[list[Picture], Tensor, Tensor]:
    """Pictures, their pixels, and the numbers of those to train on: plain, damaged and repainted ones.

    The pairs withheld from the diffusion model come last and are not among the numbers.
    """
    labels = (recipe.data / "clear.txt").read_text(encoding="utf-8").split("\n")[:-1]
    clear = withhold(read_pictures(recipe.data, labels), recipe.withheld, recipe.seed)
    generator = torch.Generator().manual_seed(recipe.seed)
    others = [picture for picture in read_pictures(recipe.data) if picture.label not in labels]
    others = [others[pick] for pick in torch.randperm(len(others), generator=generator)[: recipe.others].tolist()]
    named, pixels = with_colours(clear.training, read_tiles(recipe.data, clear.training))
    count = len(clear.training)
    some = (count + torch.randperm(len(named) - count, generator=generator)[: recipe.repainted]).tolist()
    plain, drawn = [*named[:count], *others], torch.cat([pixels[:count], read_tiles(recipe.data, others)])
    pictures = [*plain, *named[:count], *named[:count], *(named[pick] for pick in some), *clear.recombined]
    damaged = [damage(pixels[:count], generator), damage(pixels[:count], generator), damage(pixels[some], generator)]
    every = torch.cat([drawn, *damaged, read_tiles(recipe.data, clear.recombined)])
    return pictures, every, torch.arange(len(every) - len(clear.recombined))


def damage(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Shift by up to two pixels, blur or not, and add noise, so that drawn pictures are judged like real ones."""
    damaged = []
    for image in pixels:
        down, right = torch.randint(-2, 3, (2,), generator=generator).tolist()
        blur, noise = torch.rand(2, generator=generator).tolist()
        moved = torch.roll(image.float(), (down, right), dims=(1, 2))[None]
        if blur < 0.4:
            moved = functional.avg_pool2d(functional.pad(moved, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        damaged.append(moved + 25 * noise * torch.randn(moved.shape, generator=generator))
    return torch.cat(damaged).clamp(0, 255).byte()


def fit(recipe: Recipe, features: Tensor, pictures: list[Picture]) -> AlignmentHeads:
    """Heads trained with several captions of every picture."""
    generator = torch.Generator().manual_seed(recipe.seed)
    captions = [caption(picture, recipe.odds, generator) for _ in range(recipe.captions) for picture in pictures]
    different = list(dict.fromkeys(captions))
    place = {text: number for number, text in enumerate(different)}
    where = torch.tensor([place[text] for text in captions]).view(recipe.captions, len(pictures))
    sentences = SentenceFeatures()(different)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        heads = AlignmentHeads()
        optimiser = torch.optim.AdamW(heads.parameters(), recipe.learning_rate, weight_decay=recipe.weight_decay)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, recipe.steps)
        for _ in range(recipe.steps):
            picks = torch.randint(len(pictures), (recipe.batch_size,), generator=generator)
            wording = torch.randint(recipe.captions, (recipe.batch_size,), generator=generator)
            kept = functional.dropout(features[picks], recipe.dropout)
            loss = contrast(*heads(kept, sentences[where[wording, picks]]))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            decay.step()
    print(f"loss {loss.item():.3f}")
    return heads


@torch.no_grad()
def judge(heads: AlignmentHeads, pictures: list[Picture], features: Tensor, seen: Tensor) -> None:
    """Print how the heads do on pictures they never saw, against all labels, and on colours."""
    unseen = list(range(len(seen), len(pictures)))
    labels = sorted({picture.label for picture in pictures})
    prompts = SentenceFeatures()([pictures[number].label for number in unseen])
    image, text = heads(features[unseen], prompts)
    _, candidates = heads(features[:1], SentenceFeatures()(labels))
    answers = torch.tensor([labels.index(pictures[number].label) for number in unseen])
    print(f"unseen pairs: cosine {cosines(image, text).mean():.3f}, wrong {cosines(image, text.roll(1, 0)).mean():.3f}")
    print(f"recall@1 {recall(image, candidates, answers):.2f}, @5 {recall(image, candidates, answers, 5):.2f}")
    painted = [number for number in seen.tolist() if pictures[number].repainted]
    _, words = heads(features[:1], SentenceFeatures()([f"{colour}" for colour in COLOURS]))
    image, _ = heads(features[painted], features.new_zeros(len(painted), 384))
    right = torch.tensor([list(COLOURS).index(pictures[number].colour) for number in painted])
    print(f"colour of repainted pictures, of {len(COLOURS)}: {recall(image, words, right):.2f}")


if __name__ == "__main__":
    main()

"""The emoji sheet, its captions and splits."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from whenwhere.train.colours import COLOURS, main_colour, repaint
from whenwhere.train.data import (
    CaptionOdds,
    Picture,
    bare_name,
    caption,
    read_pictures,
    read_tiles,
    to_unit,
    with_colours,
    withhold,
)

EMOJI = Path(__file__).parents[1] / "data" / "emoji"
APPLE = Picture("red apple", ("fruit", "food", "ripe"), "food-drink", "noto", 0, colour="red")
DOG = Picture("dog face", ("animal", "pet"), "animals-nature", "flat", 1, colour="orange")
NEVER = CaptionOdds(empty=0, style=0, tags=0, and_tags=0, colour=0, repainted=0)


def captions(picture: Picture, odds: CaptionOdds, count: int = 200) -> Counter[str]:
    generator = torch.Generator().manual_seed(0)
    return Counter(caption(picture, odds, generator) for _ in range(count))


def dot(*colour: int) -> torch.Tensor:
    """A square of one colour on white, uint8 (3, 32, 32)."""
    image = torch.full((3, 32, 32), 255, dtype=torch.uint8)
    image[:, 8:24, 8:24] = torch.tensor(colour, dtype=torch.uint8)[:, None, None]
    return image


def test_the_sheet_holds_what_the_index_says():
    pictures = read_pictures(EMOJI)
    assert len(pictures) == 6930
    assert len({picture.label for picture in pictures}) == 1256
    assert {picture.style for picture in pictures} == {"noto", "blob", "twemoji", "flat", "shaded", "emojione"}
    assert sorted(picture.tile for picture in pictures) == list(range(6930))


def test_the_clear_concepts_exist_in_nearly_all_styles():
    labels = (EMOJI / "clear.txt").read_text(encoding="utf-8").split("\n")[:-1]
    styles = Counter(picture.label for picture in read_pictures(EMOJI, labels))
    assert set(styles) == set(labels)
    assert min(styles.values()) >= 5


def test_a_red_apple_is_red_on_white():
    pictures = read_pictures(EMOJI, ["red apple"])
    tiles = read_tiles(EMOJI, pictures)
    assert tiles.shape == (6, 3, 32, 32)
    assert tiles.dtype == torch.uint8
    assert (tiles[:, :, 0, 0] > 250).all()
    assert {main_colour(tile) for tile in tiles} == {"red"}


def test_an_unknown_concept_is_named():
    with pytest.raises(ValueError, match="no concept moose trap"):
        read_pictures(EMOJI, ["red apple", "moose trap"])


def test_bytes_become_minus_one_to_one():
    assert to_unit(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1, 1]


def test_a_caption_is_the_label_when_nothing_else_is_wanted():
    assert captions(APPLE, NEVER) == {"red apple": 200}


def test_the_empty_caption_comes_as_often_as_asked():
    assert 10 <= captions(APPLE, replace(NEVER, empty=0.1))[""] <= 30


def test_every_form_of_a_caption_occurs():
    found = captions(APPLE, CaptionOdds(), count=1000)
    assert {"", "red apple", "red apple, noto style", "fruit, noto style", "red apple, food, noto style"} <= set(found)
    assert sum(count for text, count in found.items() if text.endswith(", noto style")) > 600


def test_a_repainted_picture_names_its_colour_and_not_the_old_one():
    blue = replace(APPLE, colour="blue", repainted=True)
    assert captions(blue, replace(NEVER, style=1)) == {"blue apple, noto style": 200}


def test_an_animal_is_also_called_without_its_face():
    assert set(captions(DOG, NEVER)) == {"dog face", "dog"}
    assert bare_name(DOG) == "dog"


def test_one_style_is_withheld_from_each_chosen_concept():
    pictures = [Picture(label, (), "", style, 0) for label in "abcdef" for style in ("x", "y", "z")]
    split = withhold(pictures, concepts=4)
    assert len(split.training) == 14
    assert len({picture.label for picture in split.recombined}) == 4
    assert {picture.style for picture in split.recombined} == {"x", "y", "z"}
    assert set(split.training) | set(split.recombined) == set(pictures)
    assert withhold(pictures, concepts=4) == split


def test_a_concept_cannot_lose_its_only_style():
    with pytest.raises(ValueError, match="only 0 have more than one"):
        withhold([APPLE, DOG], concepts=1)


@pytest.mark.parametrize(("colour", "rgb"), [("red", (220, 20, 30)), ("green", (20, 200, 30)), ("blue", (20, 90, 220))])
def test_colours_are_recognised(colour, rgb):
    assert main_colour(dot(*rgb)) == colour


def test_grey_has_no_colour_and_stays_as_it_is():
    grey = dot(90, 90, 90)
    assert main_colour(grey) == ""
    assert torch.equal(repaint(grey, "red"), grey)


@pytest.mark.parametrize("colour", COLOURS)
def test_a_repainted_picture_has_the_new_colour_and_the_old_background(colour):
    painted = repaint(dot(220, 20, 30), colour)
    assert main_colour(painted) == colour
    assert (painted[:, 0, 0] == 255).all()


def test_repainting_keeps_other_colours():
    image = dot(220, 20, 30)
    image[:, 8:11, 8:24] = torch.tensor([20, 200, 30], dtype=torch.uint8)[:, None, None]  # a green leaf
    leaf = repaint(image, "blue")[:, 8:11, 8:24].float().mean(dim=(1, 2))
    assert leaf.argmax() == 1


def test_copies_are_painted_in_every_other_colour():
    pictures, pixels = with_colours(
        [replace(APPLE, colour=""), replace(DOG, colour="")], torch.stack([dot(220, 20, 30), dot(9, 9, 9)])
    )
    assert [picture.colour for picture in pictures] == ["red", "", *sorted(set(COLOURS) - {"red"})]
    assert [picture.repainted for picture in pictures] == [False, False] + [True] * 6
    assert len(pixels) == 8

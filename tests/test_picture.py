"""Pictures show what plans say: every decision has its colour, at its place."""

from dataclasses import replace

import pytest
from PIL import Image

from whenwhere import DeepCache, Plan, TGate, plan
from whenwhere.picture import Column, beside, draw_plan, draw_sheet, enlarge, stack
from whenwhere.picture.chart import _COLOURS, _NOWHERE

GATED = plan("sd15", TGate(gate_step=5), DeepCache(interval=3), steps=12)


def share_of(image: Image.Image, colour: str) -> float:
    """The share of the pixels that have exactly this colour."""
    wanted = tuple(bytes.fromhex(colour[1:]))
    counted = {value: count for count, value in image.getcolors(1 << 24)}
    return counted.get(wanted, 0) / (image.width * image.height)


def test_every_decision_of_the_plan_is_seen():
    image = draw_plan(GATED)
    for colour in (*_COLOURS.values(), _NOWHERE):
        assert share_of(image, colour) > 0.005, colour


def test_what_the_plan_does_not_hold_is_not_in_its_legend():
    image = draw_plan(plan("sd15", steps=12))
    assert share_of(image, _COLOURS["computed"]) > 0.05
    for colour in (_COLOURS["reused"], _COLOURS["one guidance branch"], _NOWHERE):
        assert share_of(image, colour) == 0, colour


def test_rows_run_from_top_to_bottom_and_steps_from_left_to_right():
    image = draw_plan(GATED)
    orange = tuple(bytes.fromhex(_COLOURS["one guidance branch"][1:]))
    model = next(y for y in range(image.height) if orange in {image.getpixel((x, y)) for x in range(image.width)}) + 4
    row = [image.getpixel((x, model)) for x in range(image.width)]
    blue = tuple(bytes.fromhex(_COLOURS["computed"][1:]))
    assert max(i for i, p in enumerate(row) if p == blue) < min(i for i, p in enumerate(row) if p == orange)
    assert row.count(orange) / row.count(blue) == pytest.approx(7 / 5, rel=0.05)


def test_decisions_that_are_not_known_yet_get_colours_of_their_own():
    unknown = replace(GATED, legend={**GATED.legend, "/": "something new"})
    assert share_of(draw_plan(unknown), "#009E73") > 0.005


@pytest.mark.parametrize("steps", [1, 7, 60, 1000])
def test_any_number_of_steps_fits(steps):
    image = draw_plan(Plan("plan", "Tiny", (), GATED.sites[:1], ("#" * steps,), GATED.legend, None), width=400)
    assert image.width == 800


def test_a_sheet_holds_every_picture_in_its_colour():
    colours = ("#ff0000", "#00ff00", "#0000ff")
    columns = [
        Column(f"a rather long heading {colour}", [Image.new("RGB", (32, 32), colour)] * 2, ["1.5x"], apart=number == 1)
        for number, colour in enumerate(colours)
    ]
    sheet = draw_sheet(columns, ["seed 0", "a longer label, seed 1"], "title", "subtitle", edge=50)
    for colour in colours:
        assert share_of(sheet, colour) == pytest.approx(2 * 100 * 100 / (sheet.width * sheet.height))


def test_small_pictures_are_enlarged_without_blur():
    small = Image.new("RGB", (2, 1))
    small.putpixel((1, 0), (255, 255, 255))
    assert enlarge(small, 8).getcolors() == [(16, (255, 255, 255)), (16, (0, 0, 0))]
    assert enlarge(small, 8).size == (8, 4)


def test_pictures_are_put_together_on_white():
    red, blue = Image.new("RGB", (4, 2), "#ff0000"), Image.new("RGB", (2, 6), "#0000ff")
    assert stack([red, blue]).size == (4, 8)
    assert beside([red, blue]).size == (6, 6)
    assert beside([red, blue]).getpixel((0, 5)) == (255, 255, 255)

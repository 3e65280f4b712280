"""At full size Skip-DiT and Skip-Latte cost what the paper says, with and without Skip-Cache (version 1 of it)."""

from functools import cache
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler

import whenwhere
from whenwhere import Plan, SkipCache
from whenwhere.models import SkipDiTTransformer2DModel, SkipLatteTransformer3DModel

TERA = 1e12
STEPS = 50


@cache
def network(name: str) -> SkipDiTTransformer2DModel | SkipLatteTransformer3DModel:
    """Full size, without weights."""
    with torch.device("meta"):
        if name == "class-to-image":
            return SkipDiTTransformer2DModel(out_channels=8).half()
        if name == "class-to-video":
            return SkipLatteTransformer3DModel(num_layers=14, sample_size=32, num_classes=101).half()
        return SkipLatteTransformer3DModel(num_layers=28, sample_size=64, caption_channels=4096).half()


@cache
def planned(name: str, *methods: SkipCache) -> Plan:
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(STEPS)
    return whenwhere.plan(network(name), *methods, steps=STEPS, scheduler=scheduler)


# Figures in T of a whole run: plain, then by N, start_timestep and stop_timestep.
PLAIN = {"class-to-video": 290.05, "text-to-video": 1648.13}
CACHED = [
    ("class-to-video", (2, 900, 50), 180.68),
    ("class-to-video", (3, 900, 50), 145.87),
    ("class-to-video", (4, 900, 50), 125.99),
    ("class-to-video", (5, 900, 50), 121.02),
    ("class-to-video", (6, 900, 50), 111.07),
    ("text-to-video", (2, 700, 50), 1127.83),
    ("text-to-video", (3, 700, 50), 974.80),
    ("text-to-video", (4, 700, 50), 882.98),
    ("text-to-video", (2, 800, 50), 1066.62),
    ("text-to-video", (3, 800, 50), 852.38),
    ("text-to-video", (4, 800, 50), 760.56),
]


@pytest.mark.parametrize(("name", "window", "published"), CACHED)
def test_skip_cache_saves_what_was_published(name, window, published):
    interval, start, stop = window
    cost = planned(name, SkipCache(interval, 1, start, stop)).cost
    assert cost.macs.papers / cost.baseline.papers == pytest.approx(published / PLAIN[name], rel=1e-4)


def test_text_to_video_costs_what_was_published():
    """The plan reckons with 77 tokens of text; the pipeline cuts the text to the longest prompt."""
    assert planned("text-to-video").cost.macs.papers / TERA == pytest.approx(PLAIN["text-to-video"], rel=5e-3)


def test_class_to_video_costs_what_was_published():
    """The published figure is that of three videos of one branch each, or of one and a half with two."""
    assert planned("class-to-video").cost.macs.papers / TERA * 3 / 2 == pytest.approx(PLAIN["class-to-video"], rel=1e-3)


def test_a_long_skip_costs_two_products_of_the_width():
    """14 of them add 9.5 G to the 118 G of DiT-XL/2, all products counted."""
    one = planned("class-to-image").cost.baseline.all / STEPS / 2
    with torch.device("meta"):
        fewer = SkipDiTTransformer2DModel(out_channels=8, skip_pairs=1).half()
    rest = whenwhere.plan(fewer, steps=1, guidance=False).cost.baseline.all
    assert one - rest == 13 * 256 * 2 * 1152**2
    assert one / 1e9 == pytest.approx(128, abs=0.5)


def test_the_page_shows_the_plan_as_it_is_printed():
    page = (Path(__file__).parent.parent / "docs" / "methods" / "skipdit.md").read_text(encoding="utf-8")
    printed = planned("class-to-image", SkipCache(2, 4, 1000, 20))
    assert "\n".join(line.rstrip() for line in str(printed).splitlines()) in page

"""An anatomy turns a model into sites: roles, order of execution, the skip ladder."""

from dataclasses import replace

import pytest
from fakes import TOWER, Tower
from torch import nn

from whenwhere.anatomy import Anatomy, Part, Rung, find, walk
from whenwhere.site import Kind, Side


def described(sites):
    return [(site.path, site.index, site.count) for site in sites]


def test_sites_come_in_the_order_of_execution_numbered_within_their_kind():
    assert described(walk(Tower(2), TOWER)) == [
        ("", 0, 1),
        ("blocks.0", 0, 2),
        ("blocks.0.attn", 0, 2),
        ("blocks.1", 1, 2),
        ("blocks.1.attn", 1, 2),
    ]


def test_block_ten_runs_after_block_nine():
    paths = [site.path for site in walk(Tower(11), TOWER) if site.kind is Kind.BLOCK]
    assert paths == [f"blocks.{i}" for i in range(11)]


def test_groups_run_one_after_another_and_their_members_take_turns():
    model = nn.ModuleDict({name: nn.ModuleList(nn.Linear(1, 1) for _ in range(2)) for name in ("up", "b", "a")})
    parts = (Part(Kind.MODEL, ""), *(Part(Kind.LAYER, f"{name}.*") for name in ("up", "b", "a")))
    anatomy = Anatomy("ModuleDict", parts, sequence=(("a", "b"), ("up",)), rows=())
    paths = [site.path for site in walk(model, anatomy)]
    assert paths == ["", "a.0", "b.0", "a.1", "b.1", "up.0", "up.1"]


def test_sites_inside_a_block_bear_its_number():
    assert [(site.path, site.block) for site in walk(Tower(2), TOWER)] == [
        ("", None),
        ("blocks.0", 0),
        ("blocks.0.attn", 0),
        ("blocks.1", 1),
        ("blocks.1.attn", 1),
    ]


@pytest.mark.parametrize(
    ("blocks", "depths", "sides"),
    [(6, [0, 1, 2, 2, 1, 0], "EEMMDD"), (5, [0, 1, 2, 1, 0], "EEMDD"), (4, [0, 1, 1, 0], "EMMD")],
)
def test_long_skips_join_a_block_and_its_mirror_image(blocks, depths, sides):
    sites = [site for site in walk(Tower(blocks), replace(TOWER, mirrored=True)) if site.kind is Kind.BLOCK]
    letters = {Side.ENCODER: "E", Side.MIDDLE: "M", Side.DECODER: "D"}
    assert [site.depth for site in sites] == depths
    assert "".join(letters[site.side] for site in sites) == sides


def test_an_encoder_layer_and_the_decoder_layer_that_pops_its_skip_have_the_same_depth():
    names = ("down", "middle", "up")
    model = nn.ModuleDict({name: nn.ModuleList(nn.Linear(1, 1) for _ in range(2)) for name in names})
    rungs = (Rung.NEXT, Rung.BOTTOM, Rung.BACK)
    sides = (Side.ENCODER, Side.MIDDLE, Side.DECODER)
    del model["middle"][1]
    parts = (Part(Kind.LAYER, f"{n}.*", side, rung) for n, side, rung in zip(names, sides, rungs, strict=True))
    anatomy = Anatomy("ModuleDict", (Part(Kind.MODEL, ""), *parts), sequence=tuple((n,) for n in names), rows=())
    assert [(site.path, site.depth, site.carries) for site in walk(model, anatomy)] == [
        ("", None, False),
        ("down.0", 1, False),
        ("down.1", 2, False),
        ("middle.0", 3, True),
        ("up.0", 2, True),
        ("up.1", 1, True),
    ]


def test_the_anatomy_of_a_class_serves_the_classes_derived_from_it():
    class Tall(Tower):
        pass

    assert find(Tall(1), [TOWER]) is TOWER


def test_an_unknown_family_is_refused_with_those_that_are_known():
    with pytest.raises(ValueError, match=r"Linear has no anatomy.*Known: Tower.*anatomy=Anatomy"):
        find(nn.Linear(1, 1), [TOWER])


def test_an_anatomy_without_the_model_itself_is_refused():
    with pytest.raises(ValueError, match=r"'Tower' lacks the model itself"):
        walk(Tower(2), replace(TOWER, parts=TOWER.parts[1:]))


def test_an_anatomy_that_matches_nothing_is_refused():
    with pytest.raises(ValueError, match="no row of the anatomy 'Tower' matches"):
        walk(nn.Linear(1, 1), TOWER)

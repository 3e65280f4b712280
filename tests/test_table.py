"""The table: recalls of nothing become computations, what is inside a recall is not reached, keeps serve somebody."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
from fakes import TOWER, Every, Tower

from whenwhere import Method
from whenwhere.anatomy import walk
from whenwhere.clock import lay_out
from whenwhere.decision import Compute, Reuse, outline, whole
from whenwhere.site import Kind
from whenwhere.table import lay

SITES = tuple(walk(Tower(2), TOWER))  # the model, block 0, its attention, block 1, its attention


@dataclass(frozen=True)
class Written(Method):
    """Decisions of one kind of site, a character a step: # computes and keeps, . reuses, - has no opinion."""

    kind: Kind
    row: str
    renewing: tuple[int, ...] = ()

    kinds: ClassVar = frozenset(Kind)

    def decide(self, site, step):
        if site.kind is not self.kind:
            return None
        return {"#": Compute(whole), ".": Reuse(), "-": None}[self.row[step.index]]

    def renews(self, step):
        return step.index in self.renewing


def drawn(*methods, steps=6):
    """The table as rows of characters; K is a computation that is kept."""
    columns = lay(SITES, methods, lay_out([None] * steps, 1, 1))

    def cell(column, i):
        if not column.reached[i]:
            return " "
        decisions = [opinion.decision for opinion in column.opinions[i]]
        return "".join("K" if d.keeps else d.symbol for d in decisions) or "#"

    return ["".join(cell(column, i) for column in columns) for i in range(len(SITES))]


def test_sites_inside_a_reused_block_are_not_reached():
    assert drawn(Every(3)) == ["######", "K..K..", "#  #  ", "K..K..", "#  #  "]


def test_a_recall_where_nothing_is_remembered_computes_and_keeps():
    assert drawn(Written(Kind.BLOCK, "..#..."))[1] == "K.K..."


def test_nothing_is_kept_that_nobody_recalls():
    assert drawn(Written(Kind.BLOCK, "##.#.#"))[1] == "#K.K.#"


def test_what_is_kept_once_is_recalled_until_it_is_kept_anew():
    assert drawn(Written(Kind.BLOCK, "#--.-."))[1] == "K##.#."


def test_a_recall_behind_another_methods_recall_needs_nothing():
    """The attention inside a reused block is never reached, so its keep is dropped."""
    assert drawn(Written(Kind.BLOCK, "#....."), Written(Kind.SELF_ATTENTION, "#....."))[2] == "#     "


def test_a_site_that_was_not_reached_remembers_what_it_was_before():
    assert drawn(Written(Kind.BLOCK, "#.-.-."), Written(Kind.SELF_ATTENTION, "#....."))[2] == "K . . "


def test_two_opinions_on_one_site_stand_in_the_order_of_the_methods():
    inner, outer = Written(Kind.BLOCK, "##.#.."), Written(Kind.BLOCK, "--#..-")
    columns = lay(SITES, (outer, inner), lay_out([None] * 6, 1, 1))
    assert [[opinion.method for opinion in column.opinions[1]] for column in columns] == [
        [],
        [1],
        [0, 1],
        [0],
        [0],
        [1],
    ]


def test_a_renewing_method_makes_the_others_compute_and_keep():
    assert drawn(Every(4), Written(Kind.MODEL, "------", renewing=(2,)))[1] == "K.K.K."


def test_a_renewing_method_does_not_renew_itself():
    assert drawn(Written(Kind.BLOCK, "#.....", renewing=(3,)))[1] == "K....."


def test_passes_remember_apart_from_each_other():
    columns = lay(SITES, (Written(Kind.BLOCK, "#....."),), lay_out([None] * 6, 1, 2))
    assert [opinion.decision for column in columns[:4] for opinion in column.opinions[1]] == [
        Compute(whole),
        Compute(whole),
        Reuse(),
        Reuse(),
    ]


@pytest.mark.parametrize("keep", [whole, outline])
def test_a_recall_that_has_to_run_keeps_what_it_says(keep):
    assert Reuse(keep).fresh() == Compute(keep)

"""The layout of a guidance batch: which rows are which branch, and which arguments hold rows."""

from types import SimpleNamespace

import pytest
import torch
from fakes import TOWER
from pipelines import build, run

from whenwhere.anatomy import Role
from whenwhere.families import DIT, FLUX, UNET
from whenwhere.layout import Branches, argument_reader, branches_of, declared_roles, repeat_rows, settle, take_rows

CONDITIONAL, UNCONDITIONAL = Role.CONDITIONAL, Role.UNCONDITIONAL


def pair(*roles, samples=1):
    return Branches(roles, samples, ("x",), roles[0])


def test_the_rows_of_a_branch_are_its_equal_part():
    branches = pair(UNCONDITIONAL, CONDITIONAL, samples=2)
    rows = torch.arange(4)
    assert rows[branches.rows_of(UNCONDITIONAL, 4)].tolist() == [0, 1]
    assert rows[branches.rows_of(CONDITIONAL, 4)].tolist() == [2, 3]


def test_frames_folded_into_rows_stay_with_their_branch():
    branches = pair(UNCONDITIONAL, CONDITIONAL)
    assert torch.arange(6)[branches.rows_of(CONDITIONAL, 6)].tolist() == [3, 4, 5]


def test_a_branch_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="holds the branches conditional; there is no image one"):
        pair(CONDITIONAL).rows_of(Role.IMAGE, 1)


def test_the_mean_is_taken_over_the_branches_of_every_sample():
    branches = pair(UNCONDITIONAL, CONDITIONAL, samples=2)
    assert branches.mean(torch.tensor([[1.0], [2.0], [5.0], [8.0]])).tolist() == [[3.0], [5.0]]


def test_rows_are_taken_from_every_tensor_that_has_as_many_however_deep():
    value = {"a": torch.arange(4), "b": [torch.arange(3), (torch.arange(4) + 10, None)], "c": torch.tensor(5), "d": 1}
    taken = take_rows(value, slice(2, 4), 4)
    assert taken["a"].tolist() == [2, 3]
    assert taken["b"][0].tolist() == [0, 1, 2]
    assert taken["b"][1][0].tolist() == [12, 13]
    assert taken["b"][1][1] is None
    assert (taken["c"].item(), taken["d"]) == (5, 1)


def test_rows_are_repeated_in_every_tensor_of_an_output():
    (output, (inner,)) = repeat_rows((torch.tensor([1, 2]), [torch.tensor([3])]), 2)
    assert output.tolist() == [1, 2, 1, 2]
    assert inner.tolist() == [3, 3]


@pytest.mark.parametrize(("rows", "samples", "roles"), [(4, 2, TOWER.roles), (2, 2, (CONDITIONAL,))])
def test_the_branches_are_what_the_scheduler_does_not_move(rows, samples, roles):
    assert settle(TOWER, TOWER.roles, rows, samples).roles == roles


@pytest.mark.parametrize(("rows", "samples"), [(3, 2), (6, 2), (1, 2)])
def test_rows_that_nobody_declared_are_an_error(rows, samples):
    with pytest.raises(RuntimeError, match=f"saw {rows} rows and the scheduler moved {samples} samples"):
        settle(TOWER, TOWER.roles, rows, samples)


@pytest.mark.parametrize(
    ("told", "anatomy", "roles"),
    [
        ({}, UNET, None),
        ({"do_classifier_free_guidance": False}, UNET, (CONDITIONAL,)),
        ({"do_classifier_free_guidance": True}, UNET, (UNCONDITIONAL, CONDITIONAL)),
        ({"do_classifier_free_guidance": True}, DIT, (CONDITIONAL, UNCONDITIONAL)),
        ({"do_classifier_free_guidance": True}, FLUX, (CONDITIONAL,)),
        (
            {"do_classifier_free_guidance": True, "do_perturbed_attention_guidance": True},
            UNET,
            (UNCONDITIONAL, CONDITIONAL, Role.PERTURBED),
        ),
        (
            {"do_classifier_free_guidance": False, "do_perturbed_attention_guidance": True},
            UNET,
            (CONDITIONAL, Role.PERTURBED),
        ),
    ],
)
def test_a_pipeline_declares_its_branches(told, anatomy, roles):
    assert declared_roles(SimpleNamespace(**told), anatomy) == roles


def test_instruct_pix2pix_puts_text_image_and_nothing_in_this_order():
    pipe = build("sd-pix2pix")
    run("sd-pix2pix", pipe, steps=1)
    assert declared_roles(pipe, UNET) == (CONDITIONAL, Role.IMAGE, UNCONDITIONAL)


def test_arguments_are_named_and_ordered_as_in_the_signature():
    def forward(self, first, second, third=None):
        pass

    named = argument_reader(forward)
    assert list(named((1,), {"third": 3, "second": 2})) == ["first", "second", "third"]
    assert list(named((), {"second": 2, "first": 1, "fourth": 4})) == ["first", "second", "fourth"]


def test_a_familys_layout_names_its_arguments_and_its_survivor():
    branches = branches_of(UNET, UNET.roles, 3)
    assert (branches.samples, branches.survivor) == (3, UNCONDITIONAL)
    assert "added_cond_kwargs" in branches.arguments

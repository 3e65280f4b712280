"""Costs: what is counted, in both conventions, and what a table adds up to."""

import re

import pytest
import torch
from fakes import TOWER, Every, Tower, doubling_pipeline
from pipelines import build, run
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from whenwhere import DeepCache, GuidanceStop, attach, plan
from whenwhere.anatomy import walk
from whenwhere.pricing.cost import Macs, PricingError, count, measure, meta_twin

PRODUCT = 3 * 4 * 5


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_linear_layer_is_no_product_of_attention_however_its_input_lies_in_memory(device):
    layer = nn.Linear(4, 5, device=device)
    for features in (torch.zeros(2, 3, 4, device=device), torch.zeros(2, 4, 3, device=device).mT):
        _, macs = count(lambda features=features: layer(features))
        assert macs == Macs(2 * PRODUCT, 2 * PRODUCT)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("masked", [False, True])
def test_the_products_of_attention_are_counted_apart(device, masked):
    """Three tokens ask six of width four, in two heads: 3 x 6 x 4 for the scores, and as many for the values."""
    q, k, v = (torch.zeros(1, 2, n, 4, device=device) for n in (3, 6, 6))
    mask = torch.zeros(3, 6, device=device) if masked else None
    _, macs = count(lambda: scaled_dot_product_attention(q, k, v, mask))
    assert macs == Macs(2 * 2 * 3 * 6 * 4, 0)


def test_attention_written_as_products_counts_the_same():
    q, k = torch.zeros(2, 3, 4), torch.zeros(2, 6, 4)
    for product in (lambda: torch.bmm(q, k.mT), lambda: torch.baddbmm(torch.zeros(2, 3, 6), q, k.mT)):
        assert count(product)[1] == Macs(2 * 3 * 6 * 4, 0)


def test_counting_returns_what_was_run_and_counts_one_model_of_several():
    tower, other = Tower(3), nn.Linear(1, 7)
    output, everything = count(lambda: other(tower(torch.ones(2, 1))))
    assert output.shape == (2, 7)
    assert everything.all == 2 * (3 + 7)
    assert count(lambda: other(tower(torch.ones(2, 1))), tower)[1].all == 2 * 3
    assert count(lambda: None, tower)[1] == Macs()


def test_every_site_is_priced_for_one_row():
    tower = Tower(3)
    units = measure(tower, tuple(walk(tower, TOWER)), {"hidden_states": torch.empty(4, 1, device="meta")})
    assert [unit.macs.all for unit in units] == [3, 1, 1, 1, 1, 1, 1]
    assert {unit.bytes for unit in units} == {(4,)}
    assert units[0].part("blocks.0", "blocks.2.attn", "nowhere") == Macs(2, 2)


def test_a_twin_has_no_weights_and_none_of_what_stands_in_front():
    pipe = doubling_pipeline(blocks=1)
    with attach(pipe, Every(2), anatomy=TOWER):
        twin = meta_twin(pipe.transformer)
        assert {parameter.device.type for parameter in twin.parameters()} == {"meta"}
        assert not any("forward" in vars(module) for module in twin.modules())
        assert pipe([1.0, 2.0]) == [2.0, 2.0]
    assert pipe.transformer.blocks[0].attn.weight.device.type == "cpu"


def test_the_cost_of_a_table_is_a_sum_by_hand():
    """Two rows a step, three blocks: 6 MACs in full; reused blocks cost nothing; half of a batch costs half."""
    pipe = doubling_pipeline(blocks=3)
    inputs = [(1.0, 2.0)] * 5
    for methods, spent, held in (
        ([Every(2)], 6 + 0 + 6 + 0 + 6, 3 * 2 * 4),
        ([Every(5)], 6 + 0 + 0 + 0 + 0, 3 * 2 * 4),
        ([GuidanceStop(3)], 6 + 6 + 6 + 3 + 3, 0),
        ([GuidanceStop(3), Every(5)], 6 + 0 + 0 + 3 + 0, 3 * 2 * 4),  # where the batch shrinks all is computed anew
    ):
        with attach(pipe, *methods, anatomy=TOWER) as attachment:
            _, counted = count(lambda: pipe(inputs))
            cost = attachment.plan.cost
            assert (cost.macs.all, cost.baseline.all, cost.bytes) == (spent, 30, held)
            assert (counted, attachment.trace.held) == (cost.macs, held)


def test_a_network_that_cannot_be_counted_is_carried_out_all_the_same():
    """Its table says why there are no multiply-adds in it; some quantised layers are such."""

    class Packed(nn.Linear):
        def forward(self, tokens):
            return torch.ops.packed.linear(tokens, self.weight)

    pipe = build("sd")
    with torch.library._scoped_library("packed", "DEF") as library:
        library.define("linear(Tensor tokens, Tensor weight) -> Tensor")
        library.impl("linear", nn.functional.linear, "CPU")
        pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q.__class__ = Packed
        with attach(pipe, DeepCache(3)) as attached:
            run("sd", pipe, steps=6)
            trace, planned = attached.trace, plan(pipe, DeepCache(3), steps=6)
    assert trace.row("mid_block") == planned.row("mid_block") == "#..#.."
    assert trace.cost is planned.cost is None
    assert trace.held > 0
    reason = "the multiply-adds of UNet2DConditionModel cannot be counted: .*packed::linear"
    assert re.search(reason, str(trace))
    with pytest.raises(PricingError, match=reason):
        _ = planned.priced

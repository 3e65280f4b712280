"""Training and scoring whole texts are one graph: nothing waits for the device, no shape depends on the data."""

import pytest
import torch
from tiny_language import routed, text
from torch import Tensor, nn

from whenwhere.lm import SDT, STT, MoD, set_step

short = pytest.mark.parametrize("routing", [MoD(), SDT(), STT()], ids=lambda routing: type(routing).__name__)


class Scoring(nn.Module):
    """A model as a function of tokens alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.model(ids, policy="topk", use_cache=False).logits
        return logits


@short
def test_a_step_of_training_is_one_graph(routing):
    torch._dynamo.reset()
    ids, model = text(), routed(routing, num_hidden_layers=2).train()
    set_step(model, 0, 10)
    plain = model(ids, labels=ids).loss
    plain.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    loss = torch.compile(model, fullgraph=True, backend="eager")(ids, labels=ids).loss
    loss.backward()
    torch.testing.assert_close(loss, plain)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name])
    assert list(model.notes) == [1]
    torch._dynamo.reset()


@short
def test_scoring_is_exported_for_every_length_that_the_budget_divides(routing):
    model = routed(routing, num_hidden_layers=2)
    count = 2 * torch.export.Dim("count", min=2, max=32)
    program = torch.export.export(Scoring(model).eval(), (text(),), dynamic_shapes={"ids": {1: count}})
    for tokens in (16, 30):
        ids = text(2, tokens)
        with torch.no_grad():
            torch.testing.assert_close(program.module()(ids), Scoring(model)(ids), atol=1e-5, rtol=1e-5)

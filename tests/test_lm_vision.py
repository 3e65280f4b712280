"""A vision Transformer skips its second layers where nothing surprised: exact where nothing skips, and it learns."""

import pytest
import torch
from tiny_language import dense
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import ViTConfig, ViTModel

from whenwhere.lm import SDT, route_vision
from whenwhere.pricing.counting import Counting

PATCHES, WIDTH = 16, 32


def vision(layers: int = 5) -> ViTModel:
    config = ViTConfig(
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        image_size=16,
        patch_size=4,
        num_channels=1,
        initializer_range=0.2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ViTModel(config, add_pooling_layer=False).eval()


def pictures(rows: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(rows, 1, 16, 16, generator=torch.Generator().manual_seed(seed))


def test_where_nothing_skips_it_is_the_dense_model():
    plain = vision()
    model = route_vision(plain, SDT(capacity=1))
    expected = plain(pixel_values=pictures()).last_hidden_state
    assert torch.equal(model(pixel_values=pictures()).last_hidden_state, expected)
    assert model.layers[0].second.mlp.fc1.weight is plain.layers[1].mlp.fc1.weight
    assert len(plain.layers) == 5


def test_every_picture_selects_its_own_patches_and_the_class():
    model, notes, alone = route_vision(vision(), SDT(surprise="relative", capacity=0.5)), {}, {}
    together = model(pixel_values=pictures(), routing_notes=notes).last_hidden_state
    single = model(pixel_values=pictures()[1:2], routing_notes=alone).last_hidden_state
    torch.testing.assert_close(together[1:2], single)
    assert list(notes) == [1, 3]
    for index, note in notes.items():
        assert note.mask.sum(1).tolist() == [(PATCHES + 1) // 2] * 3
        assert note.mask[:, 0].all()
        assert torch.equal(note.mask[1:2], alone[index].mask)
        ranked = note.score[:, 1:].argsort(1, descending=True)[:, : (PATCHES + 1) // 2 - 1] + 1
        assert note.mask.gather(1, ranked).all()
    assert not torch.equal(notes[1].mask, notes[3].mask)


def test_skipped_patches_pass_by_and_cost_nothing():
    plain = vision(2)
    model, notes = route_vision(plain, SDT(capacity=0.25)), {}
    first = plain.layers[0](plain.embeddings(pictures()))
    with torch.no_grad():
        found = model(pixel_values=pictures(), routing_notes=notes).last_hidden_state
    skipped = ~notes[1].mask
    torch.testing.assert_close(found[skipped], plain.layernorm(first)[skipped])
    counted = []
    for each in (plain, model):
        with Counting() as counting, torch.no_grad():
            each(pixel_values=pictures(1))
        counted.append(counting.macs()["Global"].all)
    tokens, run = PATCHES + 1, (PATCHES + 1) // 4
    layer = 4 * WIDTH**2 + 2 * WIDTH * 64
    saved = (tokens - run) * layer + 2 * WIDTH * (tokens**2 - run**2)
    assert counted[0] - counted[1] == saved - tokens * 3 * WIDTH * 2  # the guess, whose middle is 2


def test_it_learns_with_its_guesses():
    with torch.random.fork_rng():
        torch.manual_seed(1)  # of the guesses and the head
        model, head = route_vision(vision(), SDT(surprise="relative")).train(), torch.nn.Linear(WIDTH, 2)
    optimiser = torch.optim.AdamW([*model.parameters(), *head.parameters()], 3e-3)
    losses, guesses = [], []
    for step in range(40):
        images, side = pictures(16, step), torch.arange(16) % 2
        images[side == 0, :, :, :8] += 1
        images[side == 1, :, :, 8:] += 1
        notes = {}
        hidden = model(pixel_values=images, routing_notes=notes).last_hidden_state
        guess = sum(loss for note in notes.values() for loss in note.losses.values())
        loss = cross_entropy(head(hidden[:, 0]), side)
        (loss + guess).backward()
        assert model.layers[0].router.criterion.raw_m_cu.grad.abs() > 0
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
        guesses.append(guess.item())
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    assert sum(guesses[-5:]) < sum(guesses[:5])


def test_what_does_not_fit_is_refused():
    with pytest.raises(TypeError, match="LlamaForCausalLM cannot be routed as a vision Transformer"):
        route_vision(dense(), SDT())
    with pytest.raises(ValueError, match="SDT without bypass, student and routed_layers"):
        route_vision(vision(), SDT(bypass="prior"))
    model = route_vision(vision(), SDT())
    with pytest.raises(ValueError, match="whole pictures; leave attention_mask out"):
        model.layers[0](torch.zeros(1, 17, WIDTH), torch.ones(1, 1, 17, 17, dtype=torch.bool))

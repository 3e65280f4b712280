"""The training loop, on models small enough to train in a second."""

import json
from itertools import count
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from whenwhere.train.data import CaptionOdds, Picture
from whenwhere.train.diffusion import Batch, TrainConfig, corrupt, rate, train
from whenwhere.train.latents import drawer
from whenwhere.train.state import TrainState
from whenwhere.train.words import join, learn_merges, learn_tokenizer, spell


def noising() -> DDPMScheduler:
    return DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")


def tiny_state() -> TrainState:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=4,
            in_channels=2,
            out_channels=2,
            down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("CrossAttnUpBlock2D",),
            block_out_channels=(8,),
            layers_per_block=1,
            norm_num_groups=2,
            attention_head_dim=1,
            cross_attention_dim=8,
        )
        text = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=16,
                hidden_size=8,
                intermediate_size=8,
                num_hidden_layers=1,
                num_attention_heads=1,
                max_position_embeddings=4,
                bos_token_id=0,
                eos_token_id=1,
                pad_token_id=1,
            )
        )
    return TrainState(unet, text)


def draw(size: int, generator: torch.Generator) -> Batch:
    """Two pictures, one of ones and one of minus ones, and the words for them."""
    picks = torch.randint(2, (size,), generator=generator)
    latents = (1.0 - 2 * picks).view(-1, 1, 1, 1).expand(size, 2, 4, 4)
    return Batch(latents, torch.stack([torch.zeros_like(picks), picks + 2, torch.ones_like(picks)], dim=1))


def run(state: TrainState, config: TrainConfig, out: Path, **kwargs) -> TrainState:
    return train(state, noising(), draw, config, out, clock=count().__next__, **kwargs)


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "loss.jsonl").read_text().splitlines()]


def weights(state: TrainState) -> torch.Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in [*state.parameters, *state.mean.values]])


def test_the_loss_falls_and_is_recorded(tmp_path):
    run(tiny_state(), TrainConfig(budget=1e9, steps=60, learning_rate=1e-2, log_every=10), tmp_path)
    losses = [row["loss"] for row in rows(tmp_path)]
    assert len(losses) == 6
    assert losses[-1] < 0.6 * losses[0]
    assert rows(tmp_path)[-1]["images"] == 60 * 16


def test_the_budget_ends_the_run(tmp_path):
    assert run(tiny_state(), TrainConfig(budget=7), tmp_path).step == 7  # the clock ticks once a step


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path):
    config = TrainConfig(budget=1e9, steps=8, log_every=1, save_every=0)
    whole = run(tiny_state(), config, tmp_path / "whole")

    def interrupt(state: TrainState) -> None:
        if state.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tiny_state(), config, tmp_path / "halves", watch=[interrupt])
    resumed = run(tiny_state(), config, tmp_path / "halves")
    assert resumed.step == whole.step == 8
    assert torch.equal(weights(resumed), weights(whole))


def test_a_finished_run_is_left_as_it_is(tmp_path):
    config = TrainConfig(budget=5)
    first = run(tiny_state(), config, tmp_path)
    assert torch.equal(weights(run(tiny_state(), config, tmp_path)), weights(first))


def test_the_running_mean_lends_its_weights_and_takes_them_back():
    state = tiny_state()
    before = weights(state)
    state.mean.values = [torch.full_like(value, 3) for value in state.mean.values]
    with state.mean.held():
        assert all((parameter == 3).all() for parameter in state.parameters)
    assert torch.equal(weights(state)[: len(before) // 2], before[: len(before) // 2])


def test_the_running_mean_follows_slowly():
    state = tiny_state()
    state.step = 10**6
    state.mean.values = [torch.zeros_like(value) for value in state.mean.values]
    state.mean.follow(state.step, 0.9)
    assert torch.allclose(state.mean.values[0], 0.1 * state.parameters[0].detach())


def test_the_learning_rate_rises_and_falls_with_the_share_of_the_run():
    assert rate(0.0, 0.1) == pytest.approx(0.01)
    assert rate(0.1, 0.1) == pytest.approx(0.9755, abs=1e-4)
    assert rate(0.5, 0.1) == pytest.approx(0.5)
    assert rate(1.0, 0.1) == pytest.approx(0.0)


def test_the_velocity_leads_back_to_the_picture():
    latents = torch.randn(6, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    noised = corrupt(latents, noising(), TrainConfig(budget=1), torch.Generator().manual_seed(1))
    kept = noising().alphas_cumprod[noised.timesteps].view(-1, 1, 1, 1)
    assert torch.allclose(kept.sqrt() * noised.noisy - (1 - kept).sqrt() * noised.velocity, latents, atol=1e-5)


def test_weights_are_small_at_both_ends_but_never_below_the_least():
    config = TrainConfig(budget=1, gamma=5.0, least_weight=0.2)
    noised = corrupt(torch.zeros(512, 1, 1, 1), noising(), config, torch.Generator().manual_seed(0))
    kept = noising().alphas_cumprod[noised.timesteps]
    expected = torch.minimum(kept, 5 * (1 - kept)).clamp(min=0.2)  # SNR / (SNR + 1) = kept
    assert torch.allclose(noised.weights, expected, atol=1e-4)


def test_batches_pair_pictures_with_their_captions():
    tokenizer = learn_tokenizer(["red apple", "dog", "flat style"] * 3, size=160, length=8)
    pictures = [Picture("red apple", (), "", "flat", 0), Picture("dog", (), "", "flat", 1)]
    latents = torch.tensor([1.0, 2.0]).view(2, 1, 1, 1)
    odds = CaptionOdds(empty=0, style=0, tags=0, and_tags=0, colour=0, repainted=0.5)
    batch = drawer(pictures, latents, tokenizer, odds)(32, torch.Generator().manual_seed(0))
    assert batch.input_ids.shape == (32, 8)
    texts = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in batch.input_ids]
    assert {(text, value) for text, value in zip(texts, batch.latents.flatten().tolist(), strict=True)} == {
        ("red apple", 1.0),
        ("dog", 2.0),
    }


def test_the_tokenizer_marks_both_ends_and_keeps_words_whole(tmp_path):
    tokenizer = learn_tokenizer(["red apple", "blue apple"] * 9, size=200, length=8)
    ids = tokenizer("Blue apple", padding="max_length", truncation=True).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert ids[3:] == [tokenizer.eos_token_id] * 5
    assert tokenizer.tokenize("blue apple") == ["blue</w>", "apple</w>"]
    tokenizer.save_pretrained(tmp_path)
    again = type(tokenizer).from_pretrained(tmp_path)
    assert again("blue apple, x").input_ids == tokenizer("blue apple, x").input_ids


def test_merges_join_the_most_frequent_pair_and_break_ties_by_spelling():
    words = {spell("aab"): 3, spell("ab"): 2, spell("cd"): 2}  # a a b</w>, a b</w>, c d</w>
    assert learn_merges(words, most=9) == [("a", "b</w>"), ("a", "ab</w>"), ("c", "d</w>")]
    assert learn_merges(words, most=1) == [("a", "b</w>")]


def test_a_pair_is_joined_from_left_to_right():
    assert join(("a", "a", "a", "b"), ("a", "a")) == ("aa", "a", "b")


def test_the_same_captions_in_any_order_give_the_same_tokenizer():
    texts = ["red apple", "green apple", "dog face", "cat face", "fox"]
    first, second = learn_tokenizer(texts, size=160), learn_tokenizer(reversed(texts), size=160)
    assert first.get_vocab() == second.get_vocab()
    assert first("red fox").input_ids == second("red fox").input_ids


def with_muon() -> TrainState:
    plain = tiny_state()
    hidden = [weight for weight in plain.text_encoder.parameters() if weight.ndim == 2]
    return TrainState(plain.denoiser, plain.text_encoder, hidden=hidden)


def test_muon_teaches_the_matrices_that_it_is_given(tmp_path):
    config = TrainConfig(budget=1e9, steps=1)
    taught, plain = run(with_muon(), config, tmp_path / "muon"), run(tiny_state(), config, tmp_path / "plain")
    apart = {id(weight) for weight in taught.hidden}
    for parameter, other in zip(taught.parameters, plain.parameters, strict=True):
        assert torch.equal(parameter, other) == (id(parameter) not in apart)


def test_a_run_with_muon_resumes_where_it_stopped(tmp_path):
    whole = run(with_muon(), TrainConfig(budget=1e9, steps=1), tmp_path)
    resumed = with_muon()
    resumed.load(tmp_path / "state.pt")
    config = TrainConfig(budget=1e9, steps=3)
    onward = run(whole, config, tmp_path / "onward")
    assert torch.equal(weights(run(resumed, config, tmp_path)), weights(onward))

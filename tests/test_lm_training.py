"""Gradients reach what they should and nothing else; losses, groups and schedules are those of the specification."""

import math
from copy import deepcopy

import pytest
import torch
from tiny_language import dense, routed, text
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from whenwhere.lm import SDT, STT, MoD, calibrate, parameter_groups, route, routing_loss, set_step
from whenwhere.lm.criterion import BetaSchedule

SHORT = [MoD(), SDT(), STT()]
short = pytest.mark.parametrize("routing", SHORT, ids=lambda routing: type(routing).__name__)


def trained(routing, **sizes):
    """A routed model in training mode, whose schedule knows where it is."""
    model = routed(routing, **sizes).train()
    set_step(model, 0, 10)
    return model


def reached(model, loss: Tensor) -> set[str]:
    """Which parts of the model a loss has a gradient in."""
    named = dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name for name, gradient in zip(named, found, strict=True) if gradient is not None and gradient.abs().sum()}


def only(names: set[str], *parts: str) -> bool:
    return bool(names) and all(any(part in name for part in parts) for name in names)


def language_loss(model, ids: Tensor) -> Tensor:
    found = model(ids).logits
    return cross_entropy(found[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@pytest.mark.parametrize(("gate", "learns"), [("raw", True), ("sigmoid", True), ("ste", True), ("hard", False)])
def test_the_gate_carries_the_gradient_to_the_router(gate, learns):
    model = trained(MoD(gate=gate))
    assert ("model.layers.1.router.weight" in reached(model, language_loss(model, text()))) == learns


def test_the_losses_of_mod():
    model, ids = trained(MoD(aux_weight=0.5, z_weight=0.25, student_weight=2.0)), text()
    output = model(ids, labels=ids)
    aux, z, student = [], [], []
    for note in model.notes.values():
        target = note.mask.float()
        aux.append(binary_cross_entropy_with_logits(note.score, target))
        z.append(note.score.square().mean())
        student.append(binary_cross_entropy_with_logits(note.student, target))
    expected = sum(aux) / 2 * 0.5 + sum(z) / 2 * 0.25 + sum(student) / 2 * 2
    torch.testing.assert_close(routing_loss(model), expected)
    model_loss = cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(output.loss, model_loss + expected)


@short
def test_in_evaluation_no_loss_is_added(routing):
    model, ids = routed(routing), text()
    output = model(ids, labels=ids, policy="topk")
    expected = cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)
    with pytest.raises(ValueError, match=r"call model.train\(\) first"):
        routing_loss(model)


@pytest.mark.parametrize("routing", [MoD(), SDT(student="mlp"), STT(), STT(student="linear2")], ids=str)
def test_the_student_never_touches_the_model(routing):
    model = trained(routing)
    model(text())
    for note in model.notes.values():
        assert only(reached(model, note.losses["student"]), "student")


def test_the_loss_of_the_guess_stays_in_the_guess():
    model = trained(SDT(detach_prior_input=True))
    model(text())
    assert only(reached(model, model.notes[1].losses["prior"]), "layers.1.router.prior")
    faithful = trained(SDT())
    faithful(text())
    names = reached(faithful, faithful.notes[3].losses["prior"])
    assert "model.layers.3.router.prior.norm.weight" in names
    assert "model.embed_tokens.weight" in names  # the input of the guess is not detached
    assert "model.layers.2.mlp.down_proj.weight" not in names  # its target is


@pytest.mark.parametrize("gate", ["soft", "ste"])
def test_the_gate_of_sdt_reaches_scalars_guess_and_decision_layer(gate):
    model = trained(SDT(gate=gate))
    names = reached(model, language_loss(model, text()))
    assert {f"model.layers.1.router.criterion.raw_{name}" for name in ("o_ce", "m_cu", "beta_ce", "beta_cu")} <= names
    assert "model.layers.1.router.prior.down_proj.weight" in names
    detached = trained(SDT(gate=gate, detach_score=True))
    names = reached(detached, language_loss(detached, text()))
    assert "model.layers.1.router.criterion.raw_o_ce" in names
    assert not any("router.prior" in name for name in names)


def test_the_teacher_without_gradient_computes_the_same():
    ids = text()
    found = {}
    for teacher_grad in (True, False):
        model = trained(STT(teacher_grad=teacher_grad))
        found[teacher_grad] = model(ids).logits
    assert torch.equal(found[True], found[False])
    names = reached(model, model.notes[1].losses["prior"])
    assert only(names, "layers.1.router.transition")


def test_what_a_layer_of_stt_puts_out_in_training():
    ids = text()
    whole = dense().train()(ids).logits
    assert torch.equal(trained(STT(output="dense"))(ids).logits, whole)
    masked, gated = (trained(STT(output=output, kv_scope="all")) for output in ("masked", "gated"))
    torch.testing.assert_close(masked(ids).logits, gated(ids).logits, atol=1e-4, rtol=1e-4)


def test_dynamic_capacity_and_the_pull_of_its_target():
    model = trained(STT(mode="dynamic", g_threshold=0.76, g_target=0.3, g_reg_weight=0.1))
    model(text())
    note = model.notes[1]
    assert torch.equal(note.mask, note.gate >= 0.76)
    assert 0 < note.mask.float().mean() < 1
    torch.testing.assert_close(note.losses["gate"], (note.gate.mean() - 0.3).square())
    routing_loss(model).backward()


def test_what_skips_may_be_guessed():
    model = trained(SDT(bypass="prior"))
    ids = text()
    model(ids)
    names = reached(model, model.notes[1].losses["bypass"])
    assert "model.layers.1.bypass.down_proj.weight" in names
    assert "model.layers.1.layer.mlp.down_proj.weight" not in names  # its target
    plain = routed(SDT())(ids, policy="none").logits
    assert not torch.equal(model.eval()(ids, policy="none").logits, plain)
    for layer in model.routed:
        torch.nn.init.zeros_(layer.bypass.down_proj.weight)
    assert torch.equal(model(ids, policy="none").logits, plain)


@short
def test_recomputing_activations_changes_nothing(routing):
    ids = text()
    gradients = []
    for recompute in (False, True):
        model = trained(routing)
        if recompute:
            model.activation_checkpointing_enable()
        model(ids, labels=ids).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@short
def test_a_few_steps_of_training_lower_the_loss(routing):
    model, ids = trained(routing), text(4, 24)
    optimiser = torch.optim.AdamW(parameter_groups(model, base=3e-3))
    losses = []
    for step in range(15):
        set_step(model, step, 15)
        loss = model(ids, labels=ids).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(math.isfinite(loss) for loss in losses)
    calibrate(model, [ids])
    assert model.training
    assert model.eval()(ids, labels=ids).loss < losses[0]


@pytest.mark.parametrize("routing", [MoD(gate="sigmoid"), SDT(gate="soft", bypass="prior"), STT()], ids=str)
def test_fewer_bits(routing):
    ids, mask = text(3, 12), torch.ones(3, 12, dtype=torch.long)
    mask[1, :4] = 0
    with torch.autocast("cpu", torch.bfloat16):
        trained(routing)(ids, attention_mask=mask, labels=ids).loss.backward()
    model = trained(routing).to(torch.bfloat16)
    model(ids, attention_mask=mask, labels=ids).loss.backward()
    calibrate(model, [ids])
    found = model.eval().generate(ids, attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert found.shape == (3, 16)


def test_a_model_is_copied_without_its_last_call():
    model, ids = trained(MoD()), text()
    model(ids, labels=ids)
    copied = deepcopy(model)
    assert copied.call is None
    assert model.call is not None
    torch.testing.assert_close(copied(ids).logits, model(ids).logits)


def test_what_is_frozen_stays_so_when_it_is_routed():
    plain = dense()
    fixed = plain.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    model = route(plain, MoD())
    assert model.model.layers[1].layer.mlp.up_proj.weight is fixed
    assert not fixed.requires_grad
    assert plain.model.layers[0].mlp.up_proj.weight.requires_grad
    assert model.model.layers[1].router.weight.requires_grad


def test_groups_of_the_optimiser():
    model = routed(SDT(student="mlp"))
    groups = {group.pop("name"): group for group in parameter_groups(model, weight_decay=0.1)}
    assert {name: (group["lr"], group["weight_decay"]) for name, group in groups.items()} == {
        "base": (1e-5, 0.1),
        "base without decay": (1e-5, 0.0),
        "network": (1e-3, 0.1),
        "network without decay": (1e-3, 0.0),
        "scalar without decay": (1e-2, 0.0),
    }
    together = [id(parameter) for group in groups.values() for parameter in group["params"]]
    assert sorted(together) == sorted(id(parameter) for parameter in model.parameters())
    assert len(groups["scalar without decay"]["params"]) == 2 * 4


def test_beta_follows_its_schedule_and_training_must_know_the_step():
    model = routed(STT(beta_schedule=BetaSchedule(0.1, 10, 0))).train()
    with pytest.raises(ValueError, match="needs to know the step"):
        model(text())
    set_step(model, 5, 10)
    assert model.routed[0].router.criterion.beta.item() == pytest.approx(5.05)
    model(text())
    with pytest.raises(ValueError, match=r"step must be in 0 ... 10"):
        set_step(model, 11, 10)
    with pytest.raises(ValueError, match="LlamaForCausalLM is not routed"):
        set_step(dense(), 0, 1)


def test_the_dense_model_shares_its_parameters_and_stays_as_it_is():
    plain, ids = dense(), text()
    before = plain(ids).logits
    model = route(plain, MoD())
    assert model.model.layers[1].layer.mlp.up_proj.weight is plain.model.layers[1].mlp.up_proj.weight
    model(ids, policy="topk")
    assert torch.equal(plain(ids).logits, before)
    assert type(plain.model.layers[1]).__name__ == "LlamaDecoderLayer"

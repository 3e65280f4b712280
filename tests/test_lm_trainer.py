"""A routed model under the Trainer of transformers: as in a plain loop, resumed or not, in micro-batches or not."""

import pytest
import torch
from tiny_language import routed, text
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from whenwhere.lm import SDT, STT, Knob, MoD, StepCallback, parameter_groups, routing_loss, set_step

short = pytest.mark.parametrize("routing", [MoD(), SDT(), STT()], ids=lambda routing: type(routing).__name__)


class Texts(Dataset):
    """Sixteen texts; the further back, the fewer targets."""

    def __init__(self, even: bool = True) -> None:
        self.ids = text(16, 12)
        self.labels = self.ids.clone()
        if not even:
            for row in range(16):
                self.labels[row, : row // 2] = -100

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.labels[index]}


def trainer(model, folder, texts, **settings) -> Trainer:
    standard = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "logging_steps": 1,
        "max_grad_norm": 0.0,
        "train_sampling_strategy": "sequential",
        "dataloader_pin_memory": False,
    }
    arguments = TrainingArguments(str(folder), **standard | settings)
    optimiser = torch.optim.AdamW(parameter_groups(model, base=1e-3))
    return Trainer(
        model,
        arguments,
        train_dataset=texts,
        eval_dataset=texts,
        optimizers=(optimiser, None),
        callbacks=[StepCallback()],
    )


def parameters(model) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@short
def test_trained_evaluated_saved_and_resumed(routing, tmp_path):
    texts = Texts()
    whole = routed(routing)
    run = trainer(whole, tmp_path / "whole", texts, save_strategy="steps", save_steps=2)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    resumed = routed(routing)
    again = trainer(resumed, tmp_path / "resumed", texts)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for name, tensor in parameters(whole).items():
        torch.testing.assert_close(tensor, resumed.state_dict()[name], msg=name)
    whole.knob = Knob(policy="topk")  # no thresholds were measured yet
    found = run.evaluate()["eval_loss"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "checkpoint-4")
    expected = loaded(texts.ids, labels=texts.labels, policy="topk").loss.item()
    assert found == pytest.approx(expected, rel=1e-5)


def test_training_in_a_plain_loop_is_the_same(tmp_path):
    texts, model = Texts(), routed(STT())
    run = trainer(model, tmp_path, texts, lr_scheduler_type="constant")
    run.train()
    other = routed(STT()).train()
    optimiser = torch.optim.AdamW(parameter_groups(other, base=1e-3))
    for step in range(4):
        set_step(other, step, 4)
        rows = slice(4 * step, 4 * step + 4)
        other(texts.ids[rows], labels=texts.labels[rows]).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    for name, tensor in parameters(model).items():
        torch.testing.assert_close(tensor, other.state_dict()[name], msg=name)


def test_the_step_is_told_where_beta_is_scheduled(tmp_path):
    model = routed(STT())
    run = trainer(model, tmp_path, Texts())
    run.pop_callback(StepCallback)
    with pytest.raises(ValueError, match="needs to know the step"):
        run.train()
    assert not model.stepped


@pytest.mark.parametrize("even", [True, False])
def test_gradients_of_micro_batches_add_up_to_those_of_the_batch(even, tmp_path):
    # Selection goes by sequence, so a batch is its micro-batches; each counts by its targets, in both losses.
    routing, found = MoD(aux_weight=1.0, z_weight=1.0), {}
    for name, size in (("whole", 8), ("parts", 2)):
        model = routed(routing)
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size}
        run = trainer(model, tmp_path / name, Texts(even), max_steps=1, **sizes)
        before = parameters(model)
        gradients = {}
        for key, parameter in model.named_parameters():
            parameter.register_hook(lambda g, key=key, all_=gradients: all_.__setitem__(key, all_.get(key, 0) + g))
        run.train()
        assert any(not torch.equal(before[key], value) for key, value in parameters(model).items())
        found[name] = gradients["model.layers.1.router.weight"], run.state.log_history[0]["loss"]
    if even:
        torch.testing.assert_close(found["parts"][0], found["whole"][0])
        assert found["parts"][1] == pytest.approx(found["whole"][1], rel=1e-3)
        return
    # with targets of different numbers the routers' means are weighted by them, and none counts more than once
    model, texts = routed(routing).train(), Texts(even=False)
    counts = [texts.labels[rows : rows + 2, 1:].ne(-100).sum() for rows in range(0, 8, 2)]
    loss = torch.zeros(())
    for part, count in enumerate(counts):
        rows = slice(2 * part, 2 * part + 2)
        logits = model(texts.ids[rows]).logits[:, :-1].flatten(0, 1)
        targets = texts.labels[rows, 1:].flatten()
        loss = loss + torch.nn.functional.cross_entropy(logits, targets, reduction="sum") / sum(counts)
        loss = loss + routing_loss(model) * count / sum(counts)
    loss.backward()
    torch.testing.assert_close(found["parts"][0], model.routed[0].router.weight.grad)
    assert found["parts"][1] == pytest.approx(loss.item(), rel=1e-3)


def test_the_routers_losses_are_in_a_tuple_too():
    model, ids = routed(MoD()).train(), text()
    named = model(ids, labels=ids)
    assert torch.equal(model(ids, labels=ids, return_dict=False)[0], named.loss)
    assert named.loss > model.eval()(ids, labels=ids, policy="topk").loss

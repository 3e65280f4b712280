"""Adapters of peft on a routed model: they and the routers learn, the language model stays; saved alone or merged."""

import pytest
import torch
from tiny_language import calibrated, dense, routed, text

from whenwhere.lm import SDT, STT, MoD, calibrate, parameter_groups, route, routing_loss, set_step

peft = pytest.importorskip("peft", reason="needs the extra `peft`")
# peft asks transformers for what is about to be renamed there
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


def adapted(model):
    """LoRA on the attention of all layers, routed or not; what is new in routed layers is trained and saved whole."""
    new = ["router", "student"] if model.routed[0].student is not None else ["router"]
    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=new, task_type="CAUSAL_LM")
    return peft.get_peft_model(model, settings)


@pytest.mark.parametrize("routing", [MoD(), SDT(), STT()], ids=lambda routing: type(routing).__name__)
def test_adapters_and_routers_learn_and_the_rest_stays(routing, tmp_path):
    model, ids = adapted(routed(routing)).train(), text(4, 20)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimiser = torch.optim.AdamW(parameter_groups(model, base=1e-2))
    losses = []
    for step in range(5):
        set_step(model, step, 5)
        loss = model(input_ids=ids, labels=ids).loss
        losses.append(loss.item())
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    assert losses[-1] < losses[0]
    assert routing_loss(model).isfinite()
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert all("lora_" in name or "modules_to_save" in name for name in changed)
    assert any("layers.1.layer.self_attn.q_proj.lora_B" in name for name in changed)
    assert any("layers.1.router.modules_to_save" in name for name in changed)
    calibrate(model, [ids])
    model.eval()
    expected = model(input_ids=ids, policy="topk", use_cache=False).logits
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(routed(routing), tmp_path)
    torch.testing.assert_close(again(input_ids=ids, policy="topk", use_cache=False).logits, expected)


def test_merged_adapters_are_a_routed_model_again(tmp_path):
    model, ids = adapted(calibrated(MoD(always_run="first"))), text(2, 12)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    expected = model(input_ids=ids).logits
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, expected, atol=1e-4, rtol=1e-4)
    prompt = {"max_new_tokens": 4, "do_sample": False, "capacity": 0.5}
    assert merged.generate(ids, **prompt).shape[1] > 12
    merged.save_pretrained(tmp_path)
    torch.testing.assert_close(type(merged).from_pretrained(tmp_path)(ids).logits, merged(ids).logits)


def test_adapters_come_after_routing():
    with pytest.raises(TypeError, match="Adapters come after routing"):
        route(peft.get_peft_model(dense(), peft.LoraConfig(r=2, target_modules=["q_proj"])), MoD())

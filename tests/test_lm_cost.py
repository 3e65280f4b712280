"""The formula of costs says what PyTorch's counter counts, and the headline figures are what they are."""

import pytest
import torch
from tiny_language import dense, routed, text
from transformers import Qwen2Config

from whenwhere.lm import SDT, STT, MoD, cost
from whenwhere.pricing.counting import Counting

TOKENS = 16
HEAD = TOKENS * 32 * 50  # of the language model
LAYER = 2 * 32  # both products of attention, per pair of tokens: heads x size, twice
BUDGET = TOKENS // 2


def counted(model, **more) -> int:
    """Multiply-adds of eager attention, which computes pairs of tokens that cannot see each other as well."""
    with Counting() as counting, torch.no_grad():
        model(text(1, TOKENS), use_cache=False, **more)
    return counting.macs()["Global"].all - HEAD


def unseen(queries: int, keys: int, seen: int) -> int:
    """What eager attention computes in vain in one layer."""
    return (queries * keys - seen) * LAYER


DENSE = unseen(TOKENS, TOKENS, TOKENS * (TOKENS + 1) // 2)
AMONG = unseen(BUDGET, BUDGET, BUDGET * (BUDGET + 1) // 2)
ALL = unseen(BUDGET, TOKENS, BUDGET * (TOKENS + 1) // 2)
ROUTER = TOKENS * 32  # MoD's, a product of matrix and vector, which the counter leaves out


@pytest.mark.parametrize(
    ("routing", "vain", "left_out"),
    [
        (MoD(student="none"), 2 * AMONG, 2 * ROUTER),
        (MoD(student="none", kv_scope="all"), 2 * ALL, 2 * ROUTER),
        (SDT(), 2 * AMONG, 0),
        (SDT(prior="linear"), 2 * AMONG, 0),
        (SDT(surprise="kl", bypass="prior"), 2 * AMONG, 0),
        (STT(), 2 * AMONG + 2 * DENSE, 0),
        (STT(student="linear2"), 2 * AMONG + 2 * DENSE, 0),
    ],
    ids=str,
)
def test_the_formula_is_what_is_counted(routing, vain, left_out):
    model = routed(routing, attention="eager")
    formula = cost(model.config, routing, TOKENS, teacher=True)
    assert counted(model, policy="topk") == formula.macs + 3 * DENSE + vain - left_out


def test_the_formula_of_the_dense_model_and_of_a_student_alone():
    assert counted(dense("llama", "eager")) == cost(dense().config, None, TOKENS).macs + 5 * DENSE
    routing = STT()
    model = routed(routing, attention="eager")
    for layer in model.routed:
        layer.student.trained.fill_(True)
    mask = torch.arange(TOKENS)[None] < BUDGET
    found = counted(model, policy="student", selection={1: mask, 3: mask})
    assert found == cost(model.config, routing, TOKENS).macs + 3 * DENSE + 2 * AMONG


def test_the_headline_figures_are_those_of_one_layer():
    """At half the tokens, attention shrinks to a quarter and the cache to a half in a routed layer, less in a model."""
    config = Qwen2Config(
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        vocab_size=151936,
    )
    plain, found = cost(config, None, 32768), cost(config, MoD(student="none"), 32768)
    routed_attention = found.attention - plain.attention / 2
    assert routed_attention / (plain.attention / 2) == pytest.approx(0.25, abs=1e-4)
    assert found.attention / plain.attention == pytest.approx(0.625, abs=1e-4)
    assert found.entries / plain.entries == 0.75
    assert plain.cache_bytes == 384 * 2**20
    assert found.cache_bytes == 288 * 2**20


@pytest.mark.parametrize(
    ("tokens", "capacity", "routing", "ratio"),
    [
        (1024, 0.25, SDT, 0.72),
        (1024, 0.5, SDT, 0.81),
        (4096, 0.5, SDT, 0.79),
        (32768, 0.5, SDT, 0.71),
    ],
)
def test_the_table_of_the_specification(tokens, capacity, routing, ratio):
    config = Qwen2Config(
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        vocab_size=151936,
    )
    head = tokens * 896 * 151936
    found = cost(config, routing(capacity=capacity), tokens).macs + head
    assert found / (cost(config, None, tokens).macs + head) == pytest.approx(ratio, abs=0.006)
    teacher = cost(config, STT(capacity=0.5), 1024, teacher=True).macs + 1024 * 896 * 151936
    assert teacher / (cost(config, None, 1024).macs + 1024 * 896 * 151936) == pytest.approx(1.18, abs=0.02)


def test_a_model_that_never_skips_in_training_has_no_saving_to_report():
    with pytest.raises(ValueError, match="output='dense' trains a model that never skips"):
        cost(dense().config, STT(output="dense"), TOKENS)

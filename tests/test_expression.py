"""Expressions name methods as in Python; they are parsed, never evaluated."""

import sys
from dataclasses import dataclass
from types import ModuleType
from typing import ClassVar

import pytest

from whenwhere import DeepCache, FewerSteps, GuidanceStop, Method, TGate
from whenwhere import methods as published
from whenwhere.expression import known, parse, write, write_full
from whenwhere.site import Kind


def test_methods_are_written_as_in_python():
    assert parse("TGate(gate_step=10)") == (TGate(gate_step=10),)
    assert parse("tgate(10, 3)") == (TGate(gate_step=10, sp_interval=3),)
    assert parse("DEEPCACHE") == (DeepCache(),)
    assert parse(" guidance_stop( step=4 ) ") == (GuidanceStop(step=4),)
    assert parse("fewersteps(12)") == (FewerSteps(steps=12),)


def test_a_sum_keeps_its_order():
    assert parse("tgate+deepcache(interval=2)+guidancestop(3)") == (TGate(), DeepCache(interval=2), GuidanceStop(3))


def test_values_are_literals_of_any_type():
    assert parse("tgate(gate_step=0.4)") == (TGate(gate_step=0.4),)
    assert parse("deepcache(full_steps=(0, 3, 7))") == (DeepCache(full_steps=(0, 3, 7)),)
    assert parse("deepcache(full_steps=[0, 3])") == (DeepCache(full_steps=(0, 3)),)
    assert parse("tgate(anchor='cond')") == parse("tgate(anchor=cond)") == (TGate(anchor="cond"),)


@pytest.mark.parametrize(
    "items", [(TGate(),), (TGate(gate_step=0.4, anchor="uncond"), DeepCache(full_steps=(0, 2))), (FewerSteps(9),)]
)
def test_what_is_written_reads_back(items):
    assert parse(write(items)) == items
    assert parse(write_full(items)) == items


def test_what_differs_from_the_defaults_is_written_and_the_first_field_where_nothing_does():
    assert write((TGate(gate_step=7, warm_up=0), DeepCache())) == "TGate(gate_step=7, warm_up=0)+DeepCache(interval=3)"
    assert write((DeepCache(branch=2),)) == "DeepCache(branch=2)"
    assert "sp_interval=5" in write_full((TGate(gate_step=7),))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tgat(gate_step=10)", "no method is called 'tgat'; did you mean 'TGate'"),
        ("deep_cash(2)", "did you mean 'DeepCache'"),
        ("tgate(gate_steps=10)", "TGate has no field 'gate_steps'; did you mean 'gate_step'"),
        ("deepcache(intervall=3)", "did you mean 'interval'"),
        ("tgate(gate_step=0)", "gate_step must be at least 1, got 0"),
        ("deepcache(interval=-2)", "interval must be at least 1, got -2"),
        ("tgate(anchor=middle)", "anchor must be one of 'mean', 'cond', 'uncond'; got 'middle'"),
        ("tgate(1, gate_step=2)", "gate_step is given twice"),
        ("deepcache(1, 2, 3, 4.0, (), 6)", "got 6 values"),
        ("fewersteps()", "FewerSteps needs a value for steps"),
        ("tgate(**{})", "TGate takes gate_step"),
        ("tgate(gate_step=1", "cannot read the method"),
        ("", "cannot read the method"),
        ("tgate-deepcache", "is no method"),
        ("3", "is no method"),
        ("+" * 5000 + "tgate", "cannot read the method"),
    ],
)
def test_a_mistake_is_named(text, message):
    with pytest.raises(ValueError, match=r".") as caught:
        parse(text)
    assert message in str(caught.value)


def test_a_value_of_the_wrong_type_gives_the_error_of_its_field():
    with pytest.raises(TypeError, match=r"interval must be a whole number, got 1\.5"):
        parse("deepcache(interval=1.5)")


@pytest.mark.parametrize("value", ["__import__('os').getcwd()", "(lambda: 3)()", "1 if 2 else 3", "[x for x in (1,)]"])
def test_nothing_is_evaluated(value):
    with pytest.raises(ValueError, match="is no plain value"):
        parse(f"deepcache(interval={value})")


def test_every_exported_method_is_known():
    assert set(published.__all__) <= set(known())


def test_methods_of_a_new_package_appear_by_themselves(monkeypatch):
    @dataclass(frozen=True)
    class Sharpen(Method):
        scale: float = 2.0
        kinds: ClassVar = frozenset({Kind.MODEL})

        def decide(self, site, step):  # noqa: ARG002
            return None

    @dataclass(frozen=True)
    class Note:
        text: str = ""

    package = ModuleType("whenwhere.guidance")
    vars(package).update(Sharpen=Sharpen, Note=Note, note="no class", __all__=["Sharpen", "Note", "note"])
    monkeypatch.setitem(sys.modules, "whenwhere.guidance", package)
    assert parse("sharpen(3.5)+tgate") == (Sharpen(scale=3.5), TGate())
    assert "Note" not in known()

"""Methods that skip different regions at different steps: nobody remembers what another one left empty."""

from itertools import permutations

import pytest
from compositions import poisoned
from laws import silent
from pipelines import build, run

from whenwhere import (
    FORA,
    DeepCache,
    DeltaDiT,
    FasterDiffusion,
    Method,
    SkipCache,
    SkipDrift,
    SkipForecast,
    SkipOffset,
    ToCa,
    attach,
    plan,
)

ALWAYS = {"start_timestep": 1000, "stop_timestep": 0}
LONG = (
    DeepCache(3),
    DeepCache(2, branch=1),
    FasterDiffusion(every=2, alpha=0),
    SkipCache(2, 1, **ALWAYS),
    SkipOffset(3, 1, **ALWAYS),
    SkipForecast(3, 2, **ALWAYS),
    SkipDrift(0.5, longest=4),
    DeltaDiT(interval=2, blocks=2, mode="middle"),
    FORA(3),
)
METHODS = {
    "sd-deep": (DeepCache(3), DeepCache(2, branch=1), FasterDiffusion(every=2, alpha=0), FORA(3)),
    "hunyuan-dit": LONG,
    "flux": (FORA(2), ToCa(3, 0.3, schedule="flux"), DeltaDiT(interval=2, blocks=1)),
}
QUICK = (FasterDiffusion, SkipCache)  # one of them, where there are many


def marked(case: str, first: Method, second: Method):
    quick = len(METHODS[case]) < 5 or isinstance(first, QUICK) or isinstance(second, QUICK)
    name = f"{case}-{type(first).__name__}-{type(second).__name__}"
    return pytest.param(case, first, second, id=name, marks=() if quick else pytest.mark.slow)


PAIRS = [marked(case, *pair) for case, methods in METHODS.items() for pair in permutations(methods, 2)]


@pytest.mark.parametrize(("case", "first", "second"), PAIRS)
def test_nothing_empty_reaches_the_picture(case, first, second):
    pipe, kinds = build(case), {type(first), type(second)}
    if len(kinds) == 1 or (SkipDrift in kinds and FORA not in kinds):
        with pytest.raises(ValueError, match="does not go with"):
            attach(pipe, first, second)
        return
    with poisoned(), attach(pipe, first, second) as attached, silent():
        assert run(case, pipe, steps=6).isfinite().all()
        if SkipDrift not in kinds:  # which decides while it runs
            assert attached.trace.rows == attached.plan.rows


def test_a_region_is_computed_where_another_method_keeps_what_comes_out_of_it():
    """DeepCache's full steps are 0, 3, 6; the encoder, which Faster Diffusion keeps, has to run at 2 and 4 as well."""
    table = plan(build("sd-deep"), FasterDiffusion(every=2, alpha=0), DeepCache(3), steps=8)
    assert (table.row("mid_block"), table.row("up_blocks.0")) == ("#.#.#.#.", "#.###.#.")


@pytest.mark.parametrize("methods", [(DeepCache(2), DeepCache(3, branch=1)), (FORA(2), FORA(3))])
def test_a_method_is_attached_once(methods):
    kind = type(methods[0]).__name__
    with pytest.raises(ValueError, match=f"does not go with .* both have the same sites; one {kind} decides"):
        attach(build("sd-deep"), *methods)


def test_two_of_a_kind_may_share_the_blocks():
    table = plan(build("pixart-sigma"), FORA(2, blocks=(0,)), FORA(3, blocks=(1,)), steps=6)
    assert [table.row(f"transformer_blocks.{i}.attn1") for i in range(2)] == ["##.#.#", "#.#..#"]

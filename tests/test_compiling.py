"""Compiled blocks: decisions stay Python, nothing is compiled anew from step to step."""

import pytest
import torch
from naive import denoiser
from pipelines import build, run
from torch import _dynamo as dynamo
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

from whenwhere import FORA, DeepCache, TGate, attach, compile_inside

CASES = [
    ("sd", TGate(gate_step=3, sp_interval=2, warm_up=1)),
    ("sd", DeepCache(interval=2)),
    ("pixart-sigma", FORA(interval=2)),
]


@pytest.fixture(autouse=True)
def afresh():
    dynamo.reset()
    counters.clear()
    with dynamo.config.patch(recompile_limit=64):  # layers of one class share a limit
        yield
    dynamo.reset()
    counters.clear()


@pytest.mark.parametrize(("name", "method"), CASES, ids=str)
def test_after_the_first_generation_nothing_is_compiled_anew(name, method):
    pipe = build(name)
    plain = run(name, pipe)
    with attach(pipe, method):
        eager = run(name, pipe)
    backend = CompileCounter()
    with compile_inside(pipe, method, backend=backend, dynamic=False) as count:
        assert count > 2
        with attach(pipe, method) as attachment:
            first = run(name, pipe)
            graphs, unique = backend.frame_count, counters["stats"]["unique_graphs"]
            assert graphs >= 2
            assert torch.equal(run(name, pipe), first)
            assert (backend.frame_count, counters["stats"]["unique_graphs"]) == (graphs, unique)
            assert attachment.trace.rows == attachment.plan.rows
    torch.testing.assert_close(first, eager)
    assert not [module for module in denoiser(name, pipe).modules() if "forward" in vars(module)]
    assert torch.equal(run(name, pipe), plain)


def test_no_site_lies_inside_of_what_is_compiled():
    pipe = build("sd")
    method = TGate(gate_step=3)
    with compile_inside(pipe, method, backend="eager"):
        compiled = [name for name, module in pipe.unet.named_modules() if "forward" in vars(module)]
    with attach(pipe, method) as attachment:
        sites = [site.path for site in attachment.sites]
    assert any(name in sites for name in compiled)
    assert not [(name, site) for name in compiled for site in sites if site.startswith(f"{name}.")]
    assert not [(one, two) for one in compiled for two in compiled if two.startswith(f"{one}.")]


def test_what_is_attached_first_is_refused():
    pipe = build("sd")
    with (
        attach(pipe, DeepCache()),
        pytest.raises(ValueError, match=r"attached already; compile first and attach within"),
        compile_inside(pipe, DeepCache()),
    ):
        pass

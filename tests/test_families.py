"""The rows of every family, walked against tiny real models and published architectures."""

import re
from functools import cache

import naive
import pytest
import torch
from diffusers.models.attention import AttentionModuleMixin, BasicTransformerBlock, FeedForward
from diffusers.models.attention_processor import Attention
from pipelines import CASES, build, run
from tiny_models import UNET, WIDTH, randomised, sd

from whenwhere import TGate, architectures, attach
from whenwhere.anatomy import find, walk
from whenwhere.families import FAMILIES
from whenwhere.finding import denoiser_of
from whenwhere.site import Kind, Side, Site

ATTENTION = {Kind.SELF_ATTENTION, Kind.CROSS_ATTENTION, Kind.JOINT_ATTENTION}
OURS = {"SkipLatteTransformer3DModel"}  # of this library, for which diffusers has no pipeline; walked in its own tests


@cache
def walked(case: str):
    denoiser = denoiser_of(build(case))
    anatomy = find(denoiser, FAMILIES)
    return denoiser, anatomy, walk(denoiser, anatomy)


def matches(pattern: str, path: str) -> bool:
    return re.fullmatch(re.escape(pattern).replace(r"\*\*", ".+").replace(r"\*", r"\d+"), path) is not None


def test_every_row_of_every_family_matches_a_module_of_some_pipeline():
    unmatched = {(anatomy.model, part.path) for anatomy in FAMILIES for part in anatomy.parts}
    for case in CASES:
        _, anatomy, sites = walked(case)
        unmatched -= {(anatomy.model, p.path) for p in anatomy.parts for site in sites if matches(p.path, site.path)}
    assert {(model, path) for model, path in unmatched if model not in OURS} == set()


@pytest.mark.parametrize("case", CASES)
def test_every_attention_and_mlp_inside_a_block_is_a_site_of_that_role(case):
    denoiser, _, sites = walked(case)
    kinds = {site.path: site.kind for site in sites}
    for path, module in denoiser.named_modules():
        if ".transformer_blocks." not in f".{path}." or path.rsplit(".", 1)[-1] == "net":
            continue
        if isinstance(module, Attention | AttentionModuleMixin):
            assert kinds.get(path) in ATTENTION, path
        elif isinstance(module, FeedForward):
            assert kinds.get(path) is Kind.MLP, path


@pytest.mark.parametrize("case", CASES)
def test_sites_run_in_the_order_of_their_numbers(case):
    """The real order of calls, of every site that is called, is the order of the sites."""
    pipe = build(case)
    denoiser = denoiser_of(pipe)
    sites = walk(denoiser, find(denoiser, FAMILIES))
    called: list[Site] = []
    for site, module in sites.items():
        module.register_forward_pre_hook(lambda *_, site=site: called.append(site))
    run(case, pipe, steps=4)
    first = called[: called.index(called[0], 1)]
    assert first == list(sites)


def ladder(name: str) -> dict[str, int | None]:
    model = architectures.build(name)
    return {site.path: site.depth for site in walk(model, find(model, FAMILIES))}


def test_the_ladder_of_stable_diffusion_1_5_has_twelve_residuals():
    """Residual 0 leaves the input convolution; then two layers and a downsampler a level, none in the last."""
    depths = ladder("sd15")
    encoder = {f"down_blocks.{i}.resnets.{j}": 3 * i + j + 1 for i in range(4) for j in range(2)}
    encoder |= {f"down_blocks.{i}.downsamplers.0": 3 * i + 3 for i in range(3)}
    decoder = {f"up_blocks.{i}.resnets.{j}": 11 - 3 * i - j for i in range(4) for j in range(3)}
    for path, depth in (encoder | decoder).items():
        assert depths[path] == depth, path
    assert depths["mid_block"] == 12
    assert depths["down_blocks.1"] == 4
    assert depths["up_blocks.2"] == 3
    assert depths["up_blocks.3.attentions.1"] == 1


def test_the_ladder_of_sdxl_has_nine_residuals():
    depths = ladder("sdxl")
    decoder = {f"up_blocks.{i}.resnets.{j}": 8 - 3 * i - j for i in range(3) for j in range(3)}
    for path, depth in decoder.items():
        assert depths[path] == depth, path
    assert depths["mid_block"] == 9
    assert depths["up_blocks.1.upsamplers.0"] == 3


def test_the_blocks_of_hunyuan_dit_meet_in_the_middle():
    blocks = [site for site in walked("hunyuan-dit")[2] if site.kind is Kind.BLOCK]
    assert [site.depth for site in blocks] == [0, 1, 2, 2, 1, 0]
    assert [site.side for site in blocks] == [*[Side.ENCODER] * 2, *[Side.MIDDLE] * 2, *[Side.DECODER] * 2]


def test_the_residual_that_a_decoder_layer_pops_is_the_one_of_its_depth():
    """In a real U-Net: what the layer of depth k reads last is what the encoder pushed as number k."""
    pipe = build("sd-deep")
    unet = pipe.unet
    depths = {site.path: site.depth for site in walk(unet, find(unet, FAMILIES)) if site.kind is Kind.LAYER}
    pushed, popped = {}, {}
    for path, module in unet.named_modules():
        if path.startswith("down_blocks") and path in depths:
            module.register_forward_hook(lambda *call, k=depths[path]: pushed.update({k: call[-1]}))
        if path.startswith("up_blocks") and ".resnets." in path and path.count(".") == 3:
            module.register_forward_pre_hook(lambda _, args, k=depths[path]: popped.update({k: args[0]}))
    sample, text = torch.randn(1, 4, 16, 16), torch.randn(1, 6, 16)
    with torch.no_grad():
        unet(sample, 1, text)
    for k, tensor in pushed.items():
        tensor = tensor if isinstance(tensor, torch.Tensor) else tensor[0]
        assert torch.equal(popped[k][:, -tensor.shape[1] :], tensor), k


def unet_of_text_alone():
    """Both attentions of the outer blocks attend to the text; diffusers leaves the middle as it is."""
    return sd(config=UNET | {"only_cross_attention": True})


def unet_with_a_block_without_text():
    """Both attentions of the middle block are self-attention, and it is given no text, as motion modules are not."""
    pipe = sd()
    plain = randomised(BasicTransformerBlock(16, 2, 8, cross_attention_dim=WIDTH, double_self_attention=True))
    plain.register_forward_pre_hook(lambda _, args, kw: (args, kw | {"encoder_hidden_states": None}), with_kwargs=True)
    pipe.unet.mid_block.attentions[0].transformer_blocks[0] = plain
    return pipe


@pytest.mark.parametrize(("made", "own"), [(sd, 4), (unet_of_text_alone, 1), (unet_with_a_block_without_text, 5)])
def test_attention_is_classed_by_whether_it_is_given_the_text_and_not_by_its_name(made, own):
    unet = made().unet
    sites = {s: m for s, m in walk(unet, find(unet, FAMILIES)).items() if s.kind in ATTENTION}
    given = {}
    for site, module in sites.items():
        note = lambda _, __, kw, site=site: given.update({site: kw["encoder_hidden_states"] is not None})  # noqa: E731
        module.register_forward_pre_hook(note, with_kwargs=True)
    with torch.no_grad():
        unet(torch.randn(1, 4, 16, 16), 1, torch.randn(1, 6, WIDTH))
    assert {s: s.kind for s in sites} == {
        s: Kind.CROSS_ATTENTION if text else Kind.SELF_ATTENTION for s, text in given.items()
    }
    assert [len(sites), list(given.values()).count(False)] == [8, own]


@pytest.mark.parametrize("made", [unet_of_text_alone, unet_with_a_block_without_text])
def test_t_gate_freezes_what_is_given_the_text_whatever_it_is_called(made):
    pipe = made()
    expected = naive.tgate(pipe.unet, naive.opening("sd", pipe), naive.Gate(4, k=3, w=0))
    with attach(pipe, TGate(4, sp_interval=3, warm_up=0)):
        assert naive.distance(run("sd", pipe), expected) <= 1e-6

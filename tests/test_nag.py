"""Guidance inside attention on real pipelines: it is what the papers say, costs what it must, and leaves nothing."""

import inspect
from dataclasses import replace
from functools import partial
from zlib import crc32

import naive_guidance as naive
import pytest
import torch
from diffusers import DDIMScheduler
from naive_guidance import Settings, replaced
from pipelines import build, case, run
from tiny_models import POOLED, TOKENS, WAN, WIDTH, tiny
from tiny_text import with_text
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from whenwhere import NAG, NASA, VSF, DeepCache, DeltaDiT, GuidanceStop, Sigma, TGate, Timestep, attach, plan, zoo
from whenwhere.clock import lay_out
from whenwhere.guidance import Text, operator, report
from whenwhere.guidance.network import network_of
from whenwhere.methods import FORA
from whenwhere.pricing.cost import count

STEPS = 3
MILD = Settings()  # some tokens are clipped, some are not
CROSSED = {  # which branch is conditional, of how many
    "sd": (1, 2),
    "sd-img2img": (1, 2),
    "sd-controlnet": (1, 2),
    "sd-ip-adapter": (1, 2),
    "sd-lcm": (0, 1),
    "sd-pag": (1, 3),
    "sd-pix2pix": (0, 3),
    "sdxl": (1, 2),
    "pixart-alpha": (1, 2),
    "pixart-sigma": (1, 2),
    "hunyuan-dit": (1, 2),
    "latte": (1, 2),
    "sana": (1, 2),
    "wan": (0, 1, 2),  # two passes, the conditional one first
    "wan-picture": (0, 1, 2),
    "sana-sprint": (0, 1),
}
JOINT = ("sd3", "sd35", "flux", "flux-true-cfg")
FEW = ("sd", "sdxl", "pixart-alpha", "hunyuan-dit", "sd3", "flux")


def draw(what: str, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(crc32(what.encode())))


def text(name: str, rows: int = 1, tokens: int = 4, seed: int = 0) -> Text:
    """A negative text; row i depends on `seed + i` only."""
    tokens = TOKENS if "hunyuan" in name else 512 if name == "wan-picture" else tokens

    def rowed(what: str, *shape: int) -> Tensor:
        return torch.stack([draw(f"{what} {seed + i}", *shape) for i in range(rows)])

    masked = any(family in name for family in ("pixart", "hunyuan", "sana"))
    mask = (torch.arange(tokens) < tokens - 1).long().repeat(rows, 1)
    return Text(
        rowed("negative", tokens, WIDTH),
        mask=mask if masked else None,
        pooled=rowed("pooled", POOLED) if "flux" in name else None,
        embeds_2=rowed("second", tokens, WIDTH) if "hunyuan" in name else None,
        mask_2=mask if "hunyuan" in name else None,
    )


def nag(name: str, negative: Text | None = None, **kwargs) -> NAG:
    return NAG(MILD.s, MILD.tau, MILD.alpha, negative_prompt_embeds=negative or text(name), **kwargs)


def guide(name: str, pipe, *methods):
    """Attach; PixArt's pipelines do not tell that they guide."""
    return attach(pipe, *methods, guidance=True if "pixart" in name else None)


def guided(name: str, *methods, **request) -> Tensor:
    pipe = build(name)
    with guide(name, pipe, *methods):
        return run(name, pipe, **{"steps": STEPS} | request)


def change(tensor: Tensor, reference: Tensor) -> float:
    return float((tensor - reference).norm() / reference.norm())


def naively_guided(name: str, pipe, settings: Settings = MILD):
    """A context in which the network has forwards written in the test."""
    model, negative = getattr(pipe, case(name).denoiser), text(name)
    if name in CROSSED:
        return naive.crossed(model, negative, settings, *CROSSED[name])
    if "flux" in name:
        return replaced(model, naive.flux(model, negative, settings, negative.pooled))
    return replaced(model, naive.sd3(model, negative, settings))


def naively(name: str, settings: Settings = MILD, **request) -> Tensor:
    pipe = build(name)
    with naively_guided(name, pipe, settings):
        return run(name, pipe, **{"steps": STEPS} | request)


# -- it is what the papers say ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*CROSSED, "sd3", "sd35", "flux"])
def test_a_naive_network_agrees(name):
    ours = guided(name, nag(name), prompts=2)
    assert change(ours, naively(name, prompts=2)) < 1e-5
    assert change(ours, run(name, build(name), prompts=2, steps=STEPS)) > 1e-2


@pytest.mark.parametrize("name", [*CROSSED, "sd3", "sd35", "flux"])
def test_the_first_attention_agrees_with_a_naive_one(name):
    """What leaves its output projection in the first call of the network."""

    def projected(pipe) -> Tensor:
        network, seen, over = getattr(pipe, case(name).denoiser), [], []
        end = ".attn2" if name in CROSSED else ".attn"
        attn = next(m for path, m in network.named_modules() if path.endswith(end) and hasattr(m, "to_out"))

        def note(*call: object) -> None:
            if not over:
                seen.append(call[-1])

        handles = [attn.to_out[0].register_forward_hook(note)]
        handles.append(network.register_forward_hook(lambda *_: over.append(True)))
        run(name, pipe, steps=2, prompts=2)
        for handle in handles:
            handle.remove()
        return seen[-1]

    pipe = build(name)
    plain = projected(pipe)
    with naively_guided(name, pipe):
        expected = projected(pipe)
    with guide(name, pipe, nag(name)):
        assert change(projected(pipe), expected) < 1e-5
    assert change(plain, expected) > 1e-2


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_nasa_agrees_with_a_naive_network(name):
    ours = guided(name, NASA(0.4, negative_prompt_embeds=text(name)))
    assert change(ours, naively(name, Settings(subtract=0.4))) < 1e-5


def test_flux_agrees_with_a_naive_network_of_two_image_streams():
    pipe, negative = build("flux"), text("flux", tokens=TOKENS)
    with replaced(pipe.transformer, naive.flux_reference(pipe.transformer, negative, MILD)):
        expected = run("flux", pipe, steps=STEPS, prompts=2)
    ours = guided("flux", nag("flux", negative, mode="reference"), prompts=2)
    assert change(ours, expected) < 1e-5


def test_the_modes_of_flux_agree_where_the_pooled_vectors_do_and_differ_otherwise():
    pooled = torch.stack([draw("pooled", POOLED)])
    for same in (True, False):
        negative = replace(text("flux", tokens=TOKENS), pooled=pooled if same else -pooled)
        shared, reference = (
            guided("flux", nag("flux", negative, mode=mode), pooled_prompt_embeds=pooled)
            for mode in ("shared", "reference")
        )
        assert (change(shared, reference) < 1e-5) == same


def test_without_a_pooled_vector_the_positive_one_serves():
    pooled = torch.stack([draw("pooled", POOLED)])
    explicit, missing = (
        guided("flux", nag("flux", replace(text("flux"), pooled=vector)), pooled_prompt_embeds=pooled)
        for vector in (pooled, None)
    )
    assert change(missing, explicit) < 1e-6


def test_the_second_call_of_true_guidance_is_not_guided():
    pipe = build("flux-true-cfg")
    with attach(pipe, nag("flux")) as attachment:
        run("flux-true-cfg", pipe, steps=2)
        assert attachment.trace.row("transformer_blocks.0.attn") == "g#g#"


@pytest.mark.parametrize("name", ["sd", "sd-lcm"])
def test_vsf_is_one_attention_over_both_texts(name):
    pipe, negative = build(name), text(name)
    sites = [m for path, m in pipe.unet.named_modules() if path.endswith("attn2")]

    def replacement(attn):
        def forward(x, encoder_hidden_states, **_):
            both = torch.cat([encoder_hidden_states, negative.embeds.expand(len(x), -1, -1)], 1)
            sign = torch.tensor([1.0] * TOKENS + [-3.0] * 4)[:, None]
            bias = torch.tensor([0.0] * TOKENS + [-0.1] * 4).expand(len(x), 1, -1)
            q, k, v = (naive.heads(t, attn) for t in (attn.to_q(x), attn.to_k(both), attn.to_v(both) * sign))
            return attn.to_out[0](naive.attend(q, k, v, bias))

        return forward

    for module in sites:
        module.forward = replacement(module)
    expected = run(name, pipe, steps=STEPS, guidance=False)
    ours = guided(name, VSF(3.0, 0.1, negative_prompt_embeds=negative), guidance=False)
    assert change(ours, expected) < 1e-5


def test_vsf_stands_for_guidance_and_needs_cross_attention():
    with pytest.raises(ValueError, match="guidance_scale=1"):
        guided("sd", VSF(negative_prompt_embeds=text("sd")))
    with pytest.raises(ValueError, match="made for cross-attention"):
        attach(build("sd3"), VSF(negative_prompt_embeds=text("sd3")))


# -- off, equal, undone ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("off", [{"scale": 1.0}, {"alpha": 0.0}, {"end": 0}])
@pytest.mark.parametrize("name", ["sd", "sd3", "flux"])
def test_off_is_exact(name, off):
    plain = run(name, build(name), steps=STEPS)
    with pytest.warns(UserWarning, match="changed nothing"):
        latents = guided(name, NAG(**{"scale": 5.0} | off, negative_prompt_embeds=text(name)))
    assert torch.equal(latents, plain)


@pytest.mark.parametrize("name", [*FEW, "latte", "sd35", "sd-ip-adapter", "sana", "wan", "wan-picture"])
def test_a_negative_equal_to_the_prompt_changes_nothing(name):
    seen = []
    pipe = build(name)
    network = getattr(pipe, case(name).denoiser)
    handle = network.register_forward_pre_hook(lambda _, __, kwargs: seen.append(kwargs), with_kwargs=True)
    plain = run(name, pipe, steps=STEPS)
    handle.remove()
    arguments = {
        "embeds": "encoder_hidden_states",
        "mask": "text_embedding_mask" if "hunyuan" in name else "encoder_attention_mask",
        "pooled": "pooled_projections" if "flux" in name else "",
        "embeds_2": "encoder_hidden_states_t5",
        "mask_2": "text_embedding_mask_t5",
    }
    parts = {part: seen[0][argument][-1:] for part, argument in arguments.items() if seen[0].get(argument) is not None}
    assert change(guided(name, nag(name, Text(**parts))), plain) < 1e-5


def state(network: torch.nn.Module) -> dict[str, tuple[frozenset[str], object]]:
    """Names of the attributes, and the processors; those of perturbed-attention guidance an error leaves behind."""
    return {
        path: (frozenset(vars(m)), None if "PAG" in type(p).__name__ or "attn1" in path else p)
        for path, m in network.named_modules()
        for p in [getattr(m, "processor", None)]
    }


@pytest.mark.parametrize("name", [*CROSSED, *JOINT])
def test_nothing_is_left_after_a_run_or_an_error(name):
    pipe = build(name)
    network = getattr(pipe, case(name).denoiser)
    plain = run(name, pipe, steps=STEPS)
    before = state(network)
    deep = [m for path, m in network.named_modules() if path.endswith(("to_v", "to_out.0", "add_v_proj"))][-1]

    def fail(*_):
        raise ArithmeticError("in the middle")

    with guide(name, pipe, nag(name)):
        ours = run(name, pipe, steps=STEPS)
        handle = deep.register_forward_hook(fail)
        with pytest.raises(ArithmeticError, match="in the middle"):
            run(name, pipe, steps=STEPS)
        handle.remove()
        assert torch.equal(run(name, pipe, steps=STEPS), ours)
        deep.register_forward_hook(fail)
        with pytest.raises(ArithmeticError, match="in the middle"):
            run(name, pipe, steps=STEPS)
    deep._forward_hooks.clear()
    assert state(network) == before
    assert torch.equal(run(name, pipe, steps=STEPS), plain)


# -- two networks, one after the other -------------------------------------------------------------------------------


def test_the_second_of_two_networks_is_guided_too_with_keys_of_its_own():
    pipe, negative = build("wan-two"), text("wan-two")
    plain = run("wan-two", pipe, steps=6)
    before = [state(network) for network in (pipe.transformer, pipe.transformer_2)]
    with attach(pipe, nag("wan-two")) as attachment:
        ours = run("wan-two", pipe, steps=6)
        _, counted = count(lambda: run("wan-two", pipe, steps=6))
        plan, trace = attachment.plan, attachment.trace
    with naive.crossed(pipe.transformer, negative, MILD, 0, 1, 2):
        with naive.crossed(pipe.transformer_2, negative, MILD, 0, 1, 2):
            expected = run("wan-two", pipe, steps=6)
        half = run("wan-two", pipe, steps=6)
    assert change(ours, expected) < 1e-5
    assert change(half, expected) > 1e-3 < change(half, plain)
    assert trace.rows == plan.rows
    assert counted == plan.cost.macs  # keys and values are made once for each network
    assert trace.held == plan.cost.bytes
    assert [state(network) for network in (pipe.transformer, pipe.transformer_2)] == before
    assert torch.equal(run("wan-two", pipe, steps=6), plain)


def test_what_one_network_computed_is_not_reused_by_the_next():
    pipe = build("wan-two")  # timesteps 1000, 833, 667, ...: the second network has all but the first two
    with attach(pipe, FORA(3, "start")) as attachment:
        run("wan-two", pipe, steps=6)
        assert attachment.trace.rows == attachment.plan.rows
        assert attachment.trace.row("blocks.0.attn2")[::2] == "#.##.."
        beforehand = plan(pipe, FORA(3, "start"), steps=6, scheduler=pipe.scheduler)
        assert attachment.plan.rows == beforehand.rows


def test_two_networks_of_different_shapes_are_refused():
    pipe = build("wan-two")
    pipe.transformer_2 = tiny("WanTransformer3DModel", WAN | {"num_layers": 2})
    with pytest.raises(ValueError, match=r"WanPipeline has two denoisers, .* whose modules differ; two of one shape"):
        attach(pipe, nag("wan-two"))


# -- whose rows ------------------------------------------------------------------------------------------------------


def three_are_three_single_runs(name: str, method, guidance: bool):
    """Three prompts with three negatives in a batch, and one by one."""
    pipe = build(name)

    def latents(negative: Text, **request) -> Tensor:
        with attach(pipe, method(negative), guidance=guidance if "pixart" in name else None):
            return run(name, pipe, steps=STEPS, guidance=guidance, **request)

    together = latents(text(name, rows=3), prompts=3)
    for i in range(3):
        assert change(together[i : i + 1], latents(text(name, seed=i), seed=i)) < 1e-4


@pytest.mark.parametrize("guidance", [True, False])
@pytest.mark.parametrize("name", [*FEW, "sd-lcm", "latte", "flux-true-cfg", "sana", "wan"])
def test_three_prompts_with_three_negatives_are_three_single_runs(name, guidance):
    three_are_three_single_runs(name, partial(nag, name), guidance)


@pytest.mark.parametrize("name", ["sd", "pixart-alpha", "hunyuan-dit", "latte", "sana", "wan"])
def test_three_prompts_of_vsf_are_three_single_runs(name):
    """Wan's attention takes its mask as it comes, the others repeat it for their heads."""
    three_are_three_single_runs(name, lambda negative: VSF(3.0, 0.1, negative_prompt_embeds=negative), guidance=False)


def test_one_negative_serves_two_prompts_and_all_three_branches():
    """The public code guides the wrong rows, silently: it reads the layout off the number of rows."""
    for name in ("sd", "sd-pag"):
        for guidance in (True, False):
            pipe = build(name)
            with attach(pipe, nag(name)):
                alone = [run(name, pipe, steps=STEPS, seed=i, guidance=guidance) for i in range(3)]
                for prompts in (2, 3):
                    together = run(name, pipe, steps=STEPS, prompts=prompts, guidance=guidance)
                    assert change(together, torch.cat(alone[:prompts])) < 1e-4


def test_of_perturbed_attention_without_guidance_the_unperturbed_half_is_guided():
    """The public code takes the halves for those of guidance, and guides the perturbed one."""
    pipe, request = build("sd-pag"), {"guidance": False, "pag_scale": 3.0, "prompts": 2, "steps": STEPS}
    with naive.crossed(pipe.unet, text("sd"), MILD, 0, 2):
        expected = run("sd-pag", pipe, **request)
    with attach(pipe, nag("sd")) as attachment:
        assert change(run("sd-pag", pipe, **request), expected) < 1e-5
        assert report(attachment).rows == 2


def test_the_third_call_of_skip_layer_guidance_is_a_plain_one():
    """The public code divides by zero."""
    pipe, calls = build("sd3"), []
    skipping = {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
    with attach(pipe, nag("sd3")) as attachment:
        handle = pipe.transformer.register_forward_hook(lambda *call: calls.append(call[2:]), with_kwargs=True)
        run("sd3", pipe, steps=STEPS, **skipping)
        handle.remove()
        assert attachment.trace.row("transformer_blocks.0.attn") == "gg#g#"  # not in the first step
    third = [(kwargs, output) for kwargs, output in calls if kwargs.get("skip_layers")]
    assert len(third) == STEPS - 1
    with torch.no_grad():
        for kwargs, output in third:
            assert torch.equal(pipe.transformer(**kwargs)[0], output[0])


def test_of_several_images_of_a_prompt_each_may_have_its_own_negative():
    pipe = build("sd")
    drawn = [torch.Generator().manual_seed(i) for i in range(2)]
    with attach(pipe, nag("sd", text("sd", rows=2))):
        both = run("sd", pipe, steps=STEPS, num_images_per_prompt=2, generator=drawn)
    for i in range(2):
        with attach(pipe, nag("sd", text("sd", seed=i))):
            one = run("sd", pipe, steps=STEPS, generator=torch.Generator().manual_seed(i))
        assert change(both[i : i + 1], one) < 1e-4


def test_only_conditional_rows_change():
    pipe = build("sd")
    outputs = []
    module = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2
    for methods in ((), (nag("sd", layers=("mid_block",)),)):
        attachment = attach(pipe, *methods) if methods else None
        handle = module.register_forward_hook(lambda *call: outputs.append(call[-1]))
        run("sd", pipe, steps=1)
        handle.remove()
        if attachment:
            attachment.detach()
    plain, ours = outputs
    assert torch.equal(plain[0], ours[0])
    assert change(ours[1], plain[1]) > 1e-2


# -- where the text comes from ---------------------------------------------------------------------------------------


def test_without_a_negative_text_that_of_the_guidance_is_taken():
    explicit = draw("x", 1, TOKENS, WIDTH)
    ours = guided("sd", NAG(2.5, 2.0, 0.5), negative_prompt_embeds=explicit)
    same = guided("sd", nag("sd", Text(explicit)), negative_prompt_embeds=explicit)
    assert torch.equal(ours, same)


def test_without_any_negative_text_it_says_what_to_give():
    with pytest.raises(ValueError, match='give negative_prompt \\(""'):
        guided("sd", NAG(), guidance=False)


def test_a_pipeline_without_text_encoders_wants_embeddings():
    with pytest.raises(ValueError, match=r"no text encoder.*negative_prompt_embeds"):
        attach(build("sd"), NAG(negative_prompt="blurry"))


def test_a_pipeline_that_does_not_tell_its_branches_must_be_told():
    pipe = build("pixart-alpha")
    with attach(pipe, nag("pixart-alpha")), pytest.raises(ValueError, match="guidance=True"):
        run("pixart-alpha", pipe, steps=1)


@pytest.mark.parametrize(
    ("negative", "message"),
    [
        (Text(draw("x", 1, 4, WIDTH + 1)), "17 features, .* takes 16"),
        (Text(draw("x", 3, 4, WIDTH)), "3 rows for 2 samples"),
    ],
)
def test_a_text_that_does_not_fit_is_refused(negative, message):
    with pytest.raises(ValueError, match=message):
        guided("sd", nag("sd", negative), prompts=2)


def test_masks_are_needed_where_the_prompt_has_one_and_hide_not_everything():
    with pytest.raises(ValueError, match="needs its mask"):
        guided("pixart-alpha", nag("pixart-alpha", Text(draw("x", 1, 4, WIDTH))))
    with pytest.raises(ValueError, match="hides all its tokens"):
        Text(draw("x", 1, 4, WIDTH), mask=torch.zeros(1, 4))
    with pytest.raises(ValueError, match="mask has 2 rows"):
        Text(draw("x", 1, 4, WIDTH), mask=torch.ones(2, 4))


def test_padding_of_the_negative_text_does_not_matter():
    short = text("pixart-alpha", tokens=4)
    longer = Text(
        torch.cat([short.embeds, draw("junk", 1, 5, WIDTH)], 1), torch.cat([short.mask, torch.zeros(1, 5)], 1)
    )
    one, other = (guided("pixart-alpha", nag("pixart-alpha", t)) for t in (short, longer))
    assert change(one, other) < 1e-5


def test_the_reference_mode_of_flux_needs_a_pooled_vector_and_equal_lengths():
    for negative in (text("flux", tokens=4), replace(text("flux", tokens=TOKENS), pooled=None)):
        with pytest.raises(ValueError, match="pooled vector and texts of equal length"):
            guided("flux", nag("flux", negative, mode="reference"))


@pytest.mark.parametrize("name", ["sd", "sdxl", "pixart-alpha", "latte", "hunyuan-dit", "sd3"])
def test_a_prompt_is_encoded_as_the_pipeline_encodes_its_own(name):
    """As the negative prompt of guidance, which is taken where the method has none."""
    pipe = with_text(name)

    def latents(method: NAG, **kwargs) -> Tensor:
        with guide(name, pipe, method):
            return case(name).run(pipe, steps=2, **worded(name), **kwargs)

    words = NAG(2.5, 2.0, 0.5, negative_prompt="b c")
    own = NAG(2.5, 2.0, 0.5)
    assert change(latents(words, negative_prompt="b c"), latents(own, negative_prompt="b c")) < 1e-5
    assert change(latents(words, negative_prompt="d"), latents(own, negative_prompt="d")) > 1e-3
    assert torch.equal(latents(words, negative_prompt="d"), latents(words, negative_prompt="d"))


def worded(name: str) -> dict:
    """Arguments that put a prompt in the place of the embeddings; Latte cuts the negative one to its length."""
    known = inspect.signature(type(build(name)).__call__).parameters
    encoded = [argument for argument in known if "prompt_embeds" in argument or "prompt_attention_mask" in argument]
    return {"prompt": "a b"} | dict.fromkeys(encoded)


def test_a_prompt_is_no_longer_than_the_tokenizer_reads():
    """PixArt's own default of 120 tokens is beyond small text encoders, with positions for fewer."""
    pipe = zoo.load("emoji-pixart")
    with attach(pipe, NAG(negative_prompt="red"), guidance=False) as attachment:
        assert attachment.methods[0].text.embeds.shape[1] == pipe.tokenizer.model_max_length == 16


def test_flux_encodes_with_both_encoders():
    pipe = with_text("flux")
    embeds, pooled, _ = pipe.encode_prompt("b c", None)
    with attach(pipe, NAG(2.5, 2.0, 0.5, negative_prompt="b c")) as attachment:
        (method,) = attachment.methods
    assert torch.equal(method.text.embeds, embeds)
    assert torch.equal(method.text.pooled, pooled)


def test_prompts_are_given_once_or_one_for_each_sample():
    pipe = with_text("sd")
    prompts = {"prompt": ["a", "a b"], "prompt_embeds": None, "negative_prompt_embeds": None}
    with attach(pipe, NAG(2.5, negative_prompt=["b", "c"])):
        both = run("sd", pipe, prompts=2, steps=2, **prompts)
    for i, negative in enumerate("bc"):
        with attach(pipe, NAG(2.5, negative_prompt=negative)):
            one = run("sd", pipe, seed=i, steps=2, **prompts | {"prompt": prompts["prompt"][i]})
        assert change(both[i : i + 1], one) < 1e-4


# -- when and where --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("window", "row"),
    [
        ({}, "gggggggg"),
        ({"end": 0.25}, "gg######"),
        ({"end": 0.3}, "ggg#####"),
        ({"start": 0.2}, "#ggggggg"),
        ({"start": 0.3, "end": 0.5}, "##gg####"),
        ({"start": 2, "end": 5}, "##ggg###"),
        ({"start": 7, "end": 1.0}, "#######g"),
    ],
)
def test_windows_of_steps(window, row):
    assert (
        plan("sd15", NAG(**window, negative_prompt="blurry"), steps=8).row(
            "mid_block.attentions.0.transformer_blocks.0.attn2"
        )
        == row
    )


SCHEDULES = [
    # the counts of the authors' rule, worked out by hand
    ([1000, 750, 500, 250], True, {0.25: 2, 0.5: 3, 0.75: 4, 0.0: 1}),
    ([999, 749, 499, 249], False, {0.25: 2, 0.5: 3}),
    ([961, 721, 481, 241], False, {0.0: 0}),
]


def flux_dev(steps: int = 25, mu: float = 1.15) -> list[float]:
    """Timesteps of Flux at 1024 x 1024: a shifted schedule."""
    sigmas = torch.linspace(1, 1 / steps, steps, dtype=torch.float64)
    e = torch.tensor(mu, dtype=torch.float64).exp()
    return (1000 * e / (e + 1 / sigmas - 1)).tolist()


@pytest.mark.parametrize(("timesteps", "flow", "counts"), [*SCHEDULES, (flux_dev(), True, {0.25: 13, 0.5: 19})])
def test_windows_of_timesteps_cover_what_the_authors_code_covers(timesteps, flow, counts):
    network = network_of(getattr(build("flux" if flow else "sd"), "transformer" if flow else "unet"))
    for end, expected in counts.items():
        method = NAG(5.0, end=end, window="timestep", start=0 if end == 0 else 0.0, network=network)
        assert sum(method.active(step) for step in lay_out(timesteps, 1, 1)) == expected


def ddim(steps: int) -> DDIMScheduler:
    scheduler = DDIMScheduler()  # timesteps 980, 960, ..., 0 for 50
    scheduler.set_timesteps(steps)
    return scheduler


@pytest.mark.parametrize(
    ("window", "row", "said"),
    [
        # eight steps of 125: 875, 750, ..., 0; a threshold is the first step below it
        ({"end": Timestep(600)}, "ggg#####", "NAG: end=Timestep(600) is step 3 of 8"),
        ({"end": Timestep(625)}, "ggg#####", "NAG: end=Timestep(625) is step 3 of 8"),
        (
            {"start": Timestep(800), "end": Timestep(200)},
            "#ggggg##",
            "NAG: start=Timestep(800) is step 1 of 8\nNAG: end=Timestep(200) is step 6 of 8",
        ),
        ({"start": 1, "end": Timestep(100)}, "#gggggg#", "NAG: end=Timestep(100) is step 7 of 8"),
        # noise levels sqrt(1 / product of alphas - 1): 48.6, 17.4, 7.2, 3.4, 1.8, 1.0, 0.4, 0.0
        ({"end": Sigma(4.0)}, "ggg#####", "NAG: end=Sigma(4.0) is step 3 of 8"),
        ({"end": Sigma(0.0)}, "gggggggg", "NAG: end=Sigma(0.0) is step 8 of 8"),
    ],
)
def test_windows_of_thresholds_are_exact_and_printed(window, row, said):
    found = plan("sd15", NAG(**window, negative_prompt="blurry"), steps=8, scheduler=ddim(8))
    assert found.row("mid_block.attentions.0.transformer_blocks.0.attn2") == row
    assert said in str(found)


def test_a_window_of_noise_levels_runs_in_a_flow():
    pipe = build("flux")
    with attach(pipe, nag("flux", end=Sigma(0.75))) as attachment:
        run("flux", pipe, steps=4)
        sigmas = pipe.scheduler.sigmas[:4]
        assert attachment.trace.row("") == "".join("g" if sigma >= 0.75 else "#" for sigma in sigmas)
        assert "NAG: end=Sigma(0.75) is step" in str(attachment.trace)


@pytest.mark.parametrize(
    ("window", "message"),
    [
        ({"start": Sigma(1.0), "end": Sigma(2.0)}, r"start must be before end .* got Sigma\(1.0\) and Sigma\(2.0\)"),
        ({"end": 5, "window": "timestep"}, r"counts fractions .* got start=0.0 and end=5; .* go with window=.steps"),
        ({"end": Timestep(5), "window": "timestep"}, r"counts fractions .* end=Timestep\(5\)"),
        ({"end": "late"}, r"end must be a finite number of at least 0, Timestep\(t\) or Sigma\(s\), got late"),
    ],
)
def test_windows_that_make_no_sense_are_refused(window, message):
    with pytest.raises(ValueError, match=message):
        NAG(**window)


def test_a_threshold_needs_a_schedule_to_plan_with():
    with pytest.raises(ValueError, match="goes by noise levels, and none are known: plan"):
        plan("sd15", NAG(end=Sigma(4.0), negative_prompt="blurry"), steps=4)


def test_a_window_of_timesteps_runs():
    pipe = build("sd")
    with attach(pipe, nag("sd", window="timestep", end=0.5)) as attachment:
        run("sd", pipe, steps=4)
        assert attachment.trace.row("", None) == "gg##"
    with pytest.raises(ValueError, match="scheduler="):
        plan("sd15", NAG(window="timestep", end=0.5), steps=4)


def test_the_last_timestep_of_sana_sprint_is_no_step():
    pipe = build("sana-sprint")  # timesteps 1.57, 1.3, 0
    with attach(pipe, nag("sana-sprint", end=Timestep(1.4))) as attachment:
        run("sana-sprint", pipe, steps=2)
        assert attachment.trace.row("") == attachment.plan.row("") == "g#"


def test_outside_its_window_a_step_is_the_plain_one():
    pipe = build("sd")
    with attach(pipe, nag("sd", end=1)) as attachment:
        _, counted = count(lambda: run("sd", pipe, steps=4))
        assert attachment.trace.row("") == "g###"
    _, first = count(lambda: guided("sd", nag("sd"), steps=1))
    _, plain = count(lambda: run("sd", pipe, steps=3))
    assert counted == first + plain


@pytest.mark.parametrize(("layers", "guided_layers"), [((0, 2), [0, 2]), (("mid_block",), [1]), ((), [0, 1, 2, 3])])
def test_layers_are_chosen_by_number_or_by_path(layers, guided_layers):
    pipe = build("sd")
    paths = [s.path for s in plan(pipe, TGate(1, 1), steps=1).sites if s.kind == "cross-attention"]
    with attach(pipe, nag("sd", layers=layers)) as attachment:
        run("sd", pipe, steps=1)
        assert list(report(attachment).layers) == [paths[i] for i in guided_layers]


def test_unguided_layers_of_a_joint_network_still_carry_the_negative_text():
    pipe = build("sd3")
    with attach(pipe, nag("sd3", layers=(3,))) as attachment:
        one = run("sd3", pipe, steps=STEPS)
        assert attachment.trace.row("transformer_blocks.0") == "ggg"
        assert report(attachment).layers == ("transformer_blocks.3.attn",)
    assert 1e-3 < change(one, run("sd3", pipe, steps=STEPS)) < change(guided("sd3", nag("sd3")), one) * 100


def test_layers_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="among these layers"):
        attach(build("sd"), nag("sd", layers=("nowhere",)))


# -- what it costs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "rows"), [*((name, 1) for name in [*CROSSED, *JOINT]), *((name, 2) for name in FEW)])
def test_the_cost_is_what_was_promised(name, rows):
    pipe = build(name)
    _, plain = count(lambda: run(name, pipe, steps=STEPS, prompts=2))
    with guide(name, pipe, nag(name, text(name, rows=rows), end=2)) as attachment:
        _, counted = count(lambda: run(name, pipe, steps=STEPS, prompts=2))
        cost, trace = attachment.plan.cost, attachment.trace
    if name in ("sd3", "sd35"):
        # Whether a linear layer comes as a batch of products, and so as attention, depends on its input's layout.
        assert counted.all - plain.all == cost.macs.all - cost.baseline.all
    else:
        assert counted - plain == cost.macs - cost.baseline
    assert trace.rows == attachment.plan.rows
    assert trace.cost == cost
    assert trace.held == cost.bytes


def test_the_cost_is_the_formula_with_and_without_remembered_keys():
    """Extra per layer: 2 N T- D for the second attention at every step, 2 T- Dc D for keys and values at the first."""
    pipe, negative = build("sd"), text("sd", tokens=5)
    sites = [m for path, m in pipe.unet.named_modules() if path.endswith("attn2")]
    queries = {8: 256, 16: 64}  # tokens by width
    widths = [m.inner_dim for m in sites]
    attention = sum(2 * queries[d] * 5 * d for d in widths)
    keys = sum(2 * 5 * WIDTH * d for d in widths)
    for steps in (1, 3):
        _, plain = count(partial(run, "sd", pipe, steps=steps))
        with attach(pipe, nag("sd", negative)):
            _, ours = count(partial(run, "sd", pipe, steps=steps))
        assert (ours - plain).all == steps * attention + keys
        assert (ours - plain).papers == keys


def test_a_plan_made_beforehand_is_the_one_in_force():
    pipe = build("sdxl")
    method = nag("sdxl", text("sdxl", tokens=77), end=0.5)
    beforehand = plan(pipe, method, steps=STEPS)
    with attach(pipe, method) as attachment:
        run("sdxl", pipe, steps=STEPS)
        assert attachment.trace.rows == beforehand.rows
    assert "scale=2.5, tau=2.0, alpha=0.5" in beforehand.methods[0]


def test_a_published_network_is_planned_with_published_settings():
    table = plan("sdxl", NAG(negative_prompt="blurry"), steps=4, guidance=False)
    assert "scale=3.0, tau=2.5, alpha=0.5" in table.methods[0]
    extra = table.cost.macs.all / table.cost.baseline.all - 1
    assert 0.005 < extra < 0.008  # 0.54 % with remembered keys, and the keys once


def test_a_new_negative_of_equal_shape_makes_no_new_graph():
    z, n = draw("z", 2, 8, 16), draw("n", 2, 8, 16)
    counter = CompileCounter()
    compiled = torch.compile(operator.nag, backend=counter, fullgraph=True)
    torch.testing.assert_close(compiled(z, n, 5.0, 2.5, 0.25), operator.nag(z, n, 5.0, 2.5, 0.25))
    compiled(z, -n, 5.0, 2.5, 0.25)
    assert counter.frame_count == 1


# -- with the other methods ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("name", ["sd", "pixart-alpha"])
def test_tgate_keeps_the_guided_output_and_then_guidance_is_free(name, order):
    methods = [TGate(gate_step=2, sp_interval=1), nag(name)]
    pipe = build(name)
    plain, gated, ungated = run(name, pipe, steps=6), None, guided(name, nag(name), steps=6)
    with guide(name, pipe, TGate(gate_step=2, sp_interval=1)) as attachment:
        gated = run(name, pipe, steps=6)
        gate_alone = attachment.plan.cost
    with guide(name, pipe, *(methods if order else methods[::-1])) as attachment:
        _, counted = count(lambda: run(name, pipe, steps=6))
        both, trace = run(name, pipe, steps=6), attachment.trace
        cost = attachment.plan.cost
    row = next(row for site, row in zip(trace.sites, trace.rows, strict=True) if site.kind == "cross-attention")
    assert row == "gg...."
    assert report(attachment).steps == (0, 1)
    assert counted == cost.macs
    with guide(name, pipe, nag(name, end=2)) as attachment:
        run(name, pipe, steps=6)
        guidance = attachment.plan.cost
    # T-GATE asks everybody to compute anew at its gate, so the negative keys and values are made twice.
    assert cost.macs.all - gate_alone.macs.all >= guidance.macs.all - guidance.baseline.all
    assert change(both, plain) > 1e-2
    assert change(both, ungated) < 3 * change(gated, plain) + 1e-2


def test_deepcache_skips_guided_layers_too():
    pipe = build("sd-deep")
    with attach(pipe, DeepCache(interval=3), nag("sd-deep")) as attachment:
        _, counted = count(lambda: run("sd-deep", pipe, steps=6))
        assert counted == attachment.plan.cost.macs
        assert attachment.trace.rows == attachment.plan.rows
        assert attachment.trace.row("mid_block.attentions.0.transformer_blocks.0.attn2") == "g  g  "


def test_guidance_may_stop_while_steering_goes_on():
    for name in ("sd", "sd3"):
        pipe = build(name)
        with attach(pipe, GuidanceStop(2), nag(name)) as attachment:
            latents = run(name, pipe, steps=4)
            assert attachment.trace.rows == attachment.plan.rows
            assert report(attachment).steps == (0, 1, 2, 3)
        with attach(pipe, GuidanceStop(2)):
            assert change(latents, run(name, pipe, steps=4)) > 1e-2


@pytest.mark.parametrize("name", ["pixart-alpha", "sd3", "flux"])
def test_fora_reuses_guided_attention(name):
    pipe = build(name)
    with guide(name, pipe, FORA(interval=2), nag(name)) as attachment:
        latents = run(name, pipe, steps=4)
        assert attachment.trace.rows == attachment.plan.rows
    with guide(name, pipe, FORA(interval=2)):
        assert change(latents, run(name, pipe, steps=4)) > 1e-2


def test_blocks_that_the_negative_text_must_go_through_are_not_skipped():
    pipe = build("sd3")
    with attach(pipe, DeltaDiT(interval=2, blocks=2), nag("sd3", end=1)):
        run("sd3", pipe, steps=4)
    with (
        attach(pipe, DeltaDiT(interval=2, blocks=2), nag("sd3")),
        pytest.raises(ValueError, match="another method skipped 2 of 4 blocks in step 1"),
    ):
        run("sd3", pipe, steps=4)


class Adapted(torch.nn.Module):
    """A linear layer with a low-rank one beside it, as adapters put it in place."""

    def __init__(self, base: torch.nn.Linear, seed: int) -> None:
        super().__init__()
        self.base, self.out_features = base, base.out_features
        self.down, self.up = draw(f"down {seed}", 2, base.in_features), draw(f"up {seed}", base.out_features, 2) / 9

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down.T @ self.up.T


def test_adapters_are_called_through():
    pipe = build("sd")
    for i, attn in enumerate(m for path, m in pipe.unet.named_modules() if path.endswith("attn2")):
        attn.to_q, attn.to_k, attn.to_v = (Adapted(layer, i) for layer in (attn.to_q, attn.to_k, attn.to_v))
        attn.to_out[0] = Adapted(attn.to_out[0], i)
    plain = run("sd", pipe, steps=STEPS)
    with naive.crossed(pipe.unet, text("sd"), MILD):
        expected = run("sd", pipe, steps=STEPS)
    with attach(pipe, nag("sd")):
        assert change(run("sd", pipe, steps=STEPS), expected) < 1e-5
    assert torch.equal(run("sd", pipe, steps=STEPS), plain)


# peft asks transformers for what is about to be renamed there
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_a_lora_of_peft_is_called_through_and_may_be_rescaled_while_attached(name):
    peft = pytest.importorskip("peft", reason="needs the extra `peft`")
    pipe = build(name)
    network = getattr(pipe, case(name).denoiser)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj"]
    network.add_adapter(peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    with attach(pipe, nag(name)):
        full = run(name, pipe, steps=STEPS)
        network.set_adapters(["default"], [0.3])
        ours = run(name, pipe, steps=STEPS)
    assert change(ours, full) > 1e-3
    with naively_guided(name, pipe):
        expected = run(name, pipe, steps=STEPS)
    assert change(ours, expected) < 1e-5
    assert change(guided(name, nag(name)), expected) > 1e-3


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("name", ["sd", "sd3", "flux", "hunyuan-dit"])
def test_fused_projections_are_used_as_they_are(name, late):
    """Also where they are fused after attaching."""
    ours = guided(name, nag(name))
    pipe = build(name)
    network = getattr(pipe, case(name).denoiser)
    if not late:
        network.fuse_qkv_projections()
    with attach(pipe, nag(name)):
        if late:
            network.fuse_qkv_projections()
        assert change(run(name, pipe, steps=STEPS), ours) < 1e-5


def test_sliced_attention_is_used_as_it_is():
    pipe = build("sd")
    pipe.enable_attention_slicing("max")
    with attach(pipe, nag("sd")):
        assert change(run("sd", pipe, steps=STEPS), guided("sd", nag("sd"))) < 1e-5


@pytest.mark.filterwarnings("ignore:.*kept in float32")
@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_text_and_guidance_follow_the_type_of_the_network(name):
    pipe = build(name).to(torch.bfloat16)
    with attach(pipe, nag(name)):
        half = run(name, pipe, steps=STEPS)
    assert half.dtype is torch.bfloat16
    assert change(half.float(), guided(name, nag(name))) < 0.1


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scale": 0.5}, "scale must be a finite number of at least 1"),
        ({"scale": float("inf")}, "scale must be"),
        ({"tau": 0.9}, "tau must be"),
        ({"alpha": 1.1}, "alpha must be at most 1"),
        ({"alpha": -0.1}, "alpha must be"),
        ({"scale": 3.0, "phi": 2.0}, "give one of them"),
        ({"norm": "l3"}, "norm must be one of"),
        ({"mode": "twice"}, "mode must be one of"),
        ({"window": "sigma"}, "window must be one of"),
        ({"start": 0.5, "end": 0.5}, "start must be before end"),
        ({"start": 4, "end": 2}, "start must be before end"),
        ({"end": 1.5}, r"must lie in \[0, 1\]"),
    ],
)
def test_fields_out_of_range_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        NAG(**fields)


def test_phi_is_scale_less_one():
    assert NAG(phi=4.0) == NAG(scale=5.0)


def test_a_network_is_known_by_what_it_derives_from():
    """The public code asks for the exact class, which wrapped and quantised networks are not."""
    pipe = build("flux")

    class Wrapped(type(pipe.transformer)):
        pass

    pipe.transformer.__class__ = Wrapped
    with attach(pipe, nag("flux")):
        assert change(run("flux", pipe, steps=STEPS), guided("flux", nag("flux"))) < 1e-6


@pytest.mark.parametrize("name", ["svd", "dit"])
def test_networks_without_text_are_refused(name):
    with pytest.raises(ValueError, match=r"not known for .*; it is for .*UNet2DConditionModel"):
        attach(build(name), NAG(negative_prompt=""))


def test_a_picture_leaves_the_negative_text_as_long_as_diffusers_counts_upon():
    with pytest.raises(ValueError, match=r"by the text's 512 tokens, .*; the negative text has 4"):
        attach(build("wan-picture"), nag("wan-picture", text("wan")))
    with pytest.raises(ValueError, match="does not go with a picture beside the text; NAG and NASA do"):
        guided("wan-picture", VSF(negative_prompt_embeds=text("wan-picture")), guidance=False, steps=1)


def test_unknown_processors_are_refused():
    class Strange:
        def __call__(self, *_, **__):
            raise AssertionError

    pipe = build("sd")
    pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.processor = Strange()
    with pytest.raises(ValueError, match="has the processor Strange"):
        attach(pipe, nag("sd"))


def test_a_processor_that_projects_elsewhere_does_not_pass_silently():
    pipe = build("sd")
    with attach(pipe, nag("sd")):
        attn = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2
        attn.processor = lambda _, hidden_states, **__: hidden_states
        with pytest.raises(RuntimeError, match="nothing was guided"):
            run("sd", pipe, steps=1)


# -- the report ------------------------------------------------------------------------------------------------------


def test_the_report_says_what_was_done():
    pipe = build("sd")
    with attach(pipe, NAG(3.0, 1e6, 0.5, negative_prompt_embeds=text("sd"), end=2)) as attachment:
        run("sd", pipe, steps=4, prompts=2)
        told = report(attachment)
    assert (len(told.layers), told.steps, told.rows) == (4, (0, 1), 2)
    assert told.ratio > 1
    assert (told.clipped, told.scale) == (0, pytest.approx(1.0))  # alpha phi
    assert "4 layers in 2 steps, 2 rows" in str(told)
    with attach(pipe, NAG(30.0, 1.0, 0.5, negative_prompt_embeds=text("sd"))) as attachment:
        run("sd", pipe, steps=1)
        told = report(attachment)
    assert told.clipped > 0.9
    assert told.scale < 0.5 * 29


@pytest.mark.parametrize(
    ("name", "mode", "layers"), [("sd3", "shared", 4), ("flux", "shared", 6), ("flux", "reference", 6)]
)
def test_the_report_of_joint_attention(name, mode, layers):
    pipe, negative = build(name), text(name, tokens=TOKENS)
    with attach(pipe, NAG(3.0, 1e6, 0.5, negative_prompt_embeds=negative, mode=mode)) as attachment:
        run(name, pipe, steps=2, prompts=2)
        told = report(attachment)
    assert (len(told.layers), told.steps, told.rows) == (layers, (0, 1), 2)
    assert told.ratio > 1
    assert (told.clipped, told.scale) == (0, pytest.approx(1.0))


def test_the_report_of_an_operator_without_norms_and_of_no_guidance_at_all():
    pipe = build("sd")
    with attach(pipe, NASA(0.4, negative_prompt_embeds=text("sd"))) as attachment:
        run("sd", pipe, steps=1)
        told = report(attachment)
        assert (len(told.layers), told.rows, told.ratio, told.clipped) == (4, 1, 1.0, 0.0)
    with attach(pipe, GuidanceStop(1)) as attachment, pytest.raises(ValueError, match="guides inside attention"):
        report(attachment)

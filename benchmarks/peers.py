"""Other packages beside ours, in one run: tgate, DeepCache, diffusers' own caches, cache-dit.

Every contestant has a pipeline of its own with the same random weights (speed and exactness only, never quality), and
all take turns. Asked of each: seconds against plain, how far its latents are from those of our method with the same
settings, whether a second generation, one with other steps and one after an interruption give what a fresh pipeline
gives, and whether the plain pipeline is back bit for bit afterwards, with nothing left on its modules.

The packages are not needed by this library. Put them in a folder of their own, without their dependencies:

    pip install --no-deps --target peers tgate==1.0.0 DeepCache==0.1.1 cache-dit
    python benchmarks/peers.py --packages peers --turns 5

The table goes to docs/peers.md, between its marks.
"""

import argparse
import contextlib
import copy
import importlib.metadata
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import overhead
import torch
from diffusers import DiffusionPipeline, FirstBlockCacheConfig, PyramidAttentionBroadcastConfig, UNet2DConditionModel
from diffusers.hooks import apply_first_block_cache, apply_pyramid_attention_broadcast
from torch import Tensor, nn

from whenwhere import DeepCache, Method, TGate, Upstream, attach
from whenwhere.bench.environment import Environment
from whenwhere.finding import denoiser_of

STEPS, SIZE = 8, 16  # of latents, as the autoencoder is no more than a formality
BROADCAST = {"spatial_attention_block_skip_range": 2, "spatial_attention_timestep_skip_range": (-1, 1001)}

Call = Callable[..., Tensor]  # takes what the pipeline takes, gives latents
Switch = Callable[[Any], tuple[Call, Callable[[], None]]]  # put on a pipeline: how to call it, how to take it off


class InterruptedOnPurposeError(Exception):
    """Raised in the middle of a generation, on purpose."""


@dataclass
class Contestant:
    """One way to run a model.

    Attributes:
        name, setting: for the table.
        switch: puts it on a pipeline.
        ours: the contestant of this library with the same settings; empty for none.
        model: the name of the model.
        seconds: of every turn.
        found: by question, what was found.
    """

    name: str
    setting: str
    switch: Switch
    ours: str
    model: str = ""
    seconds: list[float] = field(default_factory=list)
    found: dict[str, str] = field(default_factory=dict)
    latents: Tensor | None = None


def latents_of(pipe: Any) -> Call:
    return lambda **kwargs: pipe(**kwargs).images


def ours(*methods: Method) -> Switch:
    def switch(pipe: Any) -> tuple[Call, Callable[[], None]]:
        attached = attach(pipe, *methods)
        return latents_of(pipe), attached.detach

    return switch


def plain(pipe: Any) -> tuple[Call, Callable[[], None]]:
    return latents_of(pipe), lambda: None


def tgate(pipe: Any) -> tuple[Call, Callable[[], None]]:
    """It has no way to be taken off: the plain pipeline is called again."""
    from tgate import TgatePixArtAlphaLoader, TgateSDLoader

    loaded = (TgateSDLoader if hasattr(pipe, "unet") else TgatePixArtAlphaLoader)(pipe)
    settings = {"gate_step": 4, "sp_interval": 2, "fi_interval": 1, "warm_up": 1}
    return lambda **kwargs: loaded.tgate(**settings, **kwargs).images, lambda: None


def deepcache(pipe: Any) -> tuple[Call, Callable[[], None]]:
    from DeepCache import DeepCacheSDHelper

    helper = DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=3, cache_branch_id=0)
    helper.enable()
    return latents_of(pipe), helper.disable


def cache_dit(pipe: Any) -> tuple[Call, Callable[[], None]]:
    import cache_dit as package

    config = package.DBCacheConfig(
        Fn_compute_blocks=1, Bn_compute_blocks=0, residual_diff_threshold=0.3, max_warmup_steps=2
    )
    package.enable_cache(pipe, cache_config=config)
    return latents_of(pipe), lambda: package.disable_cache(pipe)


def broadcast(pipe: Any) -> tuple[Call, Callable[[], None]]:
    """Neither model of this run has `disable_cache`: the hooks are removed one by one, as its tests do."""
    now = {"t": 0}
    config = PyramidAttentionBroadcastConfig(**BROADCAST, current_timestep_callback=lambda: now["t"])
    denoiser = denoiser_of(pipe)
    apply_pyramid_attention_broadcast(denoiser, config)
    handle = denoiser.register_forward_pre_hook(lambda _m, args, kw: now.update(t=_time(args, kw)), with_kwargs=True)

    def off() -> None:
        handle.remove()
        remove_hooks(denoiser)

    return latents_of(pipe), off


def first_block(pipe: Any) -> tuple[Call, Callable[[], None]]:
    denoiser = denoiser_of(pipe)
    apply_first_block_cache(denoiser, FirstBlockCacheConfig(threshold=0.3))
    return latents_of(pipe), lambda: remove_hooks(denoiser)


def _time(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    found = kwargs.get("timestep", args[1] if len(args) > 1 else 0)
    return int(torch.as_tensor(found).reshape(-1)[0])


def remove_hooks(denoiser: nn.Module) -> None:
    for module in denoiser.modules():
        registry = getattr(module, "_diffusers_hook", None)
        for name in list(registry.hooks) if registry is not None else ():
            registry.remove_hook(name, recurse=False)


GATED, CACHED = TGate(gate_step=4, sp_interval=2, warm_up=1), DeepCache(interval=3)
TGATE, INTERVAL, RANGE = "gate 4, self-attention every 2", "interval 3, branch 0", "self-attention every 2"


def contestants(unet: bool) -> list[Contestant]:
    pab = Upstream(PyramidAttentionBroadcastConfig(**BROADCAST))
    found = [
        Contestant("plain", "", plain, ""),
        Contestant("**ours**: T-GATE", TGATE, ours(GATED), ""),
        Contestant("tgate", TGATE, tgate, "**ours**: T-GATE"),
    ]
    if unet:
        found.append(Contestant("**ours**: DeepCache", INTERVAL, ours(CACHED), ""))
        found.append(Contestant("DeepCache", INTERVAL, deepcache, "**ours**: DeepCache"))
    found.append(Contestant("**ours**: Upstream(PAB)", RANGE, ours(pab), ""))
    found.append(Contestant("diffusers PAB", RANGE, broadcast, "**ours**: Upstream(PAB)"))
    fbc = "threshold 0.3"
    if not unet:
        found.append(
            Contestant("**ours**: Upstream(FBC)", fbc, ours(Upstream(FirstBlockCacheConfig(threshold=0.3))), "")
        )
        found.append(Contestant("diffusers FBC", fbc, first_block, "**ours**: Upstream(FBC)"))
    found.append(Contestant("cache-dit", "DBCache, 1 block, threshold 0.3, warm-up 2", cache_dit, ""))
    return found


def tiny_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=2,
        cross_attention_dim=overhead.WIDTH,
        attention_head_dim=4,
    ).eval()


def models() -> dict[str, Callable[[], Any]]:
    def tiny() -> Any:
        pipe = overhead.sd_pipeline()
        pipe.register_modules(unet=tiny_unet())
        return pipe

    def pixart() -> Any:
        pipe = overhead.pixart_pipeline()
        pipe.transformer.transformer_blocks = pipe.transformer.transformer_blocks[:6]
        return pipe

    return {"tiny U-Net": tiny, "U-Net": overhead.sd_pipeline, "PixArt": pixart}


def arguments(pipe: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    text, none = (torch.randn(1, overhead.TEXT, overhead.WIDTH, generator=generator) for _ in range(2))
    found = {"prompt_embeds": text, "negative_prompt_embeds": none, "guidance_scale": 4.0, "output_type": "latent"}
    if not hasattr(pipe, "unet"):
        mask = torch.ones(1, overhead.TEXT, dtype=torch.long)
        found |= {"prompt_attention_mask": mask, "negative_prompt_attention_mask": mask, "negative_prompt": None}
        found |= {"use_resolution_binning": False}
    return found | {"height": SIZE, "width": SIZE}


def copy_of(pipe: Any) -> Any:
    """A pipeline with a class of its own: cache-dit patches the class, and would be in the way of all others."""
    own = copy.deepcopy(pipe)
    own.__class__ = type(type(pipe).__name__, (type(pipe),), {})
    return own


def draw(call: Call, common: dict[str, Any], steps: int = STEPS, **more: Any) -> Tensor:
    return call(num_inference_steps=steps, generator=torch.Generator().manual_seed(0), **common, **more)


def fresh(make: Any, switch: Switch, common: dict[str, Any], steps: int) -> Tensor:
    call, _ = switch(copy_of(make))
    return draw(call, common, steps)


def interrupt(call: Call, pipe: Any, common: dict[str, Any]) -> None:
    """One generation that fails in its middle, as when a user stops it."""
    calls = 0

    def stop(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > STEPS // 2:
            raise InterruptedOnPurposeError

    handle = denoiser_of(pipe).register_forward_pre_hook(stop)
    try:
        with contextlib.suppress(InterruptedOnPurposeError):
            draw(call, common)
    finally:
        handle.remove()


def ask(contestant: Contestant, question: str, answer: Callable[[], str]) -> None:
    try:
        contestant.found[question] = answer()
    except Exception as error:
        text = " ".join(str(error).split())[:90]
        contestant.found[question] = f"{type(error).__name__}: {text}"


def same(one: Tensor, other: Tensor) -> str:
    return "yes" if torch.equal(one, other) else f"no, by {float((one - other).abs().max()):.2g}"


def left(denoiser: nn.Module, before: dict[str, set[str]]) -> str:
    """What is on the modules that was not there before."""
    names = {name: set(vars(module)) - before.get(name, set()) for name, module in denoiser.named_modules()}
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in denoiser.modules())
    words = sorted({word for found in names.values() for word in found})
    return ", ".join([*(f"`{word}`" for word in words), *([f"{hooks} hooks"] if hooks else [])]) or "nothing"


def question(contestant: Contestant, pipe: Any) -> None:
    """Everything but seconds."""
    common = arguments(pipe)
    reference = draw(latents_of(copy.deepcopy(pipe)), common)
    own = copy_of(pipe)
    before = {name: set(vars(module)) for name, module in denoiser_of(own).named_modules()}
    try:
        call, off = contestant.switch(own)
        contestant.latents = draw(call, common)
    except Exception as error:
        contestant.found["runs"] = f"{type(error).__name__}: {' '.join(str(error).split())[:140]}"
        return
    first = contestant.latents
    contestant.found["runs"] = (
        "yes" if not torch.equal(first, reference) or contestant.name == "plain" else "changes nothing"
    )
    ask(contestant, "again", lambda: same(draw(call, common), first))
    other = STEPS + 3
    ask(contestant, "steps", lambda: same(draw(call, common, other), fresh(pipe, contestant.switch, common, other)))

    def interrupted() -> str:
        interrupt(call, own, common)
        return same(draw(call, common), first)

    ask(contestant, "interrupted", interrupted)
    ask(contestant, "off", lambda: (off(), same(draw(latents_of(own), common), reference))[1])
    contestant.found["left"] = left(denoiser_of(own), before)


def time_in_turns(running: list[Contestant], pipe: Any, turns: int) -> None:
    common = arguments(pipe)
    calls = [(c, c.switch(copy_of(pipe))[0]) for c in running]
    for turn in range(turns + 1):
        for contestant, call in calls:
            start = time.perf_counter()
            draw(call, common)
            if turn:  # the first turn warms up
                contestant.seconds.append(time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--packages", type=Path, required=True)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--models", nargs="*", default=list(models()))
    parser.add_argument("--page", type=Path, default=Path("docs/peers.md"))
    args = parser.parse_args()
    sys.path.append(str(args.packages.absolute()))
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    lines = []
    for name in args.models:
        make = models()[name]
        torch.manual_seed(0)
        pipe: DiffusionPipeline = make()
        pipe.set_progress_bar_config(disable=True)
        group = contestants(hasattr(pipe, "unet"))
        for contestant in group:
            question(contestant, pipe)
            print(name, contestant.name, contestant.found, flush=True)
        running = [c for c in group if c.found["runs"] in ("yes", "changes nothing")]
        time_in_turns(running, pipe, args.turns)
        lines += table(name, group)
        write(args.page, "\n".join([heading(args.packages, args.turns), "", *lines]))


def heading(packages: Path, turns: int) -> str:
    here = Environment.here(torch.device("cpu"))
    found = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions(path=[str(packages)])}
    versions = ", ".join(f"{name} {version}" for name, version in sorted(found.items()))
    return (
        f"{datetime.now(UTC).date()}, {here.processor}, 1 thread of {here.cores} cores, torch {here.torch}, diffusers "
        f"{here.diffusers}; {versions}. {STEPS} steps of DDIM, {turns} turns after a warm-up."
    )


def table(model: str, group: list[Contestant]) -> list[str]:
    by_name = {contestant.name: contestant for contestant in group}
    base = by_name["plain"].seconds
    lines = [
        f"**{model}**",
        "",
        "| | setting | speed-up | difference from ours | again | other steps | after a stop | plain back | left |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for c in group:
        if c.found["runs"] not in ("yes", "changes nothing"):
            lines.append(f"| {c.name} | {c.setting} | does not run: {c.found['runs'].replace('|', '/')} | | | | | | |")
            continue
        ratio = statistics.median(p / s for p, s in zip(base, c.seconds, strict=True))
        note = " (changes nothing)" if c.found["runs"] != "yes" else ""
        twin = by_name[c.ours].latents if c.ours else None
        difference = (
            "" if twin is None else "none" if torch.equal(twin, c.latents) else f"{(twin - c.latents).abs().max():.2g}"
        )
        cells = [c.found[key].replace("|", "/") for key in ("again", "steps", "interrupted", "off", "left")]
        lines.append(f"| {c.name} | {c.setting} | {ratio:.2f}x{note} | {difference} | {' | '.join(cells)} |")
    return [*lines, ""]


def write(page: Path, text: str) -> None:
    marks = re.compile(r"(<!-- peers -->\n).*?(<!-- end -->)", re.DOTALL)
    page.write_text(marks.sub(lambda m: f"{m[1]}{text}\n{m[2]}", page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()

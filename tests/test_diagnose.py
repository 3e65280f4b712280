"""The survey of smoothness and its command, and the conversion of published checkpoints by command."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from naive_published import class_weights
from PIL import Image
from safetensors.torch import load_file
from saved import tiny_pipeline
from test_cli import fail, succeed
from tiny_models import BETAS, DIT, VAE, randomised

from whenwhere.bench.survey import Extent, default_prompts, survey
from whenwhere.bench.variant import Variant
from whenwhere.metrics.smoothness import random_direction
from whenwhere.metrics.spectra import fusion_spectra
from whenwhere.models import SkipDiTTransformer2DModel

SMALL = Extent(steps=4, moments=(0.0, 0.5), pairs=2, grid=3, radius=0.05, iterations=3)
OPTIONS = ("--steps", 4, "--samples", 2, "--pairs", 1, "--grid", 2, "--iterations", 1)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")


def pipeline(skips: bool = True) -> DiTPipeline:
    settings = DIT | {"num_layers": 4}
    network = SkipDiTTransformer2DModel(**settings) if skips else DiTTransformer2DModel(**settings)
    scheduler = DDIMScheduler(**BETAS, clip_sample=False)
    pipe = DiTPipeline(transformer=randomised(network), vae=randomised(AutoencoderKL(**VAE)), scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@cache
def found() -> dict:
    return survey(pipeline(), ["3", "5"], SMALL, Variant.of("skipcache(interval=2, start_timestep=1000)"))


def test_a_survey_holds_every_diagnostic():
    assert set(found()) == {"surface", "change", "similarity", "jacobians", "fusions"}
    assert [row["step"] for row in found()["surface"]] == [row["step"] for row in found()["jacobians"]] == [0, 2]
    assert [len(row) for row in found()["change"]["relative"]] == [3] * 4  # blocks x steps - 1
    assert all(len(row["norms"]) == 4 for row in found()["jacobians"])
    json.dumps(found(), allow_nan=False)


def test_the_surface_is_one_where_nothing_is_perturbed():
    for row in found()["surface"]:
        assert row["first"][1][1] == pytest.approx(1, abs=1e-6)
        assert 0 < row["mean"] < row["worst"]
        assert len(row["means"]) == 2


def test_a_perturbed_network_runs_the_sampler_itself_from_the_same_noise():
    """One corner of the surface, by hand: move the weights, run the whole pipeline, look at the third prediction."""
    predictions: list[list[torch.Tensor]] = []
    generator = torch.Generator().manual_seed(0)
    pipe = pipeline()
    directions = [random_direction(pipe.transformer, generator) for _ in range(2)]
    for radius in (0.0, SMALL.radius):
        pipe, seen = pipeline(), []
        for name, parameter in pipe.transformer.named_parameters():
            parameter.data.add_(-radius * (directions[0][name] + directions[1][name]))
        pipe.transformer.register_forward_hook(lambda *call, seen=seen: seen.append(call[-1][0]))
        seeds = [torch.Generator().manual_seed(i) for i in range(2)]
        pipe(class_labels=[3, 5], num_inference_steps=4, guidance_scale=1.0, generator=seeds)
        predictions.append(seen)
    for row in found()["surface"]:
        plain, moved = (seen[row["step"]].flatten(1) for seen in predictions)
        expected = torch.nn.functional.cosine_similarity(plain, moved).mean()
        assert row["first"][0][0] == pytest.approx(float(expected), abs=1e-6)


def test_it_may_be_asked_once_on_what_the_plain_run_saw():
    asked = survey(pipeline(), ["3", "5"], replace(SMALL, rerun=False))["surface"]
    first, later = zip(found()["surface"], asked, strict=True)
    assert first[0]["means"] == pytest.approx(first[1]["means"], rel=1e-5)  # at step 0 the noise is all there is
    assert later[0]["mean"] > 1.01 * later[1]["mean"]  # behind it the paths have parted


def test_a_cache_leaves_the_plain_predictions_at_partial_steps_only():
    mean = found()["similarity"]["mean"]
    assert mean[0] == pytest.approx(1, abs=1e-9)
    assert mean[1] < 1 - 1e-6
    with pytest.warns(UserWarning, match="changed nothing"):
        same = survey(pipeline(), ["3"], SMALL, Variant.of("skipcache(interval=1)"))
    assert same["similarity"]["mean"] == pytest.approx([1] * 4, abs=1e-9)


def test_fusions_are_those_of_the_weights():
    expected = fusion_spectra(pipeline().transformer)
    assert [row["path"] for row in found()["fusions"]] == [row.path for row in expected]
    assert found()["fusions"][0]["skip"] == pytest.approx(expected[0].skip[:16].tolist())


def test_the_pipeline_is_left_as_it_was_and_the_survey_repeats():
    pipe = pipeline()
    before = {name: parameter.clone() for name, parameter in pipe.transformer.named_parameters()}
    one, two = survey(pipe, ["3"], SMALL), survey(pipe, ["3"], SMALL)
    assert one == two
    assert all(torch.equal(p, before[name]) for name, p in pipe.transformer.named_parameters())
    assert not pipe.transformer._forward_hooks


def test_networks_without_skips_have_no_fusions():
    pipe = pipeline(skips=False)
    result = survey(pipe, default_prompts(pipe, 2), Extent(steps=2, moments=(0.5,), pairs=1, grid=2, iterations=0))
    assert set(result) == {"surface", "change"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 1}, "steps must be at least 2"),
        ({"moments": (1.0,)}, r"shares of the run in \[0, 1\)"),
        ({"radius": 0.0}, "radius must be above 0"),
    ],
)
def test_an_extent_that_measures_nothing_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Extent(**settings)


# -- the commands ----------------------------------------------------------------------------------------------------


def test_a_saved_pipeline_is_surveyed():
    pipeline().save_pretrained("skip")
    data = json.loads(succeed("diagnose", "smoothness", "skip", *OPTIONS, "--png", "found.png", "--json"))
    assert set(data) == {"surface", "change", "jacobians", "fusions"}
    with Image.open("found.png") as image:
        assert image.width > 1000
    table = succeed("diagnose", "smoothness", "skip", *OPTIONS, "--method", "skipcache(2)")
    for line in ("1 - cos under perturbed weights, step 0: mean", "with SkipCache(interval=2)", "half for the skip"):
        assert line in table


def test_u_nets_are_surveyed_too():
    assert "Jacobian" in succeed("diagnose", "smoothness", tiny_pipeline(), *OPTIONS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere",), "no model 'nowhere'"),
        (("emoji-unet", "--radius", "-1"), "radius must be above 0, got -1.0"),
        (("emoji-unet", "--method", "skipcash"), "skipcash"),
        (("emoji-unet", "--png", "found.gif"), "must end in .png"),
    ],
)
def test_a_mistake_is_one_line(arguments, message):
    assert message in fail("diagnose", "smoothness", *arguments)


def test_a_published_file_is_converted():
    weights, file = class_weights(32, 4, 4, 10), "published.pt"
    torch.save({"ema": weights}, file)
    line = succeed("zoo", "convert", file, "-o", "converted", "--heads", 2)
    assert line.startswith("SkipDiTTransformer2DModel with 0.")
    model = SkipDiTTransformer2DModel.from_pretrained("converted")
    assert model.config.num_layers == 4
    stored = load_file("converted/diffusion_pytorch_model.safetensors")
    assert torch.equal(stored["proj_out_2.weight"], weights["final_layer.linear.weight"])
    data = json.loads(succeed("zoo", "convert", file, "-o", "again", "--heads", 2, "--json"))
    assert data["class"] == "SkipDiTTransformer2DModel"
    assert data["layers"] == 4
    assert "not an empty folder" in fail("zoo", "convert", file, "-o", "again", "--heads", 2)


def test_what_is_no_published_file_is_refused():
    assert "nothing.pt is no file" in fail("zoo", "convert", "nothing.pt", "-o", "converted")
    Path("broken.pt").write_bytes(b"no checkpoint")
    assert "damaged" in fail("zoo", "convert", "broken.pt", "-o", "converted")
    torch.save({"ema": {name: w for name, w in class_weights(32, 4, 4, 10).items() if "skip" not in name}}, "plain.pt")
    assert "there are no long skips" in fail("zoo", "convert", "plain.pt", "-o", "converted", "--heads", 2)

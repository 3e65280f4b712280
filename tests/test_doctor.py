"""`whenwhere doctor`: what fits, what it saves, what is in the way."""

import json
from types import SimpleNamespace

import pytest
import torch
from saved import make, tiny_pipeline
from tiny_models import dit
from torch import nn
from typer.testing import CliRunner

from whenwhere import DeepCache, plan
from whenwhere.bench.doctor import examine
from whenwhere.cli import app


@pytest.fixture(scope="module")
def unet():
    return examine(make(), steps=12, guidance=3.0)


def test_what_fits_saves_what_the_plan_says(unet):
    by_name = {treatment.method: treatment for treatment in unet.treatments}
    cached = by_name["DeepCache"]
    planned = plan(make(), DeepCache(), steps=12).cost
    assert cached.fits
    assert (cached.ratio, cached.bytes) == (planned.ratio, planned.bytes)
    assert cached.ratio_papers == planned.baseline.papers / planned.macs.papers
    assert [t.ratio for t in unet.treatments if t.fits] == sorted(t.ratio for t in unet.treatments if t.fits)[::-1]
    assert (unet.family, unet.denoiser, unet.evaluations) == ("UNet2DConditionModel", "UNet2DConditionModel", 12)
    assert unet.obstacles == []


def test_what_does_not_fit_says_why(unet):
    by_name = {treatment.method: treatment for treatment in unet.treatments}
    assert not by_name["DeltaDiT"].fits
    assert "DeepCache works on it" in by_name["DeltaDiT"].reason
    assert "needs a value for calibration" in by_name["BlockCaching"].reason
    assert "FewerSteps" not in by_name  # no method, but a baseline


def test_without_guidance_there_is_none_to_stop():
    found = {treatment.method: treatment for treatment in examine(make(), steps=12, guidance=1.0).treatments}
    assert not found["GuidanceStop"].fits or found["GuidanceStop"].ratio == 1
    assert found["DeepCache"].fits


def test_a_transformer_has_methods_of_its_own():
    found = {treatment.method: treatment for treatment in examine(dit(), steps=12, guidance=3.0).treatments}
    assert found["FORA"].fits
    assert found["FORA"].ratio > 1
    assert not found["DeepCache"].fits


def test_what_is_in_the_way_is_told():
    pipe = make()
    pipe.unet.conv_in._hf_hook = object()
    assert "attach methods first and turn offloading on afterwards" in " ".join(examine(pipe, 4, 3.0).obstacles)
    pipe = make()
    inside = pipe.unet
    pipe.unet = torch.compile(inside, backend="eager")
    assert "the denoiser is compiled" in " ".join(examine(pipe, 4, 3.0).obstacles)
    blind = SimpleNamespace(unet=make().unet, scheduler=object())
    assert "nobody tells which step it is" in " ".join(examine(blind, 4, 3.0).obstacles)
    cached = make()
    cached.unet.is_cache_enabled = True
    assert "Call disable_cache() first" in " ".join(examine(cached, 4, 3.0).obstacles)


def test_an_unknown_family_is_an_obstacle():
    found = examine(SimpleNamespace(unet=nn.Linear(2, 2), scheduler=make().scheduler), 4, 3.0)
    assert found.treatments == []
    assert "Linear" in found.obstacles[0]


def test_the_command_prints_and_speaks_json():
    result = CliRunner().invoke(app, ["doctor", str(tiny_pipeline()), "--steps", "12", "--guidance", "3"])
    assert result.exit_code == 0, result.output
    assert "DDIMScheduler, 12 evaluations with guidance" in result.stdout
    assert "DeepCache(interval=3)" in result.stdout
    assert "Does not fit: DeltaDiT" in result.stdout
    result = CliRunner().invoke(app, ["doctor", str(tiny_pipeline()), "--steps", "12", "--json"])
    assert json.loads(result.stdout)["evaluations"] == 12
    result = CliRunner().invoke(app, ["doctor", "emoji-nut"])
    assert result.exit_code == 2
    assert "did you mean 'emoji-unet'" in result.stderr

"""The zoo: names, files as the catalogue describes them, and a pipeline like any other."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from saved import make, make_pixart
from tiny_models import dit

from whenwhere import NAG, zoo
from whenwhere.bench import drawing
from whenwhere.bench.prompts import builtin_prompts
from whenwhere.models.patch_pca import PatchPCA
from whenwhere.zoo.load import assemble, check, digests, silence

NAMES = zoo.names()
STUDENTS = [name for name in NAMES if name.endswith("-lcm")]


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    return zoo.load("emoji-unet")


def draw(pipe: DiffusionPipeline, prompt: str, **settings) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    images = pipe(prompt, num_inference_steps=2, generator=generator, output_type="pt", **settings).images
    return images[0]


def test_names_are_sorted_and_known():
    assert zoo.names() == sorted(zoo.names())
    assert "emoji-unet" in zoo.names()


@pytest.mark.parametrize("name", NAMES)
def test_every_file_is_in_the_catalogue_with_its_hash(name):
    assert digests(zoo.path(name)) == dict(zoo.entry(name).files)


@pytest.mark.parametrize("name", NAMES)
def test_every_file_is_small_and_its_recipe_exists(name):
    assert all((zoo.path(name) / file).stat().st_size <= 16e6 for file in zoo.entry(name).files)
    assert (Path(__file__).parents[1] / zoo.entry(name).recipe).is_file()


@pytest.mark.parametrize("name", NAMES)
def test_no_configuration_says_from_where_a_part_was_loaded(name):
    for file in zoo.path(name).rglob("config.json"):
        assert "_name_or_path" not in json.loads(file.read_text(encoding="utf-8")), file


@pytest.mark.parametrize("function", [zoo.load, zoo.path, zoo.entry])
def test_an_unknown_name_is_answered_with_the_nearest(function):
    with pytest.raises(ValueError, match="no model 'emoji-net'; did you mean 'emoji-unet'"):
        function("emoji-net")


def test_a_changed_file_is_named_with_both_hashes(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "weights").write_bytes(b"weights")
    model = replace(zoo.entry("emoji-unet"), files=digests(folder))
    check(model, folder)
    (folder / "weights").write_bytes(b"other")
    with pytest.raises(RuntimeError, match=r"weights is damaged or was changed: expected SHA-256 \w{64}, found \w{64}"):
        check(model, folder)
    (folder / "weights").unlink()
    with pytest.raises(FileNotFoundError, match="weights is missing; reinstall"):
        check(model, folder)


def test_loading_gives_float32_in_the_slots_of_a_stock_pipeline(pipeline):
    assert type(pipeline) is StableDiffusionPipeline
    assert isinstance(pipeline.vae, PatchPCA)
    assert {pipeline.unet.dtype, pipeline.text_encoder.dtype, pipeline.vae.dtype} == {torch.float32}
    assert pipeline.tokenizer.model_max_length == pipeline.text_encoder.config.max_position_embeddings == 16
    assert pipeline.text_encoder.config.eos_token_id == pipeline.tokenizer.eos_token_id


@pytest.mark.parametrize("name", NAMES)
def test_it_loads_quietly_as_the_class_that_the_catalogue_names(name, capfd):
    loaded = zoo.load(name)
    assert capfd.readouterr() == ("", "")
    assert type(loaded) is getattr(diffusers, zoo.entry(name).pipeline)
    assert type(loaded).__name__ == json.loads((zoo.path(name) / "model_index.json").read_text())["_class_name"]


@pytest.mark.parametrize("name", NAMES)
def test_it_draws_its_built_in_prompts_repeatably(name):
    loaded, prompts = zoo.load(name), builtin_prompts(name)
    image = drawing.draw(loaded, prompts[:1], [0], 2, 3.0)
    assert image.shape == (1, 3, 32, 32)
    assert torch.equal(drawing.draw(loaded, prompts[:1], [0], 2, 3.0), image)
    assert not torch.equal(drawing.draw(loaded, prompts[1:2], [0], 2, 3.0), image)


@pytest.mark.parametrize("name", STUDENTS)
def test_students_draw_in_four_two_and_one_step_without_guidance(name):
    student, teacher = zoo.load(name), zoo.load(name.removesuffix("-lcm"))
    assert (zoo.entry(name).steps, zoo.entry(name).guidance) == (4, 1)
    prompts = ["red apple, noto style", "penguin, flat style"]
    aim = drawing.draw(teacher, prompts, [0, 1], 20, 3.0)
    for steps, timesteps in ((4, [999, 749, 499, 249]), (2, [999, 499]), (1, [999])):
        pictures = drawing.draw(student, prompts, [0, 1], steps, 1.0)  # refuses what is not finite
        assert student.scheduler.timesteps.tolist() == timesteps
    # From the same noise one step of the student comes nearer to where the guided teacher ends than one of its own.
    fewer = drawing.draw(teacher, prompts, [0, 1], 1, 3.0)
    assert (pictures - aim).square().mean() < (fewer - aim).square().mean()


@pytest.mark.parametrize("name", STUDENTS)
@pytest.mark.parametrize("steps", [4, 1])
def test_nag_changes_what_students_draw_and_leaves_nothing_behind(name, steps):
    student, prompts = zoo.load(name), ["apple, noto style"]
    plain = drawing.draw(student, prompts, [0], steps, 1.0)
    with drawing.attached(student, [NAG(scale=5, negative_prompt="red")], 1.0):
        guided = drawing.draw(student, prompts, [0], steps, 1.0)
    assert (guided - plain).abs().max() > 0.01
    assert torch.equal(drawing.draw(student, prompts, [0], steps, 1.0), plain)


@pytest.mark.parametrize(("make_one", "prompt"), [(make, "red"), (make_pixart, "red"), (dit, "3")])
def test_pipelines_of_any_class_are_assembled_from_their_index(make_one, prompt, tmp_path):
    saved = make_one()
    saved.set_progress_bar_config(disable=True)
    saved.save_pretrained(tmp_path)
    with silence():
        again = assemble(type(saved).__name__, tmp_path)
    again.set_progress_bar_config(disable=True)
    assert type(again) is type(saved)
    assert torch.equal(drawing.draw(again, [prompt], [0], 2, 3.0), drawing.draw(saved, [prompt], [0], 2, 3.0))


def test_pictures_are_32_pixels_wide_and_repeatable(pipeline):
    image = draw(pipeline, "red apple, noto style")
    assert image.shape == (3, 32, 32)
    assert torch.equal(draw(pipeline, "red apple, noto style"), image)


def test_the_prompt_and_the_negative_prompt_matter(pipeline):
    image = draw(pipeline, "red apple")
    assert not torch.equal(draw(pipeline, "blue bus"), image)
    assert not torch.equal(draw(pipeline, "red apple", negative_prompt="red"), image)


def test_the_stock_loader_reads_the_folder_and_a_saved_copy(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    for folder in (zoo.path("emoji-unet"), tmp_path):
        again = StableDiffusionPipeline.from_pretrained(folder)
        again.set_progress_bar_config(disable=True)
        assert torch.equal(draw(again, "fox"), draw(pipeline, "fox"))


def test_a_damaged_copy_is_refused(tmp_path):
    copy = shutil.copytree(zoo.path("emoji-unet"), tmp_path / "emoji-unet")
    with (copy / "unet" / "config.json").open("a") as file:
        file.write(" ")
    with pytest.raises(RuntimeError, match=r"unet.config\.json is damaged"):
        check(zoo.entry("emoji-unet"), copy)


@pytest.mark.parametrize("name", NAMES)
def test_the_scores_are_those_of_the_results_file(name):
    results = json.loads((Path(__file__).parents[1] / f"docs/results/{name}.json").read_text(encoding="utf-8"))
    aligned = {f"alignment, {kind}": found["drawn"] for kind, found in results["prompt alignment"].items()}
    distance = results["KID (EfficientNet-Lite0)"]["drawn against real"]["mean"]
    assert dict(zoo.entry(name).scores) == aligned | {"KID (EfficientNet-Lite0)": distance}

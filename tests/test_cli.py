"""The command line: what it prints, what it writes, and how it fails."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from saved import tiny_pipeline
from typer.testing import CliRunner

from whenwhere import Plan
from whenwhere.cli import app


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")


def picture(path: str | Path) -> Image.Image:
    with Image.open(path) as opened:
        return opened.copy()


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def succeed(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def fail(*arguments: object) -> str:
    """One line on stderr, exit code 2, nothing on stdout, nothing written."""
    before = sorted(Path().iterdir())
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert sorted(Path().iterdir()) == before
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    return lines[0]


# -- plan


def test_a_plan_is_printed_exactly():
    assert (
        succeed("plan", "sd15", "--method", "tgate(3, sp_interval=2, warm_up=0)", "--steps", 6)
        == """\
sd15, TGate(gate_step=3, sp_interval=2, warm_up=0), 6 evaluations

model                ###///
self-attention x16   #.####
cross-attention x16  ###...

# computed   . reused   / one guidance branch
3.393 T of 4.82 T MACs (1.42x fewer), 2.954 T of 4.063 T in the papers' convention (without QK^T and AV)
66.09 MiB remembered at most
"""
    )


def test_a_site_that_is_not_reached_is_a_blank():
    assert (
        succeed("plan", "sd15", "--method", "deepcache(interval=3)", "--steps", 6)
        == """\
sd15, DeepCache(interval=3), 6 evaluations

model                                                 ######
down_blocks.0 ... up_blocks.2                         #..#..
up_blocks.3                                           ######
down_blocks.0.resnets.0 ... up_blocks.2.upsamplers.0  #  #  \n\
up_blocks.3.resnets.0 ... up_blocks.3.attentions.1    #..#..
up_blocks.3.resnets.2 ... up_blocks.3.attentions.2    ######

# computed   . reused
1.86 T of 4.82 T MACs (2.59x fewer), 1.52 T of 4.063 T in the papers' convention (without QK^T and AV)
5.00 MiB remembered at most
"""
    )


def test_a_plain_plan_needs_no_method():
    assert (
        succeed("plan", "pixart-alpha-1024", "--steps", 4, "--no-guidance", "--images", 2)
        == """\
pixart-alpha-1024, plain, 4 evaluations

model  ####

# computed
26.04 T of 26.04 T MACs (1.00x fewer), 17.13 T of 17.13 T in the papers' convention (without QK^T and AV)
0.00 MiB remembered at most
"""
    )


def test_the_steps_of_a_plan_are_by_default_those_of_the_architecture():
    assert succeed("plan", "dit-xl-2-256").startswith("dit-xl-2-256, plain, 50 evaluations\n")


def test_fewer_steps_are_a_plan_too():
    assert "plain, 9 evaluations" in succeed("plan", "sd15", "--method", "fewersteps(9)").replace(
        "FewerSteps(steps=9)", "plain"
    )


def test_a_plan_is_json_that_loads(tmp_path):
    printed = succeed("plan", "sd15", "--method", "tgate(gate_step=3)", "--steps", 6, "--save", "plan.json", "--json")
    assert printed == Path("plan.json").read_text()
    assert json.loads(printed)["model"] == "UNet2DConditionModel"
    assert Plan.load(tmp_path / "plan.json").row("") == "###///"


def test_a_plan_is_drawn():
    succeed("plan", "sd15", "--method", "tgate(gate_step=3)", "--steps", 6, "--png", "plan.png")
    assert picture("plan.png").width == 1440
    assert sorted(Path().iterdir()) == [Path("plan.png")]


def test_a_saved_pipeline_is_planned_with_its_own_scheduler(tmp_path):
    folder = tmp_path / "heun"
    shutil.copytree(tiny_pipeline(), folder)
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace("DDIMScheduler", "HeunDiscreteScheduler"))
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("DDIMScheduler", "HeunDiscreteScheduler"))
    assert "7 evaluations" in succeed("plan", folder, "--method", "tgate(gate_step=2)", "--steps", 4)


# -- generate


def test_a_prompt_becomes_a_picture():
    assert succeed("generate", "Red apple, noto!", "--model", tiny_pipeline(), "--steps", 2) == "red-apple-noto-0.png\n"
    assert picture("red-apple-noto-0.png").size == (16, 16)


@pytest.mark.parametrize("command", ["generate", "compare"])
def test_a_model_in_the_place_of_a_prompt_is_noticed(command):
    printed = fail(command, "emoji-pixart", "red apple")
    assert "give models by --model emoji-pixart" in printed


def test_prompts_and_seeds_become_pictures_in_a_folder():
    printed = succeed(
        "generate", "red", "blue", "--model", tiny_pipeline(), "--steps", 2, "--batch", 2, "--seed", 3, "--scale", 4,
        "--out", "new/folder",
    )  # fmt: skip
    names = ["red-3.png", "red-4.png", "blue-3.png", "blue-4.png"]
    assert printed.splitlines() == [str(Path("new/folder") / name) for name in names]
    pictures = [picture(file) for file in printed.splitlines()]
    assert {drawn.size for drawn in pictures} == {(64, 64)}
    assert len({drawn.tobytes() for drawn in pictures}) == 4


def test_a_seed_gives_the_same_picture_and_a_method_changes_it():
    common = ["generate", "red", "--model", tiny_pipeline(), "--steps", 4, "--seed", 1, "--out"]
    succeed(*common, "a.png")
    succeed(*common, "b.png")
    succeed(*common, "c.png", "--method", "deepcache(interval=2)", "--negative", "blue", "--scheduler", "euler")
    a, b, c = (Path(f"{name}.png").read_bytes() for name in "abc")
    assert a == b != c


def test_a_negative_text_reaches_attention_without_guidance_as_one_written_in_the_method_does():
    common = ["generate", "red", "--model", tiny_pipeline(), "--steps", 2, "--guidance", 1, "--out"]
    succeed(*common, "plain.png", "--negative", "blue")
    succeed(*common, "option.png", "--negative", "blue", "--method", "nag(scale=9, alpha=1.0)")
    succeed(*common, "written.png", "--method", "nag(scale=9, alpha=1.0, negative_prompt=blue)")
    plain, option, written = (Path(f"{name}.png").read_bytes() for name in ("plain", "option", "written"))
    assert plain != option == written


def test_nag_without_a_negative_text_says_what_is_missing():
    arguments = ["generate", "red", "--model", tiny_pipeline(), "--steps", 2, "--guidance", 1, "--method", "nag"]
    assert "has no negative text" in fail(*arguments)


@pytest.mark.parametrize("method", ["nasa(phi=0.5)", "vsf(scale=2)"])
def test_the_siblings_of_nag_take_the_negative_text_too(method):
    common = ["generate", "red", "--model", tiny_pipeline(), "--steps", 2, "--guidance", 1, "--negative", "blue"]
    assert succeed(*common, "--method", method) == "red-0.png\n"


def test_a_grid_is_one_picture_and_json_is_pure():
    printed = succeed(
        "generate", "red", "blue", "--model", tiny_pipeline(), "--steps", 2, "--batch", 3, "--grid",
        "--out", "sheet.png", "--json",
    )  # fmt: skip
    found = json.loads(printed)
    assert found["pictures"][4] == {"prompt": "blue", "seed": 1, "file": "sheet.png"}
    assert picture("sheet.png").width > 600


# -- compare


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """The JSON of a comparison, and its picture."""
    file = tmp_path_factory.mktemp("compared") / "compared.png"
    common = ("--model", tiny_pipeline(), "--steps", 6, "--guidance", 3, "--seeds", 2)
    printed = succeed("compare", "red", *common, "--method", "tgate(gate_step=3)", "--out", file, "--json")
    return json.loads(printed), file


def test_a_comparison_holds_method_and_baselines(compared):
    found, _ = compared
    plain, method, *others = found["variants"]
    assert (plain["label"], method["label"]) == ("plain", "TGate(gate_step=3)")
    assert method["baselines"] == [other["label"] for other in others]
    assert method["baselines"][0].startswith("FewerSteps")
    assert method["baselines"][1] == "GuidanceStop(step=3)"
    assert plain["speed_up"] == 1
    assert method["counted"] == method["macs"] < plain["macs"]
    assert method["held"] == method["bytes"] > 0
    assert len(found["rows"]) == 8
    assert found["environment"]["torch"]


def test_a_comparison_is_a_picture(compared):
    _, file = compared
    assert picture(file).width > 800
    assert [found.name for found in file.parent.iterdir()] == ["compared.png"]


def test_a_comparison_is_a_table():
    printed = succeed(
        "compare", "red", "blue", "--model", tiny_pipeline(), "--steps", 4, "--guidance", 1, "--seeds", 1, "--runs", 2,
        "--method", "deepcache(interval=2)", "--scheduler", "dpm++", "--size", "24x16",
    )  # fmt: skip
    for text in (
        "DPMSolverMultistep",
        "speed-up",
        "papers' MACs",
        "plain",
        "DeepCache(interval=2)",
        "FewerSteps(",
        "dB",
    ):
        assert text in printed
    assert "GuidanceStop" not in printed
    assert "4 interleaved runs each" in printed
    assert printed.splitlines()[-1] == "compare.png"


def test_a_negative_text_alone_compares_guidance_with_guidance_inside_attention():
    found = json.loads(
        succeed(
            "compare", "red", "--negative", "blue", "--model", tiny_pipeline(), "--steps", 5, "--guidance", 3,
            "--seeds", 1, "--json",
        )
    )  # fmt: skip
    labels = [variant["label"] for variant in found["variants"]]
    asked = ["CFG(negative_prompt='blue')", "NAG(negative_prompt='blue')"]
    assert labels[:3] == ["plain", *asked]
    assert labels[3] == "TGate(gate_step=0.4)+NAG(negative_prompt='blue')"
    plain, cfg, nag, gated = found["variants"][:4]
    assert cfg["macs"] == plain["macs"]
    assert gated["macs"] < plain["macs"] < nag["macs"]
    assert cfg["psnr"] != "inf"


# -- zoo, help


def test_the_zoo_is_listed_and_shown():
    names = [entry["name"] for entry in json.loads(succeed("zoo", "list", "--json"))]
    assert "emoji-unet" in names
    assert "emoji-unet" in succeed("zoo", "list")
    assert json.loads(succeed("zoo", "show", "emoji-unet", "--json"))["recipe"] == "recipes/emoji_unet.py"
    assert "recipe: recipes/emoji_unet.py" in succeed("zoo", "show", "emoji-unet")
    folder = json.loads(succeed("zoo", "path", "emoji-unet", "--json"))["path"]
    assert succeed("zoo", "path", "emoji-unet") == f"{folder}\n"
    assert "did you mean 'emoji-unet'" in fail("zoo", "show", "emoji-nut")


@pytest.mark.parametrize("command", ["plan", "generate", "compare", "bench", "report", "doctor"])
def test_help_teaches_by_examples(command):
    assert f"whenwhere {command} " in succeed(command, "--help").split("Examples")[1]


def test_help_comes_without_the_heavy_libraries():
    code = (
        "import sys; from whenwhere.cli import app; from typer.testing import CliRunner;"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0;"
        "assert not {'diffusers', 'transformers', 'PIL', 'torchmetrics'} & set(sys.modules), 'imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_package_is_a_program():
    found = subprocess.run([sys.executable, "-m", "whenwhere", "zoo", "--help"], capture_output=True, text=True)
    assert found.returncode == 0
    assert "whenwhere" in found.stdout


# -- failing


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "sdlx"], "did you mean 'sdxl'"),
        (["plan", "./nowhere"], "no model './nowhere'"),
        (["plan", "sd15", "--method", "tgat(3)"], "did you mean 'TGate'"),
        (["plan", "sd15", "--method", "tgate(gate=3)"], "did you mean 'gate_step'"),
        (["plan", "sd15", "--method", "tgate(gate_step=0)"], "gate_step must be at least 1, got 0"),
        (["plan", "sd15", "--method", "deepcache(interval=-1)"], "interval must be at least 1, got -1"),
        (["plan", "sd15", "--method", "deepcache(interval=2.5)"], "interval must be a whole number, got 2.5"),
        (["plan", "sd15", "--method", "tgate(gate_step=9)", "--steps", 6], "only 6 steps are executed"),
        (["plan", "dit-xl-2-256", "--method", "tgate(3)", "--png", "p.png"], "GuidanceStop works on this model"),
        (["plan", "sd15", "--png", "plan.jpg"], "must end in .png"),
        (["plan", "sd15", "--save", "nowhere/plan.json"], "the folder nowhere does not exist"),
        (["generate", "red", "--model", "emoji-nut", "--out", "new/folder"], "did you mean 'emoji-unet'"),
        (["generate", "red", "--model", "sd15"], "no model 'sd15'"),
        (["generate", "red", "--size", "wide"], "width x height"),
        (["generate", "red", "blue", "--out", "one.png"], "one file for 2 pictures"),
        (["generate", "red", "red!"], "same file name"),
        (["generate", "red", "--out", "picture.gif"], "must end in .png"),
        (["compare", "red", "--method", "deepcash"], "did you mean 'DeepCache'"),
        (["compare", "red", "--out", "nowhere/c.png"], "the folder nowhere does not exist"),
        (["zoo", "path", "nothing"], "the zoo has no model 'nothing'"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(arguments, message):
    assert message in fail(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "red", "--method", "tgate(gate_step=9)", "--steps", 4], "only 4 steps are executed"),
        (["compare", " "], "none that is empty"),
        (["generate", "red", "--scheduler", "eulr"], "did you mean 'euler'"),
        (["generate", "red", "--dtype", "float8"], "dtype must be"),
        (["generate", "red", "--size", "17x16", "--steps", 1], "divisible by"),
    ],
)
def test_a_mistake_about_a_model_is_found_before_anything_is_written(arguments, message):
    assert message in fail(*arguments, "--model", tiny_pipeline())


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("model_index.json", None, "there is no model_index.json"),
        ("model_index.json", "{", "cannot be loaded"),
        ("unet/config.json", "not JSON", "cannot be loaded"),
        ("unet/diffusion_pytorch_model.safetensors", "garbage", "cannot be loaded"),
        ("unet/diffusion_pytorch_model.safetensors", None, "cannot be loaded"),
    ],
)
def test_a_broken_directory_is_one_line(tmp_path_factory, file, content, message):
    folder = tmp_path_factory.mktemp("broken") / "pipeline"
    shutil.copytree(tiny_pipeline(), folder)
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(content)
    assert message in fail("generate", "red", "--model", folder)


def test_without_an_extra_its_name_is_told_before_anything_runs(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.functional.image", None)
    assert "pip install 'whenwhere[metrics]'" in fail("compare", "red", "--model", "nowhere")


@pytest.mark.filterwarnings("default")
def test_a_method_that_changes_nothing_is_a_warning_in_one_line():
    result = run("generate", "red", "--model", tiny_pipeline(), "--steps", 2, "--method", "deepcache(interval=1)")
    assert result.exit_code == 0
    assert "warning: DeepCache" in result.stderr
    assert "changed nothing in 2 steps" in result.stderr


def test_a_traceback_is_there_for_those_who_ask(monkeypatch):
    monkeypatch.setenv("WHENWHERE_TRACEBACK", "1")
    assert isinstance(run("plan", "sdlx").exception, ValueError)

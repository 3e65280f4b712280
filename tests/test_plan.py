"""Plans and traces: drawn, priced, saved, and made beforehand."""

import html
import json

import pytest
from fakes import TOWER, Every, doubling_pipeline
from pipelines import build, run

from whenwhere import DeepCache, GuidanceStop, Plan, TGate, attach, plan
from whenwhere.site import Kind


def traced(*methods, inputs=(1.0, 2.0, 3.0, 4.0), blocks=2):
    pipe = doubling_pipeline(blocks=blocks)
    with attach(pipe, *methods, anatomy=TOWER) as attachment:
        pipe(list(inputs))
        return attachment.plan, attachment.trace


def test_a_plan_is_drawn_as_a_table_of_characters():
    """Two blocks of one multiply-add each; full steps 0 and 3; each block remembers one number of four bytes."""
    planned, done = traced(Every(3))
    assert str(planned) == (
        "model     ####\n"
        "block x2  #..#\n"
        "\n"
        "# computed   . reused\n"
        "4 of 8 MACs (2.00x fewer), 4 of 8 in the papers' convention (without QK^T and AV)\n"
        "0.00 MiB remembered at most"
    )
    assert str(done) == str(planned) + ", 0.00 MiB measured"
    assert (planned.cost.bytes, planned.held, done.held) == (8, None, 8)


def test_runs_of_sites_that_are_treated_alike_are_drawn_as_one_line():
    drawn = plan(build("sd"), TGate(gate_step=4, sp_interval=3, warm_up=1), steps=8)
    assert str(drawn).splitlines()[:3] == [
        "model               ####////",
        "self-attention x4   ##.#####",
        "cross-attention x4  ####....",
    ]


def test_sites_that_are_not_reached_are_blank():
    drawn = plan(build("sd"), TGate(gate_step=6, sp_interval=1), DeepCache(interval=3), steps=6)
    assert drawn.row("mid_block") == "#..#.."
    assert drawn.row("mid_block.attentions.0.transformer_blocks.0.attn2") == "#  #  "


def test_a_row_is_found_by_its_path():
    _, done = traced(Every(3))
    assert done.row("blocks.1") == "#..#"
    assert done.row("", Kind.MODEL) == "####"
    with pytest.raises(KeyError, match=r"'blocks\.2' is no site of this trace"):
        done.row("blocks.2")


@pytest.mark.parametrize("which", [0, 1])
def test_a_saved_table_comes_back(tmp_path, which):
    table = traced(Every(3))[which]
    table.save(tmp_path / "table.json")
    assert Plan.load(tmp_path / "table.json") == table


def _with(**changes):
    def change(data):
        return data | changes

    return change


@pytest.mark.parametrize(
    "change",
    [
        _with(whenwhere=0),
        _with(rows=["####"]),
        _with(rows=["####", "#..", "#..#"]),
        _with(sites=[{}]),
        _with(surprise=1),
        lambda data: {name: value for name, value in data.items() if name != "whenwhere"},
        lambda data: [data],
        lambda data: "plan",  # noqa: ARG005
    ],
)
def test_what_is_no_saved_table_is_refused(tmp_path, change):
    path = tmp_path / "table.json"
    traced(Every(3))[0].save(path)
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(ValueError, match=r"table.json is no saved plan or trace"):
        Plan.load(path)


def test_a_file_that_is_no_json_is_refused(tmp_path):
    (tmp_path / "table.json").write_text("a table")
    with pytest.raises(ValueError, match="is no saved plan or trace"):
        Plan.load(tmp_path / "table.json")


# -- beforehand --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, -1, 2.0, "many"])
def test_a_number_of_steps_that_makes_no_sense_is_refused(steps):
    with pytest.raises(ValueError, match="steps must be a whole number of at least 1"):
        plan("sd15", DeepCache(), steps=steps)


def test_a_plan_without_methods_is_the_plain_run():
    drawn = plan("dit-xl-2-256", steps=3)
    assert drawn.rows == ("###",)
    assert drawn.cost.macs == drawn.cost.baseline
    assert (drawn.cost.ratio, drawn.cost.bytes) == (1.0, 0)


def test_a_plan_without_guidance_has_half_the_cost():
    guided, single = (plan("sd15", DeepCache(), steps=5, guidance=guidance) for guidance in (True, False))
    assert guided.cost.macs.all == 2 * single.cost.macs.all
    assert guided.cost.bytes == 2 * single.cost.bytes


def test_images_cost_in_proportion():
    one, three = (plan("sd15", DeepCache(), steps=5, images=images).cost for images in (1, 3))
    assert (three.macs.all, three.bytes) == (3 * one.macs.all, 3 * one.bytes)


def test_a_plan_asks_what_attaching_asks():
    with pytest.raises(ValueError, match="TGate works on"):
        plan("dit-xl-2-256", DeepCache(), steps=5)
    with pytest.raises(ValueError, match="averages two guidance branches"):
        plan(build("sd-pix2pix"), TGate(gate_step=2), steps=5)


def test_a_model_without_an_example_says_what_to_do_instead():
    with pytest.raises(ValueError, match="no example input is known for Tower; run the pipeline once"):
        plan(doubling_pipeline(blocks=1), Every(), steps=2, anatomy=TOWER)


def test_timesteps_of_another_number_of_steps_are_refused():
    scheduler = build("sd").scheduler
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="has 4 timesteps set, the plan is for 5 steps"):
        plan("sd15", GuidanceStop(2), steps=5, scheduler=scheduler)


def test_a_plan_made_while_a_pipeline_is_attached_is_the_same():
    pipe = build("sd")
    expected = plan(pipe, DeepCache(), steps=6)
    with attach(pipe, DeepCache()):
        run("sd", pipe)
        assert plan(pipe, DeepCache(), steps=6) == expected


# -- what a plan says in few words -----------------------------------------------------------------------------------


def test_a_plan_is_short_in_a_list_and_a_table_in_a_notebook():
    table = plan("sd15", TGate(2, sp_interval=1), steps=4)
    assert len(repr(table)) < 300
    assert repr(table).startswith("<plan of TGate(gate_step=2")
    assert table._repr_html_() == f"<pre>{html.escape(str(table))}</pre>"


def test_a_plan_of_a_method_with_nothing_to_do_says_so():
    told = f"{GuidanceStop(2)} changes nothing here: "
    assert told in str(plan("sd15", GuidanceStop(2), steps=4, guidance=False))
    assert told not in str(plan("sd15", GuidanceStop(2), steps=4))


@pytest.mark.parametrize("images", [0, -3])
def test_a_plan_is_of_one_image_at_least(images):
    with pytest.raises(ValueError, match=f"images must be at least 1, got {images}"):
        plan("sd15", steps=4, images=images)

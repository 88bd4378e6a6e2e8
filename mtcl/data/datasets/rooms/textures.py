"""Surface patterns of the rooms: small tiles of integer-hash noise, with their mip levels, computed once."""

from collections.abc import Iterator
from enum import IntEnum, auto
from functools import cache

import numpy as np

SIDE_BITS = 7  # a tile is 128 x 128 texels at its finest level ...
SIDE = 1 << SIDE_BITS
LEVELS = 6  # ... and 4 x 4 at its coarsest


class Pattern(IntEnum):
    """Kinds of tiles; their values 0..1 mix a surface's two colours."""

    PLAIN = 0
    PLANKS = auto()
    PLANKS_ACROSS = auto()
    TILES = auto()
    CHECKER = auto()
    STRIPES = auto()
    STRIPES_ACROSS = auto()
    BRICK = auto()
    DIAMONDS = auto()
    GRAIN = auto()
    WEAVE = auto()
    BOOKS = auto()
    LANDSCAPE = auto()


def hash_noise(x: np.ndarray, y: np.ndarray, salt: int) -> np.ndarray:
    """Hash integer coordinates: float32 in [0, 1), shape of ``x`` and ``y`` broadcast."""
    h = x.astype(np.uint32) * np.uint32(0x9E3779B1) + y.astype(np.uint32) * np.uint32(0x85EBCA77) + np.uint32(salt)
    for shift, factor in ((15, 0x2C1B3C6D), (12, 0x297A2D39)):
        h = (h ^ (h >> np.uint32(shift))) * np.uint32(factor)
    h ^= h >> np.uint32(15)
    return (h >> np.uint32(8)).astype(np.float32) / np.float32(1 << 24)


def value_noise(row: np.ndarray, column: np.ndarray, rows: int, columns: int, salt: int) -> np.ndarray:
    """Return smooth periodic noise in [0, 1) with ``rows`` x ``columns`` cells (powers of two) over one tile."""
    y, x = row * np.float32(rows / SIDE), column * np.float32(columns / SIDE)
    y0, x0 = np.floor(y), np.floor(x)
    fy, fx = y - y0, x - x0
    fy, fx = fy * fy * (3 - 2 * fy), fx * fx * (3 - 2 * fx)
    row0, column0 = y0.astype(np.int32), x0.astype(np.int32)
    row1, column1 = (row0 + 1) % rows, (column0 + 1) % columns
    above = hash_noise(row0, column0, salt) * (1 - fx) + hash_noise(row0, column1, salt) * fx
    below = hash_noise(row1, column0, salt) * (1 - fx) + hash_noise(row1, column1, salt) * fx
    return above * (1 - fy) + below * fy


def _tiles(row: np.ndarray, column: np.ndarray) -> Iterator[tuple[Pattern, np.ndarray]]:
    """Yield every pattern on the (128, 1) and (1, 128) float32 coordinates of a tile; row 0 is at the bottom."""
    r, c = row.astype(np.int32), column.astype(np.int32)

    fine = value_noise(row, column, 32, 32, 1)
    cloud = 0.6 * value_noise(row, column, 4, 4, 2) + 0.25 * value_noise(row, column, 8, 8, 3) + 0.15 * fine
    grain = 0.6 * value_noise(row, column, 32, 4, 4) + 0.4 * value_noise(row, column, 64, 8, 5)
    yield Pattern.PLAIN, 0.7 * cloud + 0.3 * fine
    yield Pattern.GRAIN, grain

    plank = r // 16
    along = (c + (hash_noise(plank, plank, 6) * SIDE).astype(np.int32)) % SIDE
    seam = (r % 16 == 0) | (along % 64 == 0)
    planks = np.where(seam, np.float32(1), 0.5 * hash_noise(plank, along // 64, 7) + 0.3 * grain)
    yield Pattern.PLANKS, planks
    yield Pattern.PLANKS_ACROSS, planks.T

    grout = (r % 32 < 2) | (c % 32 < 2)
    yield Pattern.TILES, np.where(grout, np.float32(1), 0.3 * hash_noise(r // 32, c // 32, 8) + 0.2 * cloud)
    yield Pattern.CHECKER, 0.8 * ((r // 32 + c // 32) % 2) + 0.2 * cloud

    stripes = np.where(c % 16 < 6, np.float32(0.85), np.where(c % 16 == 10, np.float32(0.5), np.float32(0)))
    stripes = stripes + 0.15 * cloud
    yield Pattern.STRIPES, stripes
    yield Pattern.STRIPES_ACROSS, stripes.T

    course = r // 16
    shifted = (c + 16 * (course % 2)) % SIDE
    mortar = (r % 16 < 2) | (shifted % 32 < 2)
    yield Pattern.BRICK, np.where(mortar, np.float32(1), 0.5 * hash_noise(course, shifted // 32, 9) + 0.15 * fine)

    cell = (c + 16 * (r // 32 % 2)) % 32
    diamond = np.abs(r % 32 - 16) + np.abs(cell - 16) < 8
    yield Pattern.DIAMONDS, np.where(diamond, np.float32(0.9), 0.2 * cloud)
    yield Pattern.WEAVE, 0.4 * ((r // 4 + c // 4) % 2) + 0.6 * fine

    book = (c + (hash_noise(c // 8, r // 32, 10) * 3).astype(np.int32)) // 6
    height = 18 + (hash_noise(book, r // 32, 11) * 10).astype(np.int32)
    shelf = (r % 32 < 3) | (r % 32 > height)
    yield Pattern.BOOKS, np.where(shelf, np.float32(1), 0.9 * hash_noise(book, r // 32, 12))

    hills = 34 + 40 * value_noise(0 * row, column, 4, 4, 13) + 12 * value_noise(0 * row, column, 16, 16, 14)
    yield Pattern.LANDSCAPE, np.where(row < hills, 0.7 + 0.3 * cloud, 0.35 * cloud)


@cache
def atlas() -> tuple[np.ndarray, np.ndarray]:
    """Return all tiles at all levels in one flat float32 array, and where in it each level starts (int32).

    Texel (pattern p, row y, column x) of level l, whose tiles have the side s = 128 >> l, is at
    ``starts[l] + (p * s + y) * s + x``.
    """
    grid = np.arange(SIDE, dtype=np.float32)
    tiles = dict(_tiles(grid[:, None], grid[None, :]))
    level = np.stack([np.broadcast_to(tiles[p], (SIDE, SIDE)) for p in Pattern]).astype(np.float32)
    levels = [level]
    for _ in range(LEVELS - 1):
        level = 0.25 * (level[:, ::2, ::2] + level[:, 1::2, ::2] + level[:, ::2, 1::2] + level[:, 1::2, 1::2])
        levels.append(level)
    starts = np.cumsum([0] + [one.size for one in levels[:-1]])
    return np.concatenate([one.ravel() for one in levels]), starts.astype(np.int32)

"""Thinning of many binary maps at once: every bit of a 64-bit word is the pixel of another map."""

import numpy as np

WORD = 64  # maps to a word
_CHUNK = 8192  # pixels worked on together, so that the intermediate arrays stay in the cache


def thin_masks(masks: np.ndarray) -> np.ndarray:
    """Thin each map of bool (K, H, W) until nothing changes, as MATLAB's ``bwmorph(mask, 'thin', inf)``.

    Equal to ``skimage.morphology.thin`` pixel by pixel; see :func:`thin_bitmaps` for the rule.
    """
    masks = np.asarray(masks, dtype=bool)
    out = np.zeros_like(masks)
    for start in range(0, len(masks), WORD):
        bits = np.uint64(1) << np.arange(min(WORD, len(masks) - start), dtype=np.uint64)
        block = masks[start : start + WORD]
        rows, columns = np.nonzero(block.any(0))
        bitmaps = np.where(block[:, rows, columns], bits[:, None], np.uint64(0)).sum(0, dtype=np.uint64)
        bitmaps = thin_bitmaps(rows, columns, bitmaps, masks.shape[1:])
        out[start : start + WORD, rows, columns] = bitmaps & bits[:, None] != 0
    return out


def thin_bitmaps(rows: np.ndarray, columns: np.ndarray, bitmaps: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Thin 64 maps of (H, W) at once.

    A map's pixel is deleted if Lam, Lee and Suen's conditions G1, G2 and G3 hold for its eight neighbours, in the
    second half of each round G3' (the documentation of MATLAB's bwmorph, after Guo and Hall 1989). Each half checks
    again only pixels near a deletion of one of the two halves before it: for the others nothing has changed.

    Args:
        rows: of the N pixels that are set in any of the maps.
        columns: of these pixels.
        bitmaps: uint64 (N,), the maps in which each pixel is set.
        shape: (H, W).

    Returns:
        The bitmaps after thinning.
    """
    stride = shape[1] + 2
    image = np.zeros((shape[0] + 2) * stride, np.uint64)
    index = (rows + 1) * stride + columns + 1
    image[index] = bitmaps
    mark = np.zeros(image.size, bool)
    # east, then counter-clockwise
    offsets = np.array([1, 1 - stride, -stride, -1 - stride, -1, stride - 1, stride, stride + 1])
    history: list[np.ndarray] = []  # the pixels that each half changed
    while len(history) < 2 or history[-1].size or history[-2].size:
        active = index
        if len(history) > 1:
            mark[:] = False
            for offset in offsets:
                mark[np.concatenate(history[-2:]) + offset] = True
            active = index[mark[index] & (image[index] != 0)]
        changed, bits = _deletable(image, active, offsets, len(history) % 2)
        image[changed] ^= bits
        history.append(changed)
    return image[index]


def _deletable(image: np.ndarray, active: np.ndarray, offsets: np.ndarray, half: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the ``active`` pixels that lose bits, and which bits."""
    pixels, bitmaps = [active[:0]], [image[:0]]
    for start in range(0, active.size, _CHUNK):
        chunk = active[start : start + _CHUNK]
        bits = image[chunk] & _condition([image[chunk + offset] for offset in offsets], half)
        losing = np.flatnonzero(bits)
        pixels.append(chunk[losing])
        bitmaps.append(bits[losing])
    return np.concatenate(pixels), np.concatenate(bitmaps)


def _condition(x: list[np.ndarray], half: int) -> np.ndarray:
    """Compute G1 & G2 & G3 (half 0) or G3' (half 1) for the neighbours x1..x8, each a bit per map."""
    x1, x2, x3, x4, x5, x6, x7, x8 = x
    p1, p2, p3, p4 = x1 | x2, x3 | x4, x5 | x6, x7 | x8
    q1, q2, q3, q4 = x2 | x3, x4 | x5, x6 | x7, x8 | x1
    b1, b2, b3, b4 = q1 & ~x1, q2 & ~x3, q3 & ~x5, q4 & ~x7
    one = (b1 ^ b2 ^ b3 ^ b4) & ~((b1 & b2) | (b3 & b4))  # G1: exactly one crossing
    two_p, two_q = _two(p1, p2, p3, p4), _two(q1, q2, q3, q4)
    four = p1 & p2 & p3 & p4 & q1 & q2 & q3 & q4
    keep = x5 & (q3 | ~x4) if half else x1 & (q1 | ~x8)
    return one & two_p & two_q & ~(four | keep)  # G2: 2 <= min(sum p, sum q) <= 3


def _two(a: np.ndarray, b: np.ndarray, c: np.ndarray, d: np.ndarray) -> np.ndarray:
    """Compute the bits that are set in at least two of four."""
    return (a & b) | (c & d) | ((a | b) & (c | d))

"""Draw the data set of `make demo`: ten kinds of shapes, 32x32, in seconds, without a download.

    python tools/make_shapes.py data/shapes.npz

What tells these images apart must be the shape. MoCo separates *instances*, by whatever its
augmentation leaves: with free colours or textured backgrounds it learns those, and no shapes. So
every image is one light shape on a dark ground, both gray and of a random brightness that color
jitter hides; place, size and rotation are random, so that pixel by pixel a class is not to be seen.
"""

import argparse
import io
import os
from pathlib import Path

import numpy as np

SIZE = 32  # pixels


def disc(x, y, radius=0.9):
    return np.hypot(x, y) - radius


def polygon(*corners):
    """Signed distance, negative inside: nearest edge, and how often a ray crosses"""

    def distance(x, y):
        nearest, inside = np.full_like(x, np.inf), np.zeros(x.shape, bool)
        for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1]):
            ex, ey, wx, wy = bx - ax, by - ay, x - ax, y - ay
            along = np.clip((wx * ex + wy * ey) / (ex**2 + ey**2), 0, 1)
            nearest = np.minimum(nearest, np.hypot(wx - along * ex, wy - along * ey))
            inside ^= ((ay > y) != (by > y)) & ((ex * wy < ey * wx) == (by < ay))
        return np.where(inside, -nearest, nearest)

    return distance


def corners(n, radii, turn=0.0):
    """n corners around the centre, their distances from it taken from radii in turn"""
    angles = 2 * np.pi * np.arange(n) / n + turn
    return [
        (radii[i % len(radii)] * np.cos(a), radii[i % len(radii)] * np.sin(a))
        for i, a in enumerate(angles)
    ]


square = polygon(*corners(4, [1.1], np.pi / 4))
ARM = 0.3  # half the width of the cross
CROSS = [(ARM, 1), (ARM, ARM), (1, ARM), (1, -ARM), (ARM, -ARM), (ARM, -1)]
# signed distances in units of the shape's radius
SHAPES = {
    "disc": disc,
    "ring": lambda x, y: np.abs(disc(x, y, 0.75)) - 0.2,
    "square": square,
    "frame": lambda x, y: np.abs(square(x, y) + 0.1) - 0.17,
    "triangle": polygon(*corners(3, [1.15])),
    "star": polygon(*corners(10, [1, 0.42])),
    "cross": polygon(*CROSS, *((-x, -y) for x, y in CROSS)),
    "bar": polygon((1.1, 0.3), (-1.1, 0.3), (-1.1, -0.3), (1.1, -0.3)),
    "dots": lambda x, y: np.minimum.reduce(
        [disc(x - cx, y - cy, 0.36) for cx, cy in corners(3, [0.65])]
    ),
    "crescent": lambda x, y: np.maximum(disc(x, y, 1.0), -disc(x - 0.55, y, 0.85)),
}


def draw(n, rng):
    """n images (n, SIZE, SIZE, 3) uint8, and their labels (n,): equally many of each class"""
    labels = rng.permutation(np.arange(n) % len(SHAPES))
    radius, turn = rng.uniform(4, 9, n), rng.uniform(-np.pi, np.pi, n)
    centre = rng.uniform(radius, SIZE - radius, (2, n))  # the whole shape is in the picture
    pixel = np.arange(SIZE) + 0.5
    covered = np.empty((n, SIZE, SIZE))
    for label, shape in enumerate(SHAPES.values()):
        i = np.flatnonzero(labels == label)
        r, cos, sin = (v[i, None, None] for v in (radius, np.cos(turn), np.sin(turn)))
        dx = (pixel[None, None, :] - centre[0, i, None, None]) / r
        dy = (pixel[None, :, None] - centre[1, i, None, None]) / r
        distance = shape(cos * dx + sin * dy, cos * dy - sin * dx) * r  # in pixels
        covered[i] = np.clip(0.5 - distance, 0, 1)  # anti-aliased: the share of the pixel inside
    ground, light = rng.uniform(0.05, 0.25, (n, 1, 1)), rng.uniform(0.6, 1, (n, 1, 1))
    gray = ground + (light - ground) * covered
    return np.repeat((255 * gray + 0.5).astype(np.uint8)[..., None], 3, axis=3), labels


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("out", nargs="?", type=Path, default=Path("data/shapes.npz"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", type=int, default=5000, help="training images [5000]")
    parser.add_argument("--test", type=int, default=1000, help="test images [1000]")
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    arrays = {"classes": np.array(list(SHAPES))}
    for part, n in (("train", args.train), ("test", args.test)):
        arrays[f"x_{part}"], arrays[f"y_{part}"] = draw(n, rng)
    np.savez_compressed(buffer := io.BytesIO(), **arrays)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    temporary = args.out.with_name(args.out.name + ".tmp")
    temporary.write_bytes(buffer.getvalue())
    os.replace(temporary, args.out)


if __name__ == "__main__":
    main()

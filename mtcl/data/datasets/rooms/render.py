"""Exact ray casting of a scene, with the labels of all six tasks and a lit, textured image.

On the pixel path there are only integer operations and + - * / sqrt, floor, comparisons and choices of single
elements, so that the pixels are the same on every machine. Pixels are kept flat: an image of height H and
width W is an array of N = H * W, a field of vectors is (3, N).

The work goes over all primitives of a kind at once: every primitive is paired with the pixels of the screen
rectangle that bounds it, and one call intersects all the pairs.
"""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

from mtcl.data.datasets.rooms.scene import FREE_STANDING, PERSON, Camera, Capsule, Scene, Solid, Vector, build_scene
from mtcl.data.datasets.rooms.textures import LEVELS, SIDE, SIDE_BITS, atlas, hash_noise

NEAR = 0.05  # metres; nothing is closer to the camera
LARGE_PERSON = 0.01  # of the image; smaller persons are not salient
FALLOFF = 0.16  # of the lamp's light, per square metre

Vectors = np.ndarray | Sequence[np.ndarray]  # (3, M), or three (M,)
Surfaces = tuple[np.ndarray, np.ndarray]  # unit normals (3, M), metres along and up the surface (2, M)


class View(NamedTuple):
    """Surface and depth that each pixel of an image shows, before labels and light."""

    rays: np.ndarray  # float32 (3, N): directions in the world, 1 long along the optical axis
    depth: np.ndarray  # float32 (N,): metres along the optical axis
    surface: np.ndarray  # intp (N,): row of the scene's surfaces
    points: np.ndarray  # float32 (3, N): where the rays end
    normals: np.ndarray  # float32 (3, N): unit vectors in the world
    texture: np.ndarray  # float32 (2, N): metres along and up the surface


class Tables(NamedTuple):
    """The scene's surfaces by row: the shell's twelve, then boxes, ellipsoids and capsules."""

    label: np.ndarray  # uint8
    instance: np.ndarray  # int32
    part: np.ndarray  # uint8
    pattern: np.ndarray  # int32
    texels: np.ndarray  # float32: texels of the finest level per metre
    colours: np.ndarray  # float32 (7, rows): first colour, second minus first colour, glow


def render(seed: int, index: int, height: int, width: int) -> dict[str, np.ndarray]:
    """Render the image and the labels of one scene, a pure function of the arguments.

    Args:
        seed: seed of the scenes.
        index: number of the scene.
        height: height of the image in pixels.
        width: width of the image in pixels.

    Returns:
        ``image``: uint8 RGB (H, W, 3).
        ``semseg``: uint8 (H, W), indices of ``CLASS_NAMES``.
        ``depth``: float32 (H, W), metres along the optical axis.
        ``normals``: float32 (H, W, 3), unit vectors in camera axes: x to the left, y up, z towards the viewer.
        ``edge``: uint8 (H, W), 1 where the right or the lower neighbour belongs to another instance.
        ``human_parts``: uint8 (H, W), 0 background, 1 head, 2 torso and neck, 3 upper arms, 4 lower arms and
        hands, 5 upper legs, 6 lower legs and feet.
        ``sal``: uint8 (H, W), 1 on the salient object (see :func:`saliency_mask`).
    """
    scene = build_scene(seed, index)
    tables, shapes = build_tables(scene), build_shapes(scene)
    view = cast_rays(scene, shapes, height, width)
    shape = (height, width)
    label, instance = tables.label[view.surface], tables.instance[view.surface]
    return {
        "image": shade_image(scene, tables, shapes, view, height, width),
        "semseg": label.reshape(shape),
        "depth": view.depth.reshape(shape),
        "normals": camera_normals(scene.camera, view.normals).reshape(*shape, 3),
        "edge": boundaries(instance.reshape(shape)),
        "human_parts": tables.part[view.surface].reshape(shape),
        "sal": saliency_mask(label, instance, height, width).reshape(shape),
    }


def build_tables(scene: Scene) -> Tables:
    """Collect the scene's surfaces into arrays."""
    primitives: list[Solid | Capsule] = [*scene.boxes, *scene.ellipsoids, *scene.capsules]
    surfaces = scene.shell + [primitive.surface for primitive in primitives]
    colours = np.array([(*s.paint.first, *s.paint.second, s.paint.glow) for s in surfaces], np.float32).T.copy()
    colours[3:6] -= colours[:3]
    return Tables(
        label=np.array([s.label for s in surfaces], np.uint8),
        instance=np.array([s.instance for s in surfaces], np.int32),
        part=np.array([s.part for s in surfaces], np.uint8),
        pattern=np.array([s.paint.pattern for s in surfaces], np.int32),
        texels=np.array([SIDE / s.paint.tile for s in surfaces], np.float32),
        colours=colours,
    )


# Geometry.


class Boxes:
    """Boxes: intersections and surfaces in frames where each of them is the cube from -1 to 1.

    ``bounds`` are the low and high corners in the world, float64 (2, 3, primitives).
    """

    def __init__(self, solids: list[Solid]):
        rows = np.array([(*s.centre, *s.half, *s.turn) for s in solids], np.float64).reshape(-1, 8).T
        self.centre, self.half, (self.cos, self.sin) = rows[:3], rows[3:6], rows[6:]
        c, s = abs(self.cos), abs(self.sin)
        x, y, z = self.half
        reach = np.stack([c * x + s * z, y, s * x + c * z])
        self.bounds = np.stack([self.centre - reach, self.centre + reach])

    def frames(self, origin: Vector) -> np.ndarray:
        """Return coefficients that map rays from ``origin`` into the primitives' frames: float32 (8, primitives)."""
        x, y, z = np.array(origin)[:, None] - self.centre
        c, s = self.cos, self.sin
        hx, hy, hz = self.half
        rows = [c / hx, s / hx, 1 / hy, s / hz, c / hz, (c * x - s * z) / hx, y / hy, (s * x + c * z) / hz]
        return np.array(rows, np.float32)

    @staticmethod
    def distances(frames: np.ndarray, rays: np.ndarray) -> np.ndarray:
        """Return ray lengths (M,) to the intersections of pairs (8, M) and (3, M); infinite where there is none."""
        near, far = _slabs(*_local(frames, rays))
        first = np.maximum(np.maximum(near[0], near[1]), near[2])
        last = np.minimum(np.minimum(far[0], far[1]), far[2])
        return np.where(first <= last, first, np.float32(np.inf))

    def surfaces(self, origin: Vector, which: np.ndarray, rays: np.ndarray, depth: np.ndarray) -> Surfaces:
        """Return what rays (3, M) from ``origin`` hit at ``depth`` (M,), on the primitives ``which`` (M,)."""
        start, direction = _local(self.frames(origin)[:, which], rays)
        near, _ = _slabs(start, direction)
        axis = np.where(near[0] > near[1], np.where(near[0] > near[2], 0, 2), np.where(near[1] > near[2], 1, 2))
        # The face met is the one whose slab is entered last, so its normal is against the ray.
        x, y, z = (np.where(one < 0, np.float32(1), np.float32(-1)) * (axis == i) for i, one in enumerate(direction))
        half = self.half.astype(np.float32)[:, which]
        local = [half[i] * (start[i] + depth * direction[i]) for i in range(3)]
        return self._turned(which, x, y, z), face_coordinates(local, axis)

    def _turned(self, which: np.ndarray, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        """Rotate vectors of the primitives' frames into the world: (3, M)."""
        c, s = self.cos.astype(np.float32)[which], self.sin.astype(np.float32)[which]
        return np.stack([c * x + s * z, y, c * z - s * x])


class Ellipsoids(Boxes):
    """The ellipsoids inscribed in boxes: unit spheres in the boxes' frames."""

    @staticmethod
    def distances(frames: np.ndarray, rays: np.ndarray) -> np.ndarray:
        """Return ray lengths (M,) to the ellipsoids; see :meth:`Boxes.distances`."""
        origin, direction = _local(frames, rays)
        a, b, c = dot(direction, direction), dot(origin, direction), dot(origin, origin) - 1
        h = b * b - a * c
        return np.where(h > 0, (-b - np.sqrt(np.maximum(h, 0))) / a, np.float32(np.inf))

    def surfaces(self, origin: Vector, which: np.ndarray, rays: np.ndarray, depth: np.ndarray) -> Surfaces:
        """Return what rays hit on the ellipsoids; see :meth:`Boxes.surfaces`."""
        start, direction = _local(self.frames(origin)[:, which], rays)
        half = self.half.astype(np.float32)[:, which]
        x, y, z = (start[i] + depth * direction[i] for i in range(3))
        normals = unit(self._turned(which, x / half[0], y / half[1], z / half[2]))
        return normals, np.stack([x * half[0] + z * half[2], y * half[1]])


class Capsules:
    """Capsules, with the same members as :class:`Boxes`."""

    def __init__(self, capsules: list[Capsule]):
        rows = np.array([(*c.start, *c.end, c.radius) for c in capsules], np.float64).reshape(-1, 7).T
        self.start, self.end, self.radius = rows[:3], rows[3:6], rows[6]
        low, high = np.minimum(self.start, self.end), np.maximum(self.start, self.end)
        self.bounds = np.stack([low - self.radius, high + self.radius])

    def frames(self, origin: Vector) -> np.ndarray:
        """Return the axes, the vectors from their ends to the origin, and their products: float32 (14, primitives)."""
        axis = self.end - self.start
        start, end = (np.array(origin)[:, None] - one for one in (self.start, self.end))
        length, along, square = dot(axis, axis), dot(axis, start), self.radius * self.radius
        c = length * dot(start, start) - along * along - square * length
        caps = [dot(start, start) - square, dot(end, end) - square]
        return np.array([*axis, *start, *end, length, along, c, *caps], np.float32)

    @staticmethod
    def distances(frames: np.ndarray, rays: np.ndarray) -> np.ndarray:
        """Return ray lengths (M,) to the capsules; see :meth:`Boxes.distances`."""
        axis, start, end = frames[:3], frames[3:6], frames[6:9]
        length, along, c, cap_start, cap_end = frames[9:]
        rr, ar, sr = dot(rays, rays), dot(axis, rays), dot(start, rays)
        a = length * rr - ar * ar
        b = length * sr - along * ar
        h = b * b - a * c
        t = (-b - np.sqrt(np.maximum(h, 0))) / a
        y = along + t * ar
        # Past the ends of the cylinder, the sphere at that end decides.
        first = y <= 0
        b = np.where(first, sr, dot(end, rays))
        h_cap = b * b - rr * np.where(first, cap_start, cap_end)
        cap = np.where(h_cap > 0, (-b - np.sqrt(np.maximum(h_cap, 0))) / rr, np.float32(np.inf))
        return np.where(h > 0, np.where((y > 0) & (y < length), t, cap), np.float32(np.inf))

    def surfaces(self, origin: Vector, which: np.ndarray, rays: np.ndarray, depth: np.ndarray) -> Surfaces:
        """Return what rays hit on the capsules; see :meth:`Boxes.surfaces`."""
        frames = self.frames(origin)[:, which]
        axis, start, length = frames[:3], frames[3:6], frames[9]
        offset = start + depth * rays
        share = np.minimum(np.maximum(dot(offset, axis) / length, 0), 1)
        return unit(offset - share * axis), np.stack([offset[0] + offset[2], offset[1]])


Shape = Boxes | Capsules


def build_shapes(scene: Scene) -> list[Shape]:
    """Group the scene's primitives by kind, in the order of :func:`build_tables`."""
    return [Boxes(scene.boxes), Ellipsoids(scene.ellipsoids), Capsules(scene.capsules)]


def dot(a: Vectors, b: Vectors) -> np.ndarray:
    """Return inner products of (3, M) and (3, M): (M,), added in one fixed order."""
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def unit(a: np.ndarray) -> np.ndarray:
    """Scale vectors (3, M) to unit length."""
    return a / np.sqrt(dot(a, a))


def _local(frames: np.ndarray, rays: np.ndarray) -> tuple[Vectors, Vectors]:
    """Return origins and directions of rays in the frames of :meth:`Boxes.frames`."""
    xx, xz, yy, zx, zz = frames[:5]
    x, y, z = rays
    return frames[5:], [xx * x - xz * z, yy * y, zx * x + zz * z]


def _slabs(origin: Vectors, direction: Vectors) -> tuple[Vectors, Vectors]:
    """Return where rays enter and leave the three slabs -1..1, in ray lengths."""
    near, far = [], []
    for start, step in zip(origin, direction):
        inverse = 1 / step
        middle, half = start * inverse, abs(inverse)
        near.append(-half - middle)
        far.append(half - middle)
    return near, far


def face_coordinates(points: Vectors, axis: np.ndarray) -> np.ndarray:
    """Return coordinates (2, M) in the plane of an axis-aligned face: z, y or x, z or x, y for the axes 0, 1, 2."""
    x, y, z = points
    return np.stack([np.where(axis == 0, z, x), np.where(axis == 1, z, y)])


@cache
def grid(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return pixel centres in units of half the width, the optical axis at 0: to the right (1, W) and up (H, 1)."""
    x = (2 * np.arange(width, dtype=np.float32) + 1 - width) / width
    y = (height - 1 - 2 * np.arange(height, dtype=np.float32)) / width
    return x[None, :], y[:, None]


def camera_rays(camera: Camera, height: int, width: int) -> np.ndarray:
    """Return directions of the pixels' rays in the world, 1 long along the optical axis: float32 (3, N)."""
    x, y = grid(height, width)
    right, up = (np.array(axis, np.float32) * np.float32(camera.half_width) for axis in (camera.right, camera.up))
    rays = np.empty((3, height, width), np.float32)
    for axis in range(3):
        np.add(x * right[axis], y * up[axis] + np.float32(camera.forward[axis]), out=rays[axis])
    return rays.reshape(3, -1)


def cast_rays(scene: Scene, shapes: list[Shape], height: int, width: int) -> View:
    """Find the nearest surface along every pixel's ray."""
    rays = camera_rays(scene.camera, height, width)
    with np.errstate(divide="ignore", invalid="ignore"):
        depth, face = room_walls(scene, rays)
        surface = face.copy()
        first = len(scene.shell)
        for shape in shapes:
            intersect(scene.camera, shape, first, rays, depth, surface, (height, width))
            first += shape.bounds.shape[2]

        points = depth * rays + np.array(scene.camera.position, np.float32)[:, None]
        axis = face // 2
        normals = (1 - 2 * (face % 2)).astype(np.float32) * (axis == np.arange(3)[:, None])
        texture = face_coordinates(list(points), axis)
        first = len(scene.shell)
        for shape in shapes:
            end = first + shape.bounds.shape[2]
            pixel = np.flatnonzero((surface >= first) & (surface < end))
            normals[:, pixel], texture[:, pixel] = shape.surfaces(
                scene.camera.position, surface[pixel] - first, rays[:, pixel], depth[pixel]
            )
            first = end
    surface += 6 * ((surface < 6) & (points[1] < scene.band))
    return View(rays, depth, surface, points, normals, texture)


def intersect(
    camera: Camera,
    shape: Shape,
    first: int,
    rays: np.ndarray,
    depth: np.ndarray,
    surface: np.ndarray,
    size: tuple[int, int],
) -> None:
    """Update ``depth`` and ``surface`` by the primitives of one kind, whose rows begin at ``first``."""
    rectangles = bounding_rectangles(corners(shape.bounds), _BOX_EDGES, camera, *size)
    which, pixel = primitive_pixel_pairs(rectangles, size[1])
    distance = shape.distances(np.take(shape.frames(camera.position), which, axis=1), np.take(rays, pixel, axis=1))
    near = np.flatnonzero((distance > NEAR) & (distance < np.take(depth, pixel)))
    which, pixel, distance = which[near], pixel[near], distance[near]
    np.minimum.at(depth, pixel, distance)
    is_nearest = distance == depth[pixel]
    surface[pixel[is_nearest]] = first + which[is_nearest]


def room_walls(scene: Scene, rays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return depth (N,) of the shell as seen from within, and the face hit (N,): 2 * axis + (1 on the high side)."""
    exits = []
    for i in range(3):
        low, high = (np.float32(end[i] - scene.camera.position[i]) for end in (scene.low, scene.high))
        exits.append(np.maximum(low / rays[i], high / rays[i]))
    x, y, z = exits
    depth = np.minimum(np.minimum(x, y), z)
    axis = np.where(depth == x, 0, np.where(depth == y, 1, 2))
    ahead = np.where(axis == 0, rays[0], np.where(axis == 1, rays[1], rays[2])) > 0
    return depth, 2 * axis + ahead


_BOX_EDGES = np.array([(i, i | bit) for i in range(8) for bit in (1, 2, 4) if not i & bit]).T
# Of the hull of a box's corners and their shadows: both boxes' edges and the rays between.
_SHADOW_EDGES = np.concatenate([_BOX_EDGES, _BOX_EDGES + 8, [np.arange(8), np.arange(8) + 8]], axis=1)


def corners(bounds: np.ndarray) -> np.ndarray:
    """Return the eight corners of boxes given as (2, 3, primitives): (3, 8, primitives)."""
    i = np.arange(8)
    return np.stack([bounds[i & 1, 0], bounds[i >> 1 & 1, 1], bounds[i >> 2, 2]])


def bounding_rectangles(points: np.ndarray, edges: np.ndarray, camera: Camera, height: int, width: int) -> np.ndarray:
    """Return pixel rectangles that bound the projections of solids: intp (4, primitives).

    A solid is given by its corners, ``points`` (3, K, primitives), and by its edges, pairs of corners (2, E).
    A rectangle is top, bottom, left, right, the second of each excluded; it is empty behind the camera.
    """
    offset = points - np.array(camera.position)[:, None, None]
    projected = np.stack(
        [dot(np.array(axis)[:, None, None], offset) for axis in (camera.right, camera.up, camera.forward)]
    )
    if (projected[2] < NEAR).any():
        # What is behind the camera does not project; the solid's edges are cut just in front of it.
        start, way = projected[:, edges[0]], projected[:, edges[1]] - projected[:, edges[0]]
        share = (NEAR - start[2]) / np.where(way[2] == 0, 1, way[2])
        projected = np.concatenate([projected, start + np.minimum(np.maximum(share, 0), 1) * way], axis=1)
    x, y, z = projected
    visible = z > 0.99 * NEAR
    scale = width / 2 / camera.half_width
    z = np.where(visible, z, 1)
    columns, rows = width / 2 + x / z * scale, height / 2 - y / z * scale
    sides = [
        np.where(visible, rows, height).min(axis=0),
        np.where(visible, rows, -1).max(axis=0) + 1,
        np.where(visible, columns, width).min(axis=0),
        np.where(visible, columns, -1).max(axis=0) + 1,
    ]
    limits = np.array([[height], [height], [width], [width]])
    return np.minimum(np.maximum(np.floor(np.array(sides)), 0), limits).astype(np.intp)


def primitive_pixel_pairs(rectangles: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the primitive and the pixel of all pixels of the rectangles (4, primitives): intp (M,) each."""
    row0, row1, column0, column1 = rectangles
    across, down = np.maximum(column1 - column0, 0), np.maximum(row1 - row0, 0)
    # First the rows of all the rectangles, then the pixels of all the rows.
    owner = np.repeat(np.arange(len(row0)), down)
    row = np.arange(len(owner)) - np.repeat(np.cumsum(down) - down, down)
    length = across[owner]
    start = (row0[owner] + row) * width + column0[owner]
    pixel = np.repeat(start - (np.cumsum(length) - length), length)
    pixel += np.arange(len(pixel))
    return np.repeat(owner, length), pixel


# Labels.


def camera_normals(camera: Camera, normals: np.ndarray) -> np.ndarray:
    """Express world normals (3, N) in camera axes x left, y up, z towards the viewer: float32 (N, 3)."""
    right, up, forward = (np.array(axis, np.float32) for axis in (camera.right, camera.up, camera.forward))
    result = np.empty((normals.shape[1], 3), np.float32)
    result[:, 0] = dot(-right, normals)
    result[:, 1] = dot(up, normals)
    result[:, 2] = dot(-forward, normals)
    return result


def boundaries(instance: np.ndarray) -> np.ndarray:
    """Return 1 where the right or the lower neighbour belongs to another instance: uint8 (H, W)."""
    edge = np.zeros(instance.shape, bool)
    edge[:, :-1] = instance[:, :-1] != instance[:, 1:]
    edge[:-1] |= instance[:-1] != instance[1:]
    return edge.astype(np.uint8)


@cache
def centre_weights(height: int, width: int) -> np.ndarray:
    """Return integer weights (N,), in float64, that fall from the image's centre to its borders."""
    row, column = np.arange(height)[:, None], np.arange(width)[None, :]
    weights = np.minimum(row + 1, height - row) * np.minimum(column + 1, width - column)
    return weights.ravel().astype(np.float64)


def saliency_mask(label: np.ndarray, instance: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return the mask of what one looks at, uint8 (N,).

    All persons that cover at least one hundredth of the image; where there is none, the free-standing
    object (of the classes ``FREE_STANDING``) with the most pixels, weighted towards the image's centre;
    nothing where no such object is in view.
    """
    instances = int(instance.max()) + 1
    pixels = np.bincount(instance, minlength=instances)
    classes = np.zeros(instances, np.uint8)
    classes[instance] = label
    chosen = (classes == PERSON) & (pixels >= LARGE_PERSON * len(label))
    if not chosen.any():
        # Sums of integers below 2**53 are exact, whatever their order.
        weight = np.bincount(instance, centre_weights(height, width)) * np.isin(classes, FREE_STANDING)
        chosen = (weight > 0) & (np.arange(instances) == weight.argmax())
    return chosen[instance].astype(np.uint8)


# The image.


def shade_image(scene: Scene, tables: Tables, shapes: list[Shape], view: View, height: int, width: int) -> np.ndarray:
    """Compute what the camera records: uint8 RGB (H, W, 3)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        lamp, daylight, ambient = illumination(scene, shapes, view, height, width)
    mix = pattern_values(scene, tables, view, width)
    glow = np.take(tables.colours[6], view.surface)
    ambient = ambient + glow
    result = np.empty((3, height, width), np.float32)
    for channel in range(3):
        albedo = np.take(tables.colours[channel], view.surface)
        albedo += np.take(tables.colours[channel + 3], view.surface) * mix
        light = lamp * scene.lamp.colour[channel] + daylight * scene.daylight.colour[channel] + ambient
        result[channel] = np.sqrt(albedo * light).reshape(height, width)
    return develop_image(result, scene.key)


def illumination(
    scene: Scene, shapes: list[Shape], view: View, height: int, width: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return how much of the lamp's, of the window's and of ambient light every pixel gets: float32 (N,) each."""
    to_point = view.points - np.array(scene.lamp.position, np.float32)[:, None]
    square = dot(to_point, to_point)
    lamp = np.maximum(-dot(to_point, view.normals), 0) / (np.sqrt(square) * (1 + FALLOFF * square))
    lamp *= 1 - shadows(scene, shapes, to_point, height, width)

    to_point = view.points - np.array(scene.daylight.position, np.float32)[:, None]
    square = dot(to_point, to_point)
    daylight = np.maximum(-dot(to_point, view.normals), 0) / (np.sqrt(square) * (1 + square))

    # Corners are darker: the second smallest of the distances to the shell's planes, up to half a metre.
    x, y, z = (
        np.minimum(view.points[axis] - np.float32(scene.low[axis]), np.float32(scene.high[axis]) - view.points[axis])
        for axis in range(3)
    )
    second = np.maximum(np.minimum(x, y), np.minimum(np.maximum(x, y), z))
    openness = 0.6 + 0.8 * np.minimum(second, 0.5)
    tilt = 1 + 0.18 * view.normals[1] + 0.08 * view.normals[0]
    return lamp, daylight, scene.ambient * openness * tilt


def shadows(scene: Scene, shapes: list[Shape], to_point: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return how much of the lamp every pixel loses to objects, 0 to 1, soft by a pixel: float32 (N,)."""
    light = scene.lamp.position
    hidden = np.zeros(to_point.shape[1], np.float32)
    for shape in shapes:
        below = np.flatnonzero(shape.bounds[1, 1] < light[1] - 0.05)
        solid = corners(shape.bounds[:, :, below])
        hull = np.concatenate([solid, shadow_ends(scene, solid)], axis=1)
        which, pixel = primitive_pixel_pairs(
            bounding_rectangles(hull, _SHADOW_EDGES, scene.camera, height, width), width
        )
        frames = np.take(shape.frames(light)[:, below], which, axis=1)
        distance = shape.distances(frames, np.take(to_point, pixel, axis=1))
        hidden[pixel[(distance > 0) & (distance < 0.99)]] = 1
    image = hidden.reshape(height, width)
    soft = image.copy()
    soft[:, 1:-1] = 0.5 * image[:, 1:-1] + 0.25 * (image[:, :-2] + image[:, 2:])
    image = soft.copy()
    image[1:-1] = 0.5 * soft[1:-1] + 0.25 * (soft[:-2] + soft[2:])
    return image.ravel()


def shadow_ends(scene: Scene, points: np.ndarray) -> np.ndarray:
    """Return where the lamp's rays through points below it (3, K, primitives) hit the shell."""
    light = np.array(scene.lamp.position)[:, None, None]
    ray = points - light
    low, high = (np.array(end)[:, None, None] - light for end in (scene.low, scene.high))
    return light + ray * np.maximum(low / ray, high / ray).min(axis=0)


def pattern_values(scene: Scene, tables: Tables, view: View, width: int) -> np.ndarray:
    """Return the surfaces' patterns (N,), 0 to 1, from the mip level whose texels are as large as the pixel."""
    values, starts = atlas()
    texels = np.take(tables.texels, view.surface)
    # A pixel's extent on the surface, in texels: larger where the surface is seen at a slant.
    slant = np.maximum(-dot(view.rays, view.normals), 0.2)
    extent = view.depth * texels * np.float32(2 * scene.camera.half_width / width) / slant
    level = (extent.view(np.int32) >> 23) - 127  # floor(log2(extent)), from the exponent's bits
    level = np.minimum(np.maximum(level, 0), LEVELS - 1)
    column, row = (np.floor(view.texture * texels).astype(np.int32) + SIDE // 2) & (SIDE - 1)
    bits = SIDE_BITS - level
    texel = (((np.take(tables.pattern, view.surface) << bits) + (row >> level)) << bits) + (column >> level)
    return np.take(values, np.take(starts, level) + texel)


@cache
def grain() -> np.ndarray:
    """Return fixed noise around 0, in display units: float32 (512, 512)."""
    i = np.arange(512)
    return (hash_noise(i[:, None], i[None, :], 99) + hash_noise(i[:, None], i[None, :], 100) - 1) * np.float32(0.025)


def develop_image(display: np.ndarray, key: int) -> np.ndarray:
    """Apply lens blur and sensor noise to display values (3, H, W), 0 to about 1: uint8 (H, W, 3)."""
    _, height, width = display.shape
    soft = display.copy()
    inner = display[:, 1:-1, 1:-1]
    around = display[:, 1:-1, :-2] + display[:, 1:-1, 2:] + display[:, :-2, 1:-1] + display[:, 2:, 1:-1]
    soft[:, 1:-1, 1:-1] = 0.6 * inner + 0.1 * around
    noise = np.take(
        np.take(grain(), np.arange(height) + (key & 511), axis=0, mode="wrap"),
        np.arange(width) + (key >> 9 & 511),
        axis=1,
        mode="wrap",
    )
    levels = np.minimum(np.maximum(soft + noise, 0), 1) * 255 + 0.5
    return np.ascontiguousarray(levels.astype(np.uint8).transpose(1, 2, 0))

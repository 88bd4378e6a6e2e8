"""The built-in rooms: reproducible to the bit, and their labels agree with the geometry and with each other."""

import hashlib
from functools import cache

import numpy as np
import pytest

from mtcl import UserError
from mtcl.data.datasets.rooms import CLASS_NAMES, Rooms, render
from mtcl.data.datasets.rooms.render import View, build_shapes, build_tables, cast_rays
from mtcl.data.datasets.rooms.scene import FREE_STANDING, PERSON, Scene, build_scene

HEIGHT, WIDTH = 48, 64
KEYS = {"image", "semseg", "depth", "normals", "edge", "human_parts", "sal"}


@cache
def room(index: int) -> dict[str, np.ndarray]:
    return render(0, index, HEIGHT, WIDTH)


@cache
def viewed(index: int) -> tuple[Scene, View]:
    scene = build_scene(0, index)
    return scene, cast_rays(scene, build_shapes(scene), HEIGHT, WIDTH)


def instances(index: int) -> np.ndarray:
    scene, view = viewed(index)
    return build_tables(scene).instance[view.surface].reshape(HEIGHT, WIDTH)


def rays_in_camera_axes(index: int) -> np.ndarray:
    """(H, W, 3) in x left, y up, z towards the viewer, from the definition of the camera alone."""
    half = build_scene(0, index).camera.half_width
    right = ((np.arange(WIDTH) + 0.5) / (WIDTH / 2) - 1) * half
    up = (HEIGHT / 2 - (np.arange(HEIGHT) + 0.5)) / (WIDTH / 2) * half
    right, up = np.meshgrid(right, up)
    return np.stack([-right, up, -np.ones_like(up)], axis=2)


# The same pixels everywhere.


@pytest.mark.parametrize(
    ("seed", "index", "size", "golden"),
    [
        (0, 0, (48, 64), "e1458d88a59c28683ca01beeeb78d05f"),
        (0, 3, (48, 64), "37e9d3c0db27b8281f83b1a970e4a23c"),
        (7, 10_000_002, (48, 64), "b9f1a70d8142016f4a53541655989a28"),
        (0, 5, (96, 128), "a4e296e14f2241eda8da9246a7474933"),
        (123, 9, (96, 128), "d36438163aad52b66e31144980ae6be4"),
    ],
)
def test_golden(seed, index, size, golden):
    arrays = render(seed, index, *size)
    digest = hashlib.sha256()
    for key in sorted(arrays):
        little_endian = arrays[key].astype(arrays[key].dtype.newbyteorder("<"))
        digest.update(key.encode() + np.ascontiguousarray(little_endian).tobytes())
    assert digest.hexdigest()[:32] == golden, "pixels changed: raise RENDER_VERSION and renew the hashes"


def test_a_scene_depends_on_its_seed_and_index_alone():
    first = {key: array.copy() for key, array in render(0, 4, HEIGHT, WIDTH).items()}
    render(0, 5, HEIGHT, WIDTH)
    render(0, 4, 32, 40)
    again = render(0, 4, HEIGHT, WIDTH)
    assert all(np.array_equal(first[key], again[key]) for key in KEYS)
    for other in (render(0, 5, HEIGHT, WIDTH), render(1, 4, HEIGHT, WIDTH)):
        assert not np.array_equal(first["image"], other["image"])
        assert not np.array_equal(first["depth"], other["depth"])


@pytest.mark.parametrize("size", [(48, 64), (33, 57)])
def test_layouts(size):
    arrays = render(2, 1, *size)
    assert set(arrays) == KEYS
    for key, array in arrays.items():
        channels = (3,) if key in ("image", "normals") else ()
        assert array.shape == (*size, *channels), key
        assert array.dtype == (np.float32 if key in ("depth", "normals") else np.uint8), key
        assert array.flags.c_contiguous, key


def test_the_scene_does_not_depend_on_the_resolution():
    """At three times the resolution every third ray is the same."""
    for index in range(6):
        large = render(0, index, 3 * HEIGHT, 3 * WIDTH)
        for key in ("semseg", "human_parts"):
            assert (large[key][1::3, 1::3] != room(index)[key]).mean() < 0.002, key
        close = np.isclose(large["depth"][1::3, 1::3], room(index)["depth"], rtol=1e-4)
        assert close.mean() > 0.998


# Geometry.


@pytest.mark.parametrize("index", range(12))
def test_every_ray_ends_at_the_nearest_primitive(index):
    """Against intersecting all primitives with all rays, without bounding rectangles."""
    scene, view = viewed(index)
    nearest = np.full(view.depth.shape, np.inf, np.float32)
    with np.errstate(divide="ignore", invalid="ignore"):
        for shape in build_shapes(scene):
            for frame in shape.frames(scene.camera.position).T:
                distance = shape.distances(np.repeat(frame[:, None], len(nearest), axis=1), view.rays)
                nearest = np.where((distance > 0) & (distance < nearest), distance, nearest)
    objects = view.surface >= len(scene.shell)
    assert np.array_equal(view.depth[objects], nearest[objects])
    assert (view.depth[~objects] <= nearest[~objects]).all()


@pytest.mark.parametrize("index", range(12))
def test_points_lie_on_the_surface_they_are_labelled_with(index):
    """From depth and camera back to the world, in other formulas than the renderer's."""
    scene, view = viewed(index)
    camera = scene.camera
    leftward, up, toward = np.moveaxis(rays_in_camera_axes(index) * room(index)["depth"][..., None], 2, 0)
    axes = (np.array(axis) for axis in (camera.right, camera.up, camera.forward))
    points = np.array(camera.position) + sum(
        part[..., None] * axis for part, axis in zip((-leftward, up, -toward), axes)
    )
    points, checked = points.reshape(-1, 3), 0
    faces = (scene.low[0], scene.high[0], scene.low[1], scene.high[1], scene.low[2], scene.high[2])
    for row, plane in enumerate((*faces, *faces)):
        here = points[view.surface == row]
        assert np.abs(here[:, row % 6 // 2] - plane).max(initial=0) < 1e-4
        checked += len(here)

    row = len(scene.shell)
    for solids, norm in ((scene.boxes, np.inf), (scene.ellipsoids, 2)):
        for solid in solids:
            offset = points[view.surface == row] - solid.centre
            c, s = solid.turn
            local = np.stack([c * offset[:, 0] - s * offset[:, 2], offset[:, 1], s * offset[:, 0] + c * offset[:, 2]])
            size = np.linalg.norm(local / np.array(solid.half)[:, None], ord=norm, axis=0)
            assert np.abs(size - 1).max(initial=0) * min(solid.half) < 1e-4
            checked, row = checked + len(offset), row + 1
    for capsule in scene.capsules:
        here = points[view.surface == row]
        start, way = np.array(capsule.start), np.array(capsule.end) - np.array(capsule.start)
        share = np.clip((here - start) @ way / (way @ way), 0, 1)
        distance = np.linalg.norm(here - start - share[:, None] * way, axis=1)
        assert np.abs(distance - capsule.radius).max(initial=0) < 1e-3
        checked, row = checked + len(here), row + 1
    assert checked == HEIGHT * WIDTH


@pytest.mark.parametrize("index", range(12))
def test_normals_are_unit_vectors_towards_the_viewer(index):
    normals, rays = room(index)["normals"], rays_in_camera_axes(index)
    assert np.abs(np.linalg.norm(normals, axis=2) - 1).max() < 1e-5
    assert (normals * rays).sum(axis=2).max() < 1e-3


def test_normals_agree_with_the_depth_on_flat_surfaces():
    compared = 0
    for index in range(12):
        normals, depth = room(index)["normals"], room(index)["depth"].astype(np.float64)
        surface = viewed(index)[1].surface.reshape(HEIGHT, WIDTH)
        points = rays_in_camera_axes(index) * depth[..., None]
        across, down = points[1:-1, 2:] - points[1:-1, :-2], points[2:, 1:-1] - points[:-2, 1:-1]
        derived = np.cross(across, down)  # these axes are left-handed: towards the viewer
        derived /= np.linalg.norm(derived, axis=2, keepdims=True)
        inner = surface[1:-1, 1:-1]
        flat = np.ones(inner.shape, bool)
        for rows, columns in (
            (slice(1, -1), slice(2, None)),
            (slice(1, -1), slice(0, -2)),
            (slice(2, None), slice(1, -1)),
            (slice(0, -2), slice(1, -1)),
        ):
            flat &= surface[rows, columns] == inner
            flat &= (normals[rows, columns] == normals[1:-1, 1:-1]).all(axis=2)
        cosine = (derived * normals[1:-1, 1:-1]).sum(axis=2)
        assert cosine[flat].min() > 0.999, index
        compared += flat.sum()
    assert compared > 0.5 * 12 * HEIGHT * WIDTH


def test_floor_ceiling_and_axes_of_the_normals():
    for index in range(12):
        arrays = room(index)
        for name, sign in (("floor", 1), ("ceiling", -1)):
            normals = arrays["normals"][arrays["semseg"] == CLASS_NAMES.index(name)]
            assert (sign * normals[:, 1] > 0.9).all()
            assert np.abs(normals[:, 0]).max(initial=0) < 1e-6  # the camera does not roll
        # The walls seen on the left of the image face right, which is negative x, and the other way round.
        scene, view = viewed(index)
        face = view.surface.reshape(HEIGHT, WIDTH)
        for row, sign in ((0, -1), (1, 1)):
            x = arrays["normals"][(face == row) | (face == row + 6)][:, 0]
            assert (sign * x > 0).all()
        assert scene.camera.right[0] > 0


def test_things_stand_in_the_room_and_apart_from_the_camera():
    for index in range(40):
        scene = build_scene(3, index)
        for shape in build_shapes(scene):
            low, high = shape.bounds
            for axis in range(3):
                slack = 0.12  # what hangs on a wall reaches into it, and so does a lamp into the ceiling
                assert (low[axis] > scene.low[axis] - slack).all(), (index, axis)
                assert (high[axis] < scene.high[axis] + slack).all(), (index, axis)
            eye = np.array(scene.camera.position)[:, None]
            outside = np.maximum(np.maximum(low - eye, eye - high), 0).max(axis=0)
            assert (outside > 0.1).all(), index


# Labels against each other.


@pytest.mark.parametrize("index", range(12))
def test_edges_are_instance_boundaries(index):
    instance, edge = instances(index), room(index)["edge"]
    for y in range(HEIGHT):
        for x in range(WIDTH):
            neighbours = {instance[y, min(x + 1, WIDTH - 1)], instance[min(y + 1, HEIGHT - 1), x]}
            assert edge[y, x] == (neighbours != {instance[y, x]}), (y, x)


def test_an_instance_has_one_class_and_touching_walls_are_two():
    for index in range(30):
        pairs = set(zip(instances(index).ravel().tolist(), room(index)["semseg"].ravel().tolist()))
        assert len(pairs) == len({instance for instance, _ in pairs})
        assert len([label for _, label in pairs if label == CLASS_NAMES.index("wall")]) >= 2


def test_body_parts_are_where_persons_are():
    ids = set()
    for index in range(60):
        arrays = room(index)
        assert np.array_equal(arrays["human_parts"] > 0, arrays["semseg"] == PERSON)
        ids |= set(np.unique(arrays["human_parts"]).tolist())
    assert ids == set(range(7))


def test_what_is_salient():
    empty = 0
    for index in range(60):
        arrays, instance = room(index), instances(index)
        sal = arrays["sal"] == 1
        assert set(np.unique(arrays["sal"])) <= {0, 1}
        chosen = set(instance[sal].tolist())
        assert not np.isin(instance[~sal], list(chosen)).any()  # whole instances only
        persons = {int(i) for i in np.unique(instance[arrays["semseg"] == PERSON])}
        large = {i for i in persons if (instance == i).sum() >= 0.01 * sal.size}
        if large:
            assert chosen == large
        else:
            assert len(chosen) <= 1
            assert np.isin(arrays["semseg"][sal], FREE_STANDING).all()
        empty += not chosen
    assert empty <= 2


def test_a_hundred_rooms_hold_all_classes_and_persons_in_about_half():
    classes = [set(np.unique(room(index)["semseg"]).tolist()) for index in range(100)]
    for label, name in enumerate(CLASS_NAMES):
        assert sum(label in one for one in classes) >= 15, name
    assert 35 <= sum(PERSON in one for one in classes) <= 65


def test_pictures_are_well_exposed_and_no_class_has_a_colour_of_its_own():
    means, walls = [], []
    for index in range(60):
        image, semseg = room(index)["image"], room(index)["semseg"]
        means.append(image.mean())
        walls.append(image[semseg == 0].mean(axis=0))
    assert min(means) > 60
    assert max(means) < 230
    assert np.std(walls, axis=0).min() > 15


# The reader.

TASKS = ("semseg", "depth", "normals", "edge", "human_parts", "sal")


def small(subset: str = "train", tasks=TASKS, **options) -> Rooms:
    return Rooms(subset, tasks, **{"size": (16, 24), "length": (6, 4), **options})


def test_reading():
    reader = small(tasks=("sal", "depth"))
    assert list(reader.ids) == [f"rooms-0-train-{i:05d}" for i in range(6)]
    sample = reader.read(2)
    assert sample.id == "rooms-0-train-00002"
    assert list(sample.labels) == ["sal", "depth"]
    expected = render(0, 2, 16, 24)
    assert np.array_equal(sample.image, expected["image"])
    assert all(np.array_equal(sample.labels[task], expected[task]) for task in sample.labels)


def test_lists_are_disjoint():
    lists = [
        small(part, split=split, seed=seed)
        for part in ("train", "val")
        for split in ("standard", "tune")
        for seed in (0, 1)
    ]
    ids = [one for reader in lists for one in reader.ids]
    images = {reader.read(i).image.tobytes() for reader in lists for i in range(len(reader.ids))}
    assert len(ids) == len(set(ids)) == len(images) == 4 * 2 * 5


def test_the_cache_changes_nothing():
    cached, fresh = small(cache=True), small(cache=False)
    spoiled = cached.read(1)
    spoiled.image[:] = 0
    for label in spoiled.labels.values():
        label[:] = 0
    for a, b in ((cached.read(1), fresh.read(1)), (fresh.read(1), fresh.read(1))):
        assert np.array_equal(a.image, b.image)
        assert all(np.array_equal(a.labels[task], b.labels[task]) for task in TASKS)


def test_limit_keeps_the_first():
    assert list(small(limit=2).ids) == list(small().ids)[:2]
    assert len(small("val", limit=99).ids) == 4


def test_reading_past_the_end_fails():
    with pytest.raises(IndexError):
        small().read(6)


def test_fingerprints_tell_lists_apart():
    readers = [
        small(),
        small("val"),
        small(split="tune"),
        small(seed=1),
        small(limit=3),
        small(length=(7, 4)),
        small(size=(24, 16)),
    ]
    assert len({reader.fingerprint() for reader in readers}) == len(readers)
    assert small().fingerprint() == small(tasks=("depth",), cache=False, length=(6, 5)).fingerprint()


def test_offered():
    offered = Rooms.task_options(size=(96, 128), seed=3)
    assert list(offered) == ["semseg", "human_parts", "sal", "depth", "normals", "edge"]
    assert offered["semseg"] == {"class_names": CLASS_NAMES}
    assert not any(offered[task] for task in offered if task != "semseg")


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        ({"subset": "test"}, ("subset 'test'", "train, val")),
        ({"split": "new"}, ("split 'new'", "standard, tune")),
        ({"tasks": ["depth", "flow"]}, ("task 'flow'", "semseg, human_parts, sal, depth, normals, edge")),
        ({"length": (0, 4)}, ("length 0", "train")),
        ({"limit": 0}, ("limit 0",)),
        ({"size": (4, 128)}, ("size (4, 128)",)),
    ],
)
def test_user_errors_name_the_value_and_the_choices(options, fragments):
    with pytest.raises(UserError) as caught:
        small(**options)
    assert all(word in str(caught.value) for word in fragments)


def test_the_cache_stops_at_its_limit(monkeypatch):
    monkeypatch.setattr("mtcl.data.datasets.rooms.CACHE_BYTES", 3 * 16 * 16 * 2)  # two images of 16x16 without labels
    reader = Rooms("train", (), size=(16, 16))
    first = [reader.read(i).image for i in range(4)]
    rendered = []
    monkeypatch.setattr("mtcl.data.datasets.rooms.render", lambda *a: rendered.append(a) or render(*a))
    again = [reader.read(i).image for i in range(4)]
    assert len(rendered) == 2
    assert all(np.array_equal(a, b) for a, b in zip(first, again))

"""Contents of a room: its walls, furniture, people, camera and light, all drawn from integer hashes.

World axes: x to the right, y up, z into the room, in metres; the floor is y = 0. Only + - * / and sqrt touch
the numbers, so that every machine builds the same scene; a rotation is given by t = tan(angle / 2).
"""

from collections.abc import Sequence
from math import sqrt
from typing import NamedTuple, TypeVar

from mtcl.data.datasets.rooms.textures import Pattern

CLASS_NAMES = (
    "wall",
    "floor",
    "ceiling",
    "door",
    "window",
    "picture",
    "floor mat",
    "table",
    "cabinet",
    "chair",
    "sofa",
    "lamp",
    "ball",
    "person",
)
WALL, FLOOR, CEILING, DOOR, WINDOW, PICTURE, MAT, TABLE, CABINET, CHAIR, SOFA, LAMP, BALL, PERSON = range(14)
FREE_STANDING = (TABLE, CABINET, CHAIR, SOFA, LAMP, BALL, PERSON)
HEAD, TORSO, UPPER_ARM, LOWER_ARM, UPPER_LEG, LOWER_LEG = range(1, 7)

Vector = tuple[float, float, float]
# How far a bone swings forward and spreads to its side, from hanging down: tangents of half the angles.
Bend = tuple[float, float]
Limb = tuple[Bend, Bend]  # upper, lower
T = TypeVar("T")

_WALL_COLOURS = (
    (0.90, 0.87, 0.80),
    (0.82, 0.83, 0.84),
    (0.70, 0.79, 0.85),
    (0.72, 0.79, 0.68),
    (0.83, 0.62, 0.50),
    (0.88, 0.74, 0.73),
    (0.45, 0.58, 0.62),
    (0.90, 0.80, 0.56),
    (0.70, 0.62, 0.74),
)
_WOODS = (
    (0.78, 0.60, 0.40),
    (0.60, 0.41, 0.26),
    (0.44, 0.29, 0.20),
    (0.84, 0.74, 0.58),
    (0.56, 0.49, 0.43),
)
_PAINTS = (
    (0.90, 0.89, 0.86),
    (0.24, 0.24, 0.26),
    (0.35, 0.50, 0.56),
    (0.62, 0.70, 0.60),
    (0.75, 0.35, 0.28),
)
_FABRICS = (
    (0.72, 0.20, 0.20),
    (0.18, 0.34, 0.62),
    (0.20, 0.50, 0.36),
    (0.88, 0.70, 0.24),
    (0.88, 0.88, 0.86),
    (0.30, 0.31, 0.36),
    (0.62, 0.44, 0.64),
    (0.85, 0.50, 0.28),
    (0.42, 0.62, 0.74),
    (0.60, 0.53, 0.44),
)
_TROUSERS = (
    (0.20, 0.26, 0.42),
    (0.22, 0.22, 0.24),
    (0.58, 0.50, 0.38),
    (0.42, 0.46, 0.50),
    (0.40, 0.28, 0.24),
)
_SKINS = ((0.93, 0.76, 0.65), (0.87, 0.67, 0.52), (0.72, 0.51, 0.37), (0.52, 0.35, 0.25))
_HAIRS = ((0.14, 0.11, 0.10), (0.33, 0.22, 0.14), (0.62, 0.45, 0.26), (0.62, 0.60, 0.58), (0.46, 0.20, 0.11))


class Paint(NamedTuple):
    """Look of a surface: a pattern that mixes two linear-light colours, and the light it emits."""

    pattern: Pattern
    tile: float  # metres that one tile of the pattern spans
    first: Vector
    second: Vector
    glow: float = 0.0


class Surface(NamedTuple):
    """Labels and paint of the pixels that show a primitive."""

    label: int  # index into CLASS_NAMES
    instance: int
    part: int  # of a person: 1 to 6; else 0
    paint: Paint


class Solid(NamedTuple):
    """A box, or the ellipsoid inscribed in it, rotated about the vertical by (cosine, sine)."""

    surface: Surface
    centre: Vector
    half: Vector
    turn: tuple[float, float]


class Capsule(NamedTuple):
    """All points within ``radius`` of the segment from ``start`` to ``end``."""

    surface: Surface
    start: Vector
    end: Vector
    radius: float


class Camera(NamedTuple):
    """A pinhole camera: its position, unit axes and field of view."""

    position: Vector
    right: Vector
    up: Vector
    forward: Vector
    half_width: float  # tangent of half the horizontal field of view


class Light(NamedTuple):
    """A point light."""

    position: Vector
    colour: Vector


class Scene(NamedTuple):
    """Everything that :mod:`render` needs."""

    low: Vector  # corners of the room's shell
    high: Vector
    shell: list[Surface]  # walls x low, x high; floor, ceiling; walls z low, z high; then the six's lower bands
    band: float  # height of the lower band (skirting, wainscot) in metres
    boxes: list[Solid]
    ellipsoids: list[Solid]
    capsules: list[Capsule]
    camera: Camera
    lamp: Light
    daylight: Light
    ambient: float
    key: int  # 32 bits for the image noise


class Frame(NamedTuple):
    """A position on the floor and the rotation of its local z axis, its front: (cosine, sine) about the vertical."""

    x: float
    z: float
    turn: tuple[float, float]
    y: float = 0.0

    def world(self, x: float, y: float, z: float) -> Vector:
        """Transform a local point to the world."""
        c, s = self.turn
        return self.x + c * x + s * z, self.y + y, self.z - s * x + c * z


def rotation(t: float) -> tuple[float, float]:
    """Return cosine and sine of the angle 2 atan(t)."""
    return (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)


class SceneRandom:
    """Random numbers that depend on (seed, index) alone: SplitMix64."""

    _MASK = (1 << 64) - 1

    def __init__(self, seed: int, index: int):
        self._state = seed & self._MASK
        self._state = self.bits() ^ (index & self._MASK)
        self._state = self.bits()

    def bits(self) -> int:
        """Return the next 64 bits."""
        self._state = z = (self._state + 0x9E3779B97F4A7C15) & self._MASK
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & self._MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & self._MASK
        return z ^ (z >> 31)

    def between(self, low: float, high: float) -> float:
        """Draw a number between ``low`` and ``high``."""
        return low + (high - low) * ((self.bits() >> 40) / (1 << 24))

    def chance(self, probability: float) -> bool:
        """Return True with this probability."""
        return self.between(0, 1) < probability

    def pick(self, choices: Sequence[T]) -> T:
        """Draw one of the choices."""
        return choices[(self.bits() >> 32) % len(choices)]

    def sign(self) -> int:
        """Draw -1 or 1."""
        return self.pick((-1, 1))

    def colour(self, choices: Sequence[Vector], spread: float = 0.05, gain: float = 1.0) -> Vector:
        """Draw one of the display colours, varied, as linear light (display = sqrt(linear) here)."""
        r, g, b = (gain * channel + self.between(-spread, spread) for channel in self.pick(choices))
        return max(r, 0.02) * max(r, 0.02), max(g, 0.02) * max(g, 0.02), max(b, 0.02) * max(b, 0.02)


def scale_color(colour: Vector, factor: float) -> Vector:
    """Multiply a colour by a factor."""
    return colour[0] * factor, colour[1] * factor, colour[2] * factor


def plain(colour: Vector, contrast: float = 0.75, tile: float = 1.0) -> Paint:
    """Return a paint of one mottled colour."""
    return Paint(Pattern.PLAIN, tile, colour, scale_color(colour, contrast))


def glowing(colour: Vector, glow: float) -> Paint:
    """Return a paint that emits light."""
    return Paint(Pattern.PLAIN, 1.0, colour, colour, glow)


def build_scene(seed: int, index: int) -> Scene:
    """Build the scene of this seed and index."""
    return _Builder(SceneRandom(seed, index)).scene()


class _Builder:
    """Furnishes one room, from the shell to the small things, keeping track of occupied space."""

    def __init__(self, random: SceneRandom):
        self.dice = random
        self.boxes: list[Solid] = []
        self.ellipsoids: list[Solid] = []
        self.capsules: list[Capsule] = []
        self.instances = 6  # the faces of the shell are 0 to 5
        self.label = self.instance = 0  # of what is being built

        self.width, self.depth = random.between(3.6, 6.2), random.between(4.2, 6.6)
        self.height = random.between(2.4, 3.0)
        self.wood = random.colour(_WOODS)
        self.camera = self._camera()
        self.lamp = Light((0.0, 0.0, 0.0), (0.0, 0.0, 0.0))
        self.daylight = self.lamp

        # Occupied: rectangles of the floor (x, z low and high), and of each wall (along, up).
        cx, _, cz = self.camera.position
        self.floor_rectangles = [(cx - 0.9, cx + 0.9, cz - 0.9, cz + 0.9)]
        self.wall_rectangles: dict[int, list[tuple[float, float, float, float]]] = {0: [], 1: [], 5: []}

    def scene(self) -> Scene:
        """Furnish the room and return the scene."""
        random = self.dice
        shell, band = self._shell(), random.pick((0.08, 0.10, 0.12, 0.9))
        self._ceiling_lamp()
        persons = random.pick((0, 0, 0, 0, 1, 1, 1, 2, 2))
        self._doors_and_windows()
        for _ in range(persons):
            if random.chance(0.75):
                self._standing_person()
            else:
                self._chair_in_the_room(occupied=True)
        self._against_the_walls()
        self._in_the_room()
        self._pictures()
        return Scene(
            low=(-self.width / 2, 0.0, 0.0),
            high=(self.width / 2, self.height, self.depth),
            shell=shell,
            band=band,
            boxes=self.boxes,
            ellipsoids=self.ellipsoids,
            capsules=self.capsules,
            camera=self.camera,
            lamp=self.lamp,
            daylight=self.daylight,
            ambient=random.between(0.24, 0.38),
            key=random.bits() >> 32,
        )

    # Primitives, in the frame of what they belong to.

    def _begin(self, label: int) -> None:
        """Start a new instance of this class, to which the next primitives belong."""
        self.label, self.instance = label, self.instances
        self.instances += 1

    def _surface(self, paint: Paint, part: int = 0) -> Surface:
        """Return a surface of the current instance."""
        return Surface(self.label, self.instance, part, paint)

    def _box(self, frame: Frame, centre: Vector, half: Vector, paint: Paint) -> None:
        """Add a box."""
        self.boxes.append(Solid(self._surface(paint), frame.world(*centre), half, frame.turn))

    def _ellipsoid(self, frame: Frame, centre: Vector, half: Vector, paint: Paint, part: int = 0) -> None:
        """Add an ellipsoid."""
        self.ellipsoids.append(Solid(self._surface(paint, part), frame.world(*centre), half, frame.turn))

    def _capsule(self, frame: Frame, start: Vector, end: Vector, radius: float, paint: Paint, part: int = 0) -> None:
        """Add a capsule."""
        surface = self._surface(paint, part)
        self.capsules.append(Capsule(surface, frame.world(*start), frame.world(*end), radius))

    # Room, camera, light.

    def _camera(self) -> Camera:
        """Place the camera near the middle of the wall behind it, at eye height, looking across the room."""
        random = self.dice
        x, y, z = self.width * random.between(-0.3, 0.3), random.between(1.15, 1.75), random.between(0.25, 0.6)
        aim_x = self.width * random.between(-0.28, 0.28) - 0.35 * x
        across, ahead = aim_x - x, self.depth * random.between(0.65, 0.9) - z
        length = sqrt(across * across + ahead * ahead)
        fx, fz = across / length, ahead / length
        c, s = rotation(random.between(0.02, 0.12))  # 2 to 14 degrees down
        return Camera(
            position=(x, y, z),
            right=(fz, 0.0, -fx),
            up=(fx * s, c, fz * s),
            forward=(fx * c, -s, fz * c),
            half_width=random.between(0.62, 0.82),  # 64 to 79 degrees wide
        )

    def _shell(self) -> list[Surface]:
        """Paint the walls, the floor and the ceiling."""
        random = self.dice
        colour = random.colour(_WALL_COLOURS)
        pattern = random.pick(
            (Pattern.PLAIN, Pattern.PLAIN, Pattern.PLAIN, Pattern.STRIPES, Pattern.DIAMONDS, Pattern.BRICK)
        )
        if pattern == Pattern.BRICK:
            wall = Paint(pattern, 1.1, random.colour(_WALL_COLOURS), random.colour(_WALL_COLOURS[:2]))
        else:
            wall = Paint(pattern, random.between(0.9, 1.6), colour, scale_color(colour, random.between(0.62, 0.85)))
        accent = plain(random.colour(_WALL_COLOURS, gain=0.85)) if random.chance(0.3) else wall
        bands = plain(random.colour(_PAINTS[:1]) if random.chance(0.6) else self.wood)
        ceiling = plain(random.colour(((0.93, 0.93, 0.91), (0.93, 0.93, 0.91), (0.85, 0.80, 0.70))), 0.9)

        kind = random.pick((Pattern.PLANKS, Pattern.PLANKS_ACROSS, Pattern.TILES, Pattern.CHECKER, Pattern.PLAIN))
        if kind in (Pattern.PLANKS, Pattern.PLANKS_ACROSS):
            first = random.colour(_WOODS)
            floor = Paint(kind, random.between(1.3, 1.8), first, scale_color(first, 0.35))
        elif kind == Pattern.PLAIN:
            floor = plain(random.colour(_FABRICS[-6:]), 0.55, 0.8)
        else:
            first = random.colour(((0.86, 0.83, 0.76), (0.70, 0.70, 0.70), (0.80, 0.62, 0.50)))
            floor = Paint(kind, random.between(1.2, 2.0), first, scale_color(first, random.between(0.3, 0.6)))

        faces = [
            Surface(WALL, 0, 0, wall),
            Surface(WALL, 1, 0, wall),
            Surface(FLOOR, 2, 0, floor),
            Surface(CEILING, 3, 0, ceiling),
            Surface(WALL, 4, 0, wall),
            Surface(WALL, 5, 0, accent),
        ]
        return faces + [face._replace(paint=bands) if face.label == WALL else face for face in faces]

    def _ceiling_lamp(self) -> None:
        """Add the light of the room, in a shade that hangs from the ceiling or is fixed to it."""
        random = self.dice
        frame = Frame(self.width * random.between(-0.15, 0.15), self.depth * random.between(0.4, 0.62), (1.0, 0.0))
        power = random.between(1.9, 2.6)
        warmth = random.between(0.7, 1.0)
        colour = (power, power * (0.55 + 0.45 * warmth), power * (0.1 + 0.9 * warmth))
        paint = glowing((1.0, 0.8 + 0.2 * warmth, 0.5 + 0.5 * warmth), 1.0)
        self._begin(LAMP)
        if random.chance(0.5):
            drop, radius = random.between(0.2, 0.35), random.between(0.12, 0.18)
            self._capsule(frame, (0, self.height, 0), (0, self.height - drop, 0), 0.012, plain((0.02, 0.02, 0.02)))
            self._ellipsoid(frame, (0, self.height - drop, 0), (radius, 0.8 * radius, radius), paint)
        else:
            drop = 0.35
            self._ellipsoid(frame, (0, self.height, 0), (0.25, 0.1, 0.25), paint)
        self.lamp = Light(frame.world(0, self.height - drop, 0), colour)

    # Positions.

    def _wall(self, face: int) -> tuple[Frame, float]:
        """Return the frame of a wall (origin at its foot, x along it, front into the room) and half of its length."""
        if face == 5:
            return Frame(0.0, self.depth, (-1.0, 0.0)), self.width / 2
        side = -1.0 if face == 0 else 1.0
        return Frame(side * self.width / 2, self.depth / 2, (0.0, -side)), self.depth / 2

    def _on_wall(self, half: float, bottom: float, top: float) -> tuple[Frame, float] | None:
        """Reserve a free position on some wall for a thing of this half width; None if there is none."""
        for _ in range(6):
            face = self.dice.pick((0, 1, 5, 5))
            frame, length = self._wall(face)
            if half > length - 0.3:
                continue
            along = self.dice.between(half + 0.15 - length, length - half - 0.15)
            rectangle = (along - half - 0.1, along + half + 0.1, bottom, top)
            if not _overlaps(rectangle, self.wall_rectangles[face]):
                self.wall_rectangles[face].append(rectangle)
                return frame, along
        return None

    def _free(self, frame: Frame, half_x: float, half_z: float, margin: float = 0.08) -> bool:
        """Reserve the space for a thing of this size; return False if it is occupied."""
        c, s = abs(frame.turn[0]), abs(frame.turn[1])
        x, z = c * half_x + s * half_z, s * half_x + c * half_z
        if abs(frame.x) + x > self.width / 2 - 0.02 or frame.z + z > self.depth - 0.02 or frame.z < z:
            return False
        rectangle = (frame.x - x - margin, frame.x + x + margin, frame.z - z - margin, frame.z + z + margin)
        if _overlaps(rectangle, self.floor_rectangles):
            return False
        self.floor_rectangles.append(rectangle)
        return True

    def _in_view(self, half_x: float, half_z: float, near: float, turn: tuple[float, float]) -> Frame | None:
        """Reserve a free position on the floor that the camera sees; None if there is none."""
        (cx, _, cz), (rx, _, rz), (fx, _, fz) = self.camera.position, self.camera.right, self.camera.forward
        for _ in range(10):
            ahead = self.dice.between(near, 0.75 * self.depth)
            aside = ahead * self.camera.half_width * self.dice.between(-0.8, 0.8)
            frame = Frame(cx + ahead * fx + aside * rx, cz + ahead * fz + aside * rz, turn)
            if self._free(frame, half_x, half_z):
                return frame
        return None

    # Things on and against the walls.

    def _doors_and_windows(self) -> None:
        """Add up to one door and two windows."""
        random = self.dice
        if random.chance(0.6):
            self._door()
        for _ in range(random.pick((0, 1, 1, 2))):
            self._window()

    def _door(self) -> None:
        """Add a door with its frame."""
        random = self.dice
        half, top = random.between(0.40, 0.47), random.between(1.98, 2.1)
        position = self._on_wall(half + 0.06, 0.0, top + 0.1)
        if position is None:
            return
        wall, along = position
        self._keep_clear(wall, along, half)
        self._begin(DOOR)
        leaf = random.colour(_PAINTS[:1]) if random.chance(0.5) else self.wood
        paint = Paint(Pattern.GRAIN, 0.6, leaf, scale_color(leaf, 0.75))
        rim = plain(scale_color(leaf, 0.8))
        for side in (-1, 1):
            self._box(wall, (along + side * (half + 0.03), top / 2, 0), (0.035, top / 2, 0.045), rim)
        self._box(wall, (along, top, 0), (half + 0.065, 0.035, 0.045), rim)
        self._box(wall, (along, top / 2, 0), (half, top / 2, 0.02), paint)
        inset = paint._replace(first=scale_color(leaf, 0.7), second=scale_color(leaf, 0.55))
        for middle, height in ((0.27 * top, 0.17 * top), (0.72 * top, 0.2 * top)):
            self._box(wall, (along, middle, 0), (0.65 * half, height, 0.03), inset)
        knob = (along + random.sign() * 0.82 * half, 1.0, 0.06)
        self._ellipsoid(wall, knob, (0.035, 0.035, 0.035), plain((0.55, 0.5, 0.35)))

    def _keep_clear(self, wall: Frame, along: float, half: float) -> None:
        """Reserve the floor in front of a door."""
        x, _, z = wall.world(along, 0, 0.4)
        c, s = abs(wall.turn[0]), abs(wall.turn[1])
        half_x, half_z = c * half + s * 0.4, s * half + c * 0.4
        self.floor_rectangles.append((x - half_x, x + half_x, z - half_z, z + half_z))

    def _window(self) -> None:
        """Add a window, through which daylight comes."""
        random = self.dice
        half, sill, top = random.between(0.45, 0.9), random.between(0.8, 1.0), random.between(1.95, 2.2)
        position = self._on_wall(half + 0.08, sill, top)
        if position is None:
            return
        wall, along = position
        self._begin(WINDOW)
        rim = plain(random.colour(_PAINTS[:1]) if random.chance(0.7) else self.wood)
        middle, height = (sill + top) / 2, (top - sill) / 2
        sky = random.colour(((0.62, 0.78, 0.95), (0.88, 0.92, 0.98), (0.95, 0.82, 0.70)))
        view = Paint(Pattern.LANDSCAPE, 2.2 * half, sky, random.colour(((0.35, 0.48, 0.28), (0.5, 0.5, 0.45))), 1.0)
        self._box(wall, (along, middle, 0), (half, height, 0.01), view)
        bars = (-1.0, 0.0, 1.0) if half < 0.65 else (-1.0, -0.33, 0.33, 1.0)
        for bar in bars:
            self._box(wall, (along + bar * half, middle, 0), (0.03, height, 0.035), rim)
        for bar in (-1.0, random.pick((0.0, 0.35)), 1.0):
            self._box(wall, (along, middle + bar * height, 0), (half + 0.03, 0.03, 0.035), rim)
        self._box(wall, (along, sill - 0.02, 0.03), (half + 0.08, 0.02, 0.09), rim)
        area = half * height
        self.daylight = Light(wall.world(along, middle, 0.5), (1.5 * area, 1.7 * area, 2.0 * area))

    def _pictures(self) -> None:
        """Hang up to three pictures."""
        random = self.dice
        for _ in range(random.pick((0, 1, 2, 3))):
            half, height = random.between(0.18, 0.5), random.between(0.18, 0.42)
            middle = random.between(1.45, 1.7)
            position = self._on_wall(half, middle - height, middle + height)
            if position is None:
                continue
            wall, along = position
            self._begin(PICTURE)
            rim, mount = plain(random.colour((*_PAINTS, *_WOODS))), plain(random.colour(_PAINTS[:1]))
            pattern = random.pick((Pattern.LANDSCAPE, Pattern.LANDSCAPE, Pattern.PLAIN, Pattern.CHECKER))
            canvas = Paint(pattern, 2 * max(half, height), random.colour(_FABRICS), random.colour(_FABRICS))
            self._box(wall, (along, middle, 0), (half, height, 0.025), rim)
            self._box(wall, (along, middle, 0), (half - 0.03, height - 0.03, 0.028), mount)
            self._box(wall, (along, middle, 0), (half - 0.07, height - 0.07, 0.03), canvas)

    def _against_the_walls(self) -> None:
        """Add cabinets, bookcases and sofas with their backs to a wall."""
        for _ in range(self.dice.pick((1, 2, 2, 3))):
            kind = self.dice.pick((self._cabinet, self._cabinet, self._bookcase, self._sofa))
            kind()

    def _along_a_wall(self, half_x: float, half_z: float, top: float) -> Frame | None:
        """Reserve a free position with its back to a wall; None if there is none."""
        for _ in range(6):
            face = self.dice.pick((0, 1, 5, 5))
            wall, length = self._wall(face)
            if half_x > length - 0.1:
                continue
            along = self.dice.between(half_x + 0.05 - length, length - half_x - 0.05)
            x, _, z = wall.world(along, 0, half_z + 0.03)
            frame, rectangle = Frame(x, z, wall.turn), (along - half_x, along + half_x, 0.0, top)
            if not _overlaps(rectangle, self.wall_rectangles[face]) and self._free(frame, half_x, half_z, 0.02):
                self.wall_rectangles[face].append(rectangle)
                return frame
        return None

    def _cabinet(self) -> None:
        """Add a body on a plinth with drawers or doors, sometimes with a lamp on it."""
        random = self.dice
        half_x, half_z, top = (
            random.between(0.4, 0.8),
            random.between(0.2, 0.28),
            random.pick((0.75, 0.9, 1.1, 1.9)),
        )
        frame = self._along_a_wall(half_x, half_z, top)
        if frame is None:
            return
        self._begin(CABINET)
        colour = self.wood if random.chance(0.5) else random.colour((*_PAINTS, *_WOODS))
        body = Paint(Pattern.GRAIN, 0.7, colour, scale_color(colour, 0.7))
        front = body._replace(first=scale_color(colour, 1.15), second=scale_color(colour, 0.9))
        knob = plain((0.6, 0.55, 0.4) if random.chance(0.5) else (0.05, 0.05, 0.05))
        self._box(frame, (0, top / 2 + 0.03, 0), (half_x, top / 2 - 0.03, half_z), body)
        self._box(frame, (0, top, 0), (half_x + 0.015, 0.015, half_z + 0.015), body)
        columns, rows = (2, 1) if random.chance(0.5) else (1, 3 if top < 1.5 else 5)
        cell_x, cell_y = half_x / columns, (top - 0.1) / (2 * rows)
        for column in range(columns):
            for row in range(rows):
                x, y = (2 * column + 1) * cell_x - half_x, 0.08 + (2 * row + 1) * cell_y
                self._box(frame, (x, y, half_z), (cell_x - 0.02, cell_y - 0.02, 0.015), front)
                side = (1 - 2 * column) * (cell_x - 0.08) if columns == 2 else 0
                self._ellipsoid(frame, (x + side, y, half_z + 0.03), (0.025, 0.025, 0.02), knob)
        if top < 1 and random.chance(0.4):
            self._table_lamp(frame._replace(y=top + 0.015))

    def _bookcase(self) -> None:
        """Add a bookcase."""
        random = self.dice
        half_x, half_z, shelves = random.between(0.4, 0.7), 0.16, random.pick((3, 5, 6))
        top = 0.3 * shelves + 0.1
        frame = self._along_a_wall(half_x, half_z, top)
        if frame is None:
            return
        self._begin(CABINET)
        colour = self.wood if random.chance(0.6) else random.colour((*_PAINTS, *_WOODS))
        body = Paint(Pattern.GRAIN, 0.7, colour, scale_color(colour, 0.7))
        books = Paint(Pattern.BOOKS, 1.2, random.colour(_FABRICS), scale_color(random.colour(_FABRICS), 0.35))
        self._box(frame, (0, top / 2, -0.04), (half_x - 0.02, top / 2 - 0.01, half_z - 0.06), books)
        for side in (-1, 1):
            self._box(frame, (side * half_x, top / 2, 0), (0.025, top / 2, half_z), body)
        for shelf in range(shelves + 1):
            self._box(frame, (0, 0.06 + 0.3 * shelf, 0), (half_x, 0.018, half_z), body)

    def _sofa(self) -> None:
        """Add a sofa."""
        random = self.dice
        half_x, half_z = random.between(0.75, 1.1), 0.42
        frame = self._along_a_wall(half_x, half_z, 0.85)
        if frame is None:
            return
        self._begin(SOFA)
        colour = random.colour(_FABRICS)
        cover = Paint(Pattern.WEAVE, 0.5, colour, scale_color(colour, 0.7))
        seat = cover._replace(first=scale_color(colour, 1.2))
        self._box(frame, (0, 0.19, 0), (half_x, 0.13, half_z), cover)
        self._box(frame, (0, 0.47, -half_z + 0.12), (half_x, 0.36, 0.12), cover)
        for side in (-1, 1):
            self._box(frame, (side * (half_x - 0.09), 0.34, 0.02), (0.09, 0.26, half_z), cover)
            quarter = (half_x - 0.18) / 2
            self._box(frame, (side * quarter, 0.38, 0.11), (quarter - 0.01, 0.07, half_z - 0.1), seat)
        if random.chance(0.6):
            centre = (random.sign() * (half_x - 0.42), 0.6, -0.12)
            self._ellipsoid(frame, centre, (0.22, 0.2, 0.09), self._cloth(Pattern.STRIPES, 0.3))

    # Things in the room.

    def _in_the_room(self) -> None:
        """Add free-standing furniture and balls."""
        random = self.dice
        if random.chance(0.4):
            self._mat()
        if random.chance(0.7):
            self._table()
        for _ in range(random.pick((0, 0, 1, 1))):
            self._chair_in_the_room(occupied=False)
        if random.chance(0.4):
            self._floor_lamp()
        for _ in range(random.pick((0, 0, 1, 1, 2))):
            self._ball()

    def _cloth(self, pattern: Pattern, tile: float) -> Paint:
        """Return a paint of two fabric colours."""
        return Paint(pattern, tile, self.dice.colour(_FABRICS), self.dice.colour(_FABRICS))

    def _mat(self) -> None:
        """Add a rug, about the middle of the room: things may stand on it."""
        random = self.dice
        half_x, half_z = random.between(0.8, 1.3), random.between(0.6, 0.9)
        frame = Frame(self.width * random.between(-0.12, 0.12), self.depth * random.between(0.45, 0.65), rotation(0.0))
        cloth = self._cloth(random.pick((Pattern.DIAMONDS, Pattern.STRIPES, Pattern.CHECKER, Pattern.PLAIN)), 1.0)
        self._begin(MAT)
        self._box(frame, (0, 0.004, 0), (half_x, 0.004, half_z), plain(cloth.second))
        self._box(frame, (0, 0.0045, 0), (half_x - 0.1, 0.0045, half_z - 0.1), cloth)

    def _table(self) -> None:
        """Add a table, sometimes with a lamp or a ball on it and chairs around it."""
        random = self.dice
        half_x, half_z, top = random.between(0.5, 0.85), random.between(0.35, 0.5), random.pick((0.44, 0.73, 0.75))
        frame = self._in_view(half_x, half_z, 2.0, rotation(random.between(-0.25, 0.25)))
        if frame is None:
            return
        self._begin(TABLE)
        colour = self.wood if random.chance(0.5) else random.colour((*_PAINTS, *_WOODS))
        paint = Paint(Pattern.GRAIN, 0.8, colour, scale_color(colour, 0.65))
        self._box(frame, (0, top - 0.02, 0), (half_x, 0.02, half_z), paint)
        self._box(frame, (0, top - 0.08, 0), (half_x - 0.06, 0.04, half_z - 0.06), paint)
        for x in (-1, 1):
            for z in (-1, 1):
                foot = (x * (half_x - 0.06), top / 2 - 0.02, z * (half_z - 0.06))
                self._box(frame, foot, (0.03, top / 2 - 0.02, 0.03), paint)
        aside, back = random.between(-0.5, 0.5) * half_x, random.between(-0.4, 0.4) * half_z
        if random.chance(0.3):
            self._table_lamp(frame._replace(x=frame.x + aside, z=frame.z + back, y=top))
        elif random.chance(0.4):
            radius = random.between(0.07, 0.13)
            self._begin(BALL)
            self._ellipsoid(
                frame,
                (aside, top + radius, back),
                (radius, radius, radius),
                self._cloth(Pattern.STRIPES, radius * 3),
            )
        side = random.sign()
        for share in (-0.5, 0.5):
            seat = frame.world(share * half_x, 0, side * (half_z + 0.3))
            c, s = frame.turn
            chair = Frame(seat[0], seat[2], (-side * c, -side * s))
            if top > 0.5 and random.chance(0.6) and self._free(chair, 0.22, 0.22, 0.0):
                self._chair(chair, occupied=False)

    def _chair_in_the_room(self, occupied: bool) -> None:
        """Add a chair, with or without a person on it."""
        frame = self._in_view(0.3, 0.6 if occupied else 0.3, 1.9, self._facing_about())
        if frame is not None:
            self._chair(frame, occupied)

    def _facing_about(self) -> tuple[float, float]:
        """Draw a direction that more often than not shows a front to the camera."""
        c, s = rotation(self.dice.between(-0.9, 0.9))
        return (-c, s) if self.dice.chance(0.75) else (c, s)

    def _chair(self, frame: Frame, occupied: bool) -> None:
        """Add a chair, with or without a person on it, at a frame."""
        random = self.dice
        self._begin(CHAIR)
        colour = self.wood if random.chance(0.5) else random.colour((*_PAINTS, *_FABRICS))
        paint = Paint(Pattern.GRAIN, 0.6, colour, scale_color(colour, 0.7))
        self._box(frame, (0, 0.44, 0), (0.21, 0.02, 0.21), paint)
        for x in (-0.185, 0.185):
            self._box(frame, (x, 0.21, 0.185), (0.02, 0.21, 0.02), paint)
            self._box(frame, (x, 0.46, -0.19), (0.02, 0.46, 0.02), paint)
        for y, height in ((0.84, 0.07), (0.65, 0.04)):
            self._box(frame, (0, y, -0.19), (0.17, height, 0.012), paint)
        if occupied:
            self._person(frame, *self._pose(sitting=True), seat=0.46)

    def _floor_lamp(self) -> None:
        """Add a floor lamp."""
        frame = self._in_view(0.2, 0.2, 2.2, (1.0, 0.0))
        if frame is None:
            return
        random = self.dice
        self._begin(LAMP)
        metal, top = plain(random.colour(_PAINTS[:3])), random.between(1.35, 1.65)
        self._ellipsoid(frame, (0, 0.0, 0), (0.17, 0.04, 0.17), metal)
        self._capsule(frame, (0, 0.02, 0), (0, top, 0), 0.018, metal)
        self._shade(frame, top, random.between(0.14, 0.2))

    def _table_lamp(self, frame: Frame) -> None:
        """Add a table lamp."""
        self._begin(LAMP)
        body = plain(self.dice.colour(_FABRICS))
        self._ellipsoid(frame, (0, 0.11, 0), (0.075, 0.11, 0.075), body)
        self._capsule(frame, (0, 0.2, 0), (0, 0.3, 0), 0.015, body)
        self._shade(frame, 0.36, 0.13)

    def _shade(self, frame: Frame, middle: float, radius: float) -> None:
        """Add a lamp shade."""
        random = self.dice
        paint = glowing(
            random.colour(((1.0, 0.93, 0.75), (0.95, 0.85, 0.6), (0.9, 0.6, 0.4))), random.pick((0.25, 0.9))
        )
        if random.chance(0.5):
            self._ellipsoid(frame, (0, middle, 0), (radius, 0.8 * radius, radius), paint)
        else:
            self._box(frame, (0, middle, 0), (radius, 0.75 * radius, radius), paint)

    def _ball(self) -> None:
        """Add a ball."""
        radius = self.dice.between(0.1, 0.28)
        frame = self._in_view(radius, radius, 1.6, rotation(self.dice.between(-1, 1)))
        if frame is None:
            return
        self._begin(BALL)
        pattern = self.dice.pick((Pattern.STRIPES, Pattern.CHECKER, Pattern.PLAIN, Pattern.DIAMONDS))
        self._ellipsoid(frame, (0, radius, 0), (radius, radius, radius), self._cloth(pattern, 3 * radius))

    # People.

    def _standing_person(self) -> None:
        """Add a standing person."""
        arms, legs = self._pose(sitting=False)
        reach = 0.3 + 0.35 * max(_direction(upper)[0] + _direction(lower)[0] for upper, lower in arms)
        frame = self._in_view(max(reach, 0.32), 0.35, 1.9, self._facing_about())
        if frame is not None:
            self._person(frame, arms, legs, seat=None)

    def _person(self, frame: Frame, arms: list[Limb], legs: list[Limb], seat: float | None) -> None:
        """Add a jointed figure that faces the frame's front: upright, or sitting at the height ``seat``.

        Sizes are of an adult of 1.75 m and scale with the figure.
        """
        random = self.dice
        size = random.between(0.92, 1.06) if seat is not None or random.chance(0.8) else random.between(0.62, 0.85)
        skin = plain(random.colour(_SKINS, 0.03), 0.9)
        hair = plain(random.colour(_HAIRS, 0.03), 0.6, 0.3)
        shirt = self._cloth(random.pick((Pattern.PLAIN, Pattern.PLAIN, Pattern.WEAVE, Pattern.STRIPES_ACROSS)), 0.8)
        if shirt.pattern in (Pattern.PLAIN, Pattern.WEAVE):
            shirt = shirt._replace(second=scale_color(shirt.first, 0.65))
        trousers = plain(random.colour(_TROUSERS), 0.7)
        shoes = plain(random.colour(_PAINTS), 0.8)
        sleeve, leg = (skin if random.chance(0.5) else shirt), (skin if random.chance(0.2) else trousers)
        self._begin(PERSON)

        def ball(centre: Vector, half: Vector, paint: Paint, part: int) -> None:
            scaled = (half[0] * size, half[1] * size, half[2] * size)
            self._ellipsoid(frame, centre, scaled, paint, part)

        def rod(start: Vector, end: Vector, radius: float, paint: Paint, part: int) -> None:
            self._capsule(frame, start, end, radius * size, paint, part)

        def up(x: float, y: float, z: float) -> Vector:
            return x * size, hip + y * size, z * size

        drops = [0.42 * -_direction(upper)[1] + 0.40 * -_direction(lower)[1] for upper, lower in legs]
        hip = size * (max(drops) + 0.075) if seat is None else seat + 0.09 * size

        # Torso: two thick capsules side by side, closed by the shoulders above and the pelvis below.
        for side in (-1, 1):
            rod(up(side * 0.07, 0.06, 0), up(side * 0.095, 0.43, 0), 0.10, shirt, TORSO)
        rod(up(-0.145, 0.485, 0), up(0.145, 0.485, 0), 0.062, shirt, TORSO)
        rod(up(-0.07, 0.02, 0), up(0.07, 0.02, 0), 0.105, trousers, TORSO)
        rod(up(0, 0.5, 0), up(0, 0.62, 0.01), 0.052, skin, TORSO)
        child = 1.0 if size > 0.9 else 1.2  # a child's head is large for its size
        ball(up(0, 0.60 + 0.11 * child, 0.02), (0.078 * child, 0.112 * child, 0.095 * child), skin, HEAD)
        ball(up(0, 0.60 + 0.15 * child, -0.012), (0.088 * child, 0.090 * child, 0.098 * child), hair, HEAD)
        for side in (-1, 1):
            eye = up(side * 0.03 * child, 0.60 + 0.12 * child, 0.02 + 0.088 * child)
            ball(eye, (0.014, 0.012, 0.012), plain((0.02, 0.02, 0.02)), HEAD)
        if random.chance(0.35):  # long hair
            ball(up(0, 0.60 + 0.03 * child, -0.055), (0.095 * child, 0.16 * child, 0.06 * child), hair, HEAD)

        for side, (upper, lower) in zip((-1, 1), arms):
            shoulder = up(side * 0.185, 0.475, 0)
            elbow = _along(shoulder, _direction(upper, side), 0.27 * size)
            wrist = _along(elbow, _direction(lower, side), 0.25 * size)
            hand = _along(wrist, _direction(lower, side), 0.05 * size)
            rod(shoulder, elbow, 0.05, shirt, UPPER_ARM)
            rod(elbow, wrist, 0.038, sleeve, LOWER_ARM)
            ball(hand, (0.045, 0.06, 0.045), skin, LOWER_ARM)
        for side, (upper, lower) in zip((-1, 1), legs):
            joint = up(side * 0.095, 0, 0)
            knee = _along(joint, _direction(upper, side), 0.42 * size)
            ankle = _along(knee, _direction(lower, side), 0.40 * size)
            rod(joint, knee, 0.078, trousers, UPPER_LEG)
            rod(knee, ankle, 0.052, leg, LOWER_LEG)
            toe = _along(ankle, (0.15 * side, -0.1, 0.95), 0.15 * size)
            rod(_along(ankle, (0, -1, 0), 0.03 * size), toe, 0.045, shoes, LOWER_LEG)

    def _pose(self, sitting: bool) -> tuple[list[Limb], list[Limb]]:
        """Draw the left and the right arm, the left and the right leg."""
        random = self.dice
        hanging = [((random.between(-0.1, 0.15), 0.1), (random.between(0.0, 0.3), 0.06)) for _ in range(2)]
        if sitting:
            legs = [((0.84, random.between(0.03, 0.14)), (random.between(-0.1, 0.15), 0.0)) for _ in range(2)]
            lap = [((0.25, 0.08), (random.between(0.6, 0.9), -0.08)) for _ in range(2)]
            return (lap if random.chance(0.7) else hanging), legs

        legs = [((0.0, random.between(0.03, 0.1)), (-0.02, 0.02)) for _ in range(2)]
        arms = hanging
        kind = random.pick(("stand", "stand", "walk", "walk", "wave", "raise", "akimbo", "spread"))
        if kind == "walk":
            stride = random.sign() * random.between(0.16, 0.27)
            legs = [((stride, 0.02), (min(stride, 0.0) + 0.1 * stride, 0.0))]
            legs.append(((-stride, 0.02), (min(-stride, 0.0) - 0.1 * stride, 0.0)))
            arms = [((-stride, 0.07), (0.3 - stride, 0.03)), ((stride, 0.07), (0.3 + stride, 0.03))]
        elif kind == "wave":
            arms[random.pick((0, 1))] = ((0.1, random.between(0.8, 1.3)), (0.1, random.between(3, 8)))
        elif kind == "raise":
            arms = [((0.1, random.between(1.8, 3.5)), (0.1, random.between(3, 9))) for _ in range(2)]
        elif kind == "akimbo":
            arms = [((-0.1, 0.42), (0.15, -0.36)) for _ in range(2)]
        elif kind == "spread":
            arms = [((0.05, random.between(0.6, 1.1)), (0.05, random.between(0.7, 1.1))) for _ in range(2)]
        return arms, legs


def _overlaps(rectangle: tuple[float, ...], others: Sequence[tuple[float, ...]]) -> bool:
    """Return whether a rectangle (low, high, low, high) overlaps any of the others."""
    a, b, c, d = rectangle
    return any(a < other[1] and other[0] < b and c < other[3] and other[2] < d for other in others)


def _direction(bend: Bend, side: int = 1) -> Vector:
    """Return the unit vector of a limb, in the frame of its person."""
    (cw, sw), (cp, sp) = rotation(bend[0]), rotation(bend[1])
    return side * sp * cw, -cp * cw, sw


def _along(start: Vector, direction: Vector, length: float) -> Vector:
    """Move a point along a direction."""
    return (
        start[0] + direction[0] * length,
        start[1] + direction[1] * length,
        start[2] + direction[2] * length,
    )

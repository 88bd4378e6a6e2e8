"""Verdicts on the measurements."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from mtcl.data.datasets.base import IMAGE
from mtcl.data.verify import align
from mtcl.data.verify.facts import DatasetFacts
from mtcl.data.verify.measure import DEPTH_EDGES, DISTINCT, Measurements
from mtcl.data.verify.table import Row, Verdict, worst_verdict
from mtcl.tasks import HUMAN_PARTS

VOID = 255
# Total variation distances of class shares, measured on the small edition: training against validation list 0.05,
# random halves of the training list at most 0.09, any 400 images against the known shares at most 0.11, the training
# list moved by one class 0.29 (to larger ids) and 0.23 (to smaller ones, where the first class is lost in void).
MAX_DISTANCE = 0.15
MIN_IMAGES_FOR_SHARES = 400  # images from which that holds; 100 neighbours of a list reach 0.34
# By how much moving labels by one class may seem to correct them: true ones reached 0.07 with 5 images, 0.03 with 16.
MARGINS = ((16, 0.05), (5, 0.1))  # (images, margin)
# Images (of floors: that show some) from which the means of normals say anything: of 20,000 draws of so many of the
# small edition's 1,295 none was beyond these limits; of 2 images 0.9 % (floors) and 2.6 % (side walls) were.
MIN_IMAGES_FOR_AXES = 12
FACING = 0.1  # mean z of normals; 0.53 in the small edition, about 0 where axes are exchanged
INWARDS = 0.03  # how much larger x is on the right than in the middle; 0.19 in the small edition
MANY = 50  # images whose labels must show some agreement with them


def reading_rows(measured: Measurements, kinds: Sequence[str]) -> list[Row]:
    """Return rows on whether every file could be decoded."""
    rows = []
    for kind in kinds:
        failed, good = measured.failed[kind], sum(measured.sizes.get(kind, Counter()).values())
        text = f"{good}" if not failed else f"{good}, damaged {failed}"
        verdict: Verdict = "damage" if failed else "ok"
        rows.append(Row(f"decoded {kind}", text, "all", verdict, tuple(measured.errors.get(kind, ()))))
    return rows


def size_rows(measured: Measurements, facts: DatasetFacts, tasks: Sequence[str]) -> list[Row]:
    """Return rows on the sizes of images and labels, and on images that show nothing."""
    sizes = measured.sizes.get(IMAGE, Counter())
    if facts.sizes:
        good = set(sizes) <= facts.sizes
        expected = " or ".join(f"{h}x{w}" for h, w in sorted(facts.sizes)) + " (height x width)"
    else:
        good = all(max(size) == facts.longest for size in sizes)
        expected = f"longer side {facts.longest}"
    listed = ", ".join(f"{h}x{w} ({n})" for (h, w), n in sizes.most_common(2))
    text = listed if len(sizes) < 3 else f"{len(sizes)} sizes: {listed}, ..."
    rows = [Row("image sizes", text, expected, "ok" if good else "deviation")]
    resampled = {task: int(measured.number(f"{task} resampled")) for task in tasks}
    some = ", ".join(f"{task} {count} differ" for task, count in resampled.items() if count)
    rows.append(Row("label sizes", some or "as the images", "as the images", "deviation" if some else "ok"))
    blank = int(measured.number("image blank"))
    rows.append(Row("images of one colour", str(blank), "0", "deviation" if blank else "ok"))
    return rows


def value_rows(measured: Measurements, facts: DatasetFacts, tasks: Sequence[str]) -> list[Row]:
    """Return rows on the ranges and shares of each task's values."""
    rows = []
    for task in tasks:
        if not measured.number(f"{task} images"):
            continue  # nothing could be read
        match task:
            case "semseg":
                rows += _semseg_rows(measured, facts)
            case "human_parts":
                rows += _part_rows(measured)
            case "sal":
                rows.append(_share_row(measured, "sal", "salient", 0.02, 0.6))
            case "edge":
                rows.append(_share_row(measured, "edge", "edge", 0.005, 0.2))
            case "depth":
                rows += _inverse_depth_rows(measured) if facts.inverse_depth else _depth_rows(measured)
            case "normals":
                rows += _normals_rows(measured, facts)
        void = int(measured.number(f"{task} void images"))
        if task != "human_parts" and void:
            rows.append(Row(f"{task} without labels", f"{void} images", "0", "deviation"))
    return rows


def alignment_rows(measured: Measurements, tasks: Sequence[str], subsets: Sequence[str]) -> list[Row]:
    """Return rows on whether labels fit their images, and not the mirror images, for each list by itself."""
    rows = []
    for task in tasks:
        pairs = [(subset, align.fit(measured.matches.get((task, subset), []))) for subset in subsets]
        fits = [(subset, fit) for subset, fit in pairs if fit is not None]
        if not fits:
            rows.append(Row(f"{task} on image", "too few images", "shift 0", "deviation"))
            continue
        where = ", ".join(
            f"{subset} ({fit.shift[0]:+d}, {fit.shift[1]:+d})" if fit.clear else f"{subset} unclear"
            for subset, fit in fits
        )
        verdict = worst_verdict(*(_shift_verdict(fit) for _, fit in fits))
        details = tuple(text for subset, fit in fits if (text := _shift_detail(task, subset, fit)))
        rows.append(Row(f"{task} on image", where, f"shift up to {align.NEAR} (down, right)", verdict, details))
        sides = ", ".join(f"{subset} {fit.correlation:.2f} / {fit.mirrored:.2f}" for subset, fit in fits)
        verdict = worst_verdict(*(_side_verdict(fit) for _, fit in fits))
        details = tuple(text for subset, fit in fits if (text := _side_detail(task, subset, fit)))
        rows.append(Row(f"{task} left and right", sides, "as it is > mirrored", verdict, details))
    return rows


def shares(measured: Measurements, classes: int, subsets: Sequence[str] = ("train", "val")) -> np.ndarray:
    """Return the share of each class among the semseg labels' pixels that are not void, float64 (classes,)."""
    counts = measured.values("semseg", subsets)[:classes]
    return counts / max(counts.sum(), 1)


def distance(first: np.ndarray, second: np.ndarray) -> float:
    """Return the total variation distance of two vectors of shares, each divided by its sum: 0 to 1."""
    shares = [values / max(values.sum(), 1e-12) for values in (first, second)]
    return float(np.abs(shares[0] - shares[1]).sum() / 2)


def _semseg_rows(measured: Measurements, facts: DatasetFacts) -> list[Row]:
    """Return rows on classes, void and frequencies."""
    class_shares = shares(measured, len(facts.classes))
    absent = [name for name, share in zip(facts.classes, class_shares) if share == 0]
    total = measured.values("semseg")
    names = ", ".join(absent[:3]) + (f" and {len(absent) - 3} more" if len(absent) > 3 else "")
    number = len(facts.classes) - len(absent)
    rows = [
        Row(
            "semseg classes",
            f"{number} occur; without {names}" if absent else f"{number} occur",
            f"all {len(facts.classes)}",
            "deviation" if absent else "ok",
        ),
        _below("semseg void", float(total[VOID] / max(total.sum(), 1)), 0.4),
    ]
    if facts.shares:
        rows.append(_frequency_row(class_shares, facts, int(measured.number("semseg images"))))
    if facts.most:
        order = np.argsort(-class_shares)
        first, second = (facts.classes[i] for i in order[:2])
        good = (first, second) == facts.most
        # The class of most objects need not fill most pixels of a small sample.
        few = measured.number("semseg images") < MIN_IMAGES_FOR_AXES
        verdict: Verdict = "ok" if good else "deviation" if first == facts.most[0] or few else "damage"
        most = f"{first} {class_shares[order[0]]:.0%}, {second} {class_shares[order[1]]:.1%}"
        details = (f"{measured.number('semseg images'):.0f} images are too few to tell",) if few and not good else ()
        rows.append(Row("semseg most frequent", most, f"{facts.most[0]}, then {facts.most[1]}", verdict, details))
    return rows


def _frequency_row(class_shares: np.ndarray, facts: DatasetFacts, num_images: int) -> Row:
    """Compare class shares with known ones, also as if the labels were one class too large or too small."""
    known_shares = np.array(facts.shares)
    count = len(known_shares)  # the known shares may lack the last class
    as_is = distance(class_shares[:count], known_shares)
    larger = distance(class_shares[: count + 1], np.append(0, known_shares))
    smaller = distance(class_shares[: count - 1], known_shares[1:])  # the first class is void then
    text = f"distance {as_is:.2f}; if moved by one class {min(larger, smaller):.2f}"
    expected = f"below {MAX_DISTANCE}, and below moved"
    margin = next((margin for least, margin in MARGINS if num_images >= least), 1.0)
    if min(larger, smaller) < as_is - margin:
        detail = (
            f"semseg classes look one too {'large' if larger < smaller else 'small'} (in files 0 is void, "
            f"1 {facts.classes[0]})."
        )
        return Row("semseg frequencies", text, expected, "damage", (detail,))
    if as_is < MAX_DISTANCE:
        return Row("semseg frequencies", text, expected)
    if num_images >= MIN_IMAGES_FOR_SHARES:
        detail = f"semseg classes are not as frequent as in {facts.title}: other classes, or another order."
        return Row("semseg frequencies", text, expected, "damage", (detail,))
    detail = (
        f"{num_images} images are too few to tell "
        f"(from {MIN_IMAGES_FOR_SHARES} on the distance is below {MAX_DISTANCE})"
    )
    return Row("semseg frequencies", text, expected, "deviation", (detail,))


def _part_rows(measured: Measurements) -> list[Row]:
    """Return rows on human parts."""
    counts = measured.values("human_parts")
    counts_by_part = counts[: len(HUMAN_PARTS)]
    absent = [name for name, count in zip(HUMAN_PARTS, counts_by_part) if count == 0]
    with_parts = measured.number("human_parts foreground images") / measured.number("human_parts images")
    covered = float(counts_by_part[1:].sum() / max(counts_by_part.sum(), 1))
    occur = f"without {', '.join(absent)}" if absent else f"all {len(HUMAN_PARTS)}"
    return [
        Row("human_parts classes", occur, f"all {len(HUMAN_PARTS)}", "deviation" if absent else "ok"),
        _between("human_parts images", with_parts, 0.1, 0.9, "with parts"),
        _between("human_parts pixels", covered, 0.01, 0.6, "of images with parts"),
    ]


def _share_row(measured: Measurements, task: str, noun: str, low: float, high: float) -> Row:
    """Return a row on the share of foreground pixels."""
    counts = measured.values(task)
    return _between(f"{task} pixels", float(counts[1] / max(counts[:2].sum(), 1)), low, high, noun)


def _depth_quantiles(measured: Measurements) -> tuple[float, float, float]:
    """Return the bounds of the bins that 1 %, half and 99 % of the valid pixels are below."""
    cumulated = np.cumsum(measured.vector("depth histogram", len(DEPTH_EDGES) + 1))
    bounds = np.append(DEPTH_EDGES, np.inf)
    low, middle, high = (
        float(bounds[np.searchsorted(cumulated, q * max(cumulated[-1], 1))]) for q in (0.01, 0.5, 0.99)
    )
    return low, middle, high


def _depth_void_row(measured: Measurements) -> Row:
    """Return a row on the share of pixels without depth."""
    histogram = measured.vector("depth histogram", len(DEPTH_EDGES) + 1)
    return _below("depth void", 1 - float(histogram.sum()) / max(measured.number("depth pixels"), 1), 0.4)


def _inverse_depth_rows(measured: Measurements) -> list[Row]:
    """Return rows on the range and the void of inverse depth."""
    low, middle, high = _depth_quantiles(measured)
    good = high <= 1.03  # the upper bound of the bin that 1 lies in
    details = (f"inverse depth must be from 0 to 1; 99 % of the pixels reach {high:.3g}.",)
    text = f"1 % {low:.3g}, half {middle:.3g}, 99 % {high:.3g}"
    verdict: Verdict = "ok" if good else "damage"
    return [
        Row("depth inverse", text, "from 0 to 1", verdict, () if good else details),
        _depth_void_row(measured),
    ]


def _depth_rows(measured: Measurements) -> list[Row]:
    """Return rows on the unit, the levels and the void of depth."""
    histogram = measured.vector("depth histogram", len(DEPTH_EDGES) + 1)
    count = max(histogram.sum(), 1)
    low, middle, high = _depth_quantiles(measured)
    beyond = float(histogram[np.searchsorted(DEPTH_EDGES, 10.2) + 1 :].sum() / count)
    good = beyond <= 0.01 and 0.5 <= middle <= 8
    details = (f"depth must be metres from the camera; half of the pixels are beyond {middle:.3g}.",)
    number = len(measured.levels)
    return [
        Row(
            "depth metres",
            f"1 % {low:.3g}, half {middle:.3g}, 99 % {high:.3g}; {beyond:.1%} > 10",
            "within 10, half 0.5 to 8",
            "ok" if good else "damage",
            () if good else details,
        ),
        Row(
            "depth levels",
            str(number) if number < DISTINCT else f"{DISTINCT} or more",
            f"{DISTINCT} or more",
            "deviation" if number < DISTINCT else "ok",
            (f"depth has only {number} levels: an 8-bit source",) if number < DISTINCT else (),
        ),
        _depth_void_row(measured),
    ]


def _normals_rows(measured: Measurements, facts: DatasetFacts) -> list[Row]:
    """Return rows on the lengths and axes of normals."""
    pixels = max(measured.number("normals pixels"), 1)
    stored = max(pixels - measured.number("normals zero"), 1)
    units = measured.number("normals units") / max(measured.number("normals long"), 1)
    void = f"{measured.number('normals zero') / pixels:.1%} zero, {measured.number('normals short') / stored:.1%} short"
    num_vectors = max(stored - measured.number("normals short"), 1)
    mean = measured.vector("normals vectors", 3) / num_vectors
    rows = [
        Row("normals length", f"{units:.1%} from 0.95 to 1.05", "at least 90 %", "ok" if units >= 0.9 else "deviation"),
        Row("normals void", void, "short (below 0.5) at most 40 %"),
        _axis_row(
            "normals to the viewer",
            f"mean z {mean[2]:+.2f}",
            f"z > {FACING}",
            bool(mean[2] > FACING),
            _points_along_another_axis(mean, 2),
            int(measured.number("normals images")),
            "z to the viewer",
        ),
    ]
    if measured.number("normals short") > 0.4 * stored:
        rows[1] = Row(rows[1].check, void, rows[1].expected, "deviation")
    if not facts.known_axes:
        return rows[:2]
    if floor := measured.number("normals floor pixels"):
        up = measured.vector("normals floor vectors", 3) / floor
        text = f"mean ({up[0]:+.2f}, {up[1]:+.2f}, {up[2]:+.2f})"
        count = int(measured.number("normals floor images"))
        rows.append(
            _axis_row(
                "normals of floors",
                text,
                "y > 0.5",
                bool(up[1] > 0.5),
                _points_along_another_axis(up, 1),
                count,
                "y up",
            )
        )
    if facts.indoors:
        side = measured.number("normals outwards") / num_vectors
        text = f"x {side:+.3f} more on the right"
        count = int(measured.number("normals images"))
        expected = f"x > {INWARDS}: facing inwards"
        rows.append(
            _axis_row("normals of side walls", text, expected, side > INWARDS, side < 0, count, "x to the left")
        )
    return rows


def _axis_row(check: str, value: str, expected: str, good: bool, other: bool, num_images: int, axis: str) -> Row:
    """Return a row on an axis of the normals.

    Args:
        check: name of the check.
        value: measured value.
        expected: expected value.
        good: whether the axis is as expected.
        other: whether another axis fits better than the expected one; only that is damage.
        num_images: number of measured images.
        axis: description of the expected axis.
    """
    if good:
        return Row(check, value, expected)
    if num_images < MIN_IMAGES_FOR_AXES:
        detail = (
            f"too few to tell: {num_images} of the {MIN_IMAGES_FOR_AXES} images from which on it must be {expected}"
        )
        return Row(check, value, expected, "deviation", (detail,))
    if not other:
        return Row(check, value, expected, "deviation", ("unusual, but no other axis fits better",))
    detail = f"normals have other axes, or codes: in mtcl {axis}, with codes 2 v / 255 - 1."
    return Row(check, value, expected, "damage", (detail,))


def _points_along_another_axis(mean: np.ndarray, axis: int) -> bool:
    """Return whether a mean vector points more along another axis, or against this one, than along this one."""
    others = np.delete(np.abs(mean), axis)
    return bool(max(*others, -mean[axis]) > mean[axis])


def _shift_verdict(fit: align.Fit) -> Verdict:
    """Judge the shift of a list's labels."""
    if fit.clear:
        return "damage" if fit.displaced else "ok"
    # A smooth label may have no sharp peak and still belong to its image; then its mirror image fits worse.
    return "damage" if fit.count >= MANY and fit.sided < align.APART else "deviation"


def _shift_detail(task: str, subset: str, fit: align.Fit) -> str:
    """Describe a wrong or unclear shift; empty if there is none."""
    if fit.clear and fit.displaced:
        down, right = fit.shift
        return (
            f"{task} of {subset} lies {down:+d} pixels down and {right:+d} right of where its images show it (with a "
            f"longer side of {align.LONGEST}, or less if they are smaller)."
        )
    if not fit.clear:
        return f"{task} of {subset} shows no clear agreement with its {fit.count} images: labels of other ones?"
    return ""


def _side_verdict(fit: align.Fit) -> Verdict:
    """Judge whether labels are mirrored."""
    if abs(fit.sided) < align.APART:
        return "deviation"
    return "ok" if fit.sided > 0 else "damage"


def _side_detail(task: str, subset: str, fit: align.Fit) -> str:
    """Describe mirrored labels; empty if they are not."""
    if abs(fit.sided) < align.APART:
        return f"{task} of {subset} fits its {fit.count} images no better than mirrored: no clear answer"
    return "" if fit.sided > 0 else f"{task} of {subset} is mirrored: it fits its images better turned left to right."


def _below(check: str, share: float, limit: float) -> Row:
    """Return a row on a share with an upper limit."""
    return Row(check, f"{share:.1%}", f"at most {limit:.0%}", "ok" if share <= limit else "deviation")


def _between(check: str, share: float, low: float, high: float, noun: str) -> Row:
    """Return a row on a share with two limits."""
    good = low <= share <= high
    return Row(check, f"{share:.1%} {noun}", f"{low:.1%} to {high:.0%}", "ok" if good else "deviation")

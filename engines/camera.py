"""Is a picture usable: what those that were learned look like, and what is wrong with another.

A picture becomes a few numbers (`measure`). Training keeps how they lie (`Learned`) and the mean
picture; from these come limits that hardly any picture of the same camera, lamp and part exceeds.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist
from typing import Any, Literal, NamedTuple, get_args

import cv2
import numpy as np
from numpy.typing import NDArray

Code = Literal[
    "camera_size", "camera_turned", "camera_shifted", "camera_dark", "camera_bright",
    "camera_blurred", "camera_frozen",
]  # fmt: skip

SIDE = 32  # pixels of the small picture that is laid over the mean one
STEP = 10  # degrees from one turned mean picture to the next
LEAST = 8  # pictures; how fewer of them lie says too little
FEW = 5  # pictures in a row whose middle may stray less than a single one
SURE = NormalDist().inv_cdf(1 - 0.00005)  # one picture in 10,000 lies beyond a limit ...
SURE_OF_FEW = NormalDist().inv_cdf(1 - 0.0002)  # ... and one middle of a few in 2,500
OF_MIDDLE = 0.29  # variance of the median of five numbers, in that of one (normal distribution)
ONE_IN = 200  # pictures of a training may be far off and not count
FAR = 8.0  # spreads that such a one is off at least
BAND = 16  # rows that are looked at together for sharpness
BANDS = 16  # of them at most, spread over the picture
COARSE = 8  # pixels: over these even a blurred picture changes
NEAR = 45  # degrees: what is turned by more is not upright
DARKEST = 0.02  # contrast of a picture that shows nothing: nothing to lay over another


class Statistic(NamedTuple):
    """A number that is measured of each picture.

    Attributes:
        floor: the least spread that is reckoned with, however alike the training pictures are.
        below, above: what a picture is called that lies beyond the limit; None: nothing.
        steady: spreads that the middle of a few pictures may stray at least.
        most: a limit that is farther than this from the mean sees nothing.
        words: what it is called, and how a value is written.
    """

    floor: float
    below: Code | None
    above: Code | None
    steady: float
    most: float
    words: str
    form: str


STATISTICS: dict[str, Statistic] = {
    "brightness": Statistic(
        0.01, "camera_dark", "camera_bright", 3.0, math.inf, "brightness", "{:.2f}"
    ),
    "contrast": Statistic(0.01, None, None, 3.0, math.inf, "contrast", "{:.2f}"),
    "sharpness": Statistic(0.1, "camera_blurred", None, 3.0, math.inf, "sharpness", "{:.2f}"),
    "red": Statistic(0.005, None, None, 3.0, math.inf, "colour (red)", "{:+.3f}"),
    "blue": Statistic(0.005, None, None, 3.0, math.inf, "colour (blue)", "{:+.3f}"),
    "shift_x": Statistic(
        0.01, "camera_shifted", "camera_shifted", 2.0, 0.35, "shift to the right", "{:.1%}"
    ),
    "shift_y": Statistic(
        0.01, "camera_shifted", "camera_shifted", 2.0, 0.35, "shift downwards", "{:.1%}"
    ),
    "turn": Statistic(3.0, "camera_turned", "camera_turned", 2.0, NEAR, "turn", "{:.0f}°"),
    "sideways": Statistic(
        0.01, "camera_turned", None, math.inf, math.inf, "likeness upright, not sideways", "{:+.2f}"
    ),
    "upside_down": Statistic(
        0.01,
        "camera_turned",
        None,
        math.inf,
        math.inf,
        "likeness upright, not upside down",
        "{:+.2f}",
    ),
    "width": Statistic(0.01, "camera_size", "camera_size", 3.0, math.inf, "width", "{:.0f} pixels"),
    "height": Statistic(
        0.01, "camera_size", "camera_size", 3.0, math.inf, "height", "{:.0f} pixels"
    ),
    "aspect": Statistic(0.01, "camera_size", "camera_size", 3.0, math.inf, "aspect", "{:.2f}"),
}
NAMES = tuple(STATISTICS)
PLACED = (
    "shift_x",
    "shift_y",
    "turn",
    "sideways",
    "upside_down",
)  # which only a mean picture tells
SIZES = ("width", "height", "aspect")  # logarithms
SCORE = Statistic(0.0, None, None, 3.0, math.inf, "raw score", "{:.4g}")  # of the model; for drift
CODES: tuple[Code, ...] = get_args(Code)  # what is said first of a picture with several faults

Values = NDArray[np.float64]  # (len(NAMES),), NaN where a picture does not say
Small = NDArray[np.float32]  # (SIDE, SIDE), 0 to 1


class Fault(NamedTuple):
    """Why a picture is not usable."""

    code: Code
    reason: str  # a sentence


# ---- what a picture is like ---------------------------------------------------------------------


def measure(picture: NDArray[np.uint8], pixels: NDArray[np.uint8]) -> tuple[Values, Small]:
    """The numbers of a picture, without those of its place, and the picture made small.

    Args:
        picture: (H, W, 3) RGB.
        pixels: the same as the model sees it, (S, S, 3).
    """
    height, width = picture.shape[:2]
    tiny = cv2.resize(pixels, (SIDE, SIDE), interpolation=cv2.INTER_AREA).astype(np.float32) / 255
    small: Small = tiny.mean(axis=2)
    red, green, blue = (float(tiny[..., channel].mean()) for channel in range(3))
    grey = (red + green + blue) / 3
    known = {
        "brightness": grey, "contrast": float(small.std()), "sharpness": sharpness(picture),
        "red": red - grey, "blue": blue - grey, "width": math.log(width),
        "height": math.log(height), "aspect": math.log(width / height),
    }  # fmt: skip
    return np.array([known.get(name, math.nan) for name in NAMES]), small


def sharpness(picture: NDArray[np.uint8]) -> float:
    """How much of a picture's change over some pixels happens from one pixel to the next, a log.

    Light and contrast are in both, and fall out; a blurred edge changes as much, but not at once.
    """
    height, width = picture.shape[:2]
    if min(height, width) < 2 * COARSE:
        return math.nan
    rows = height // BAND
    bands = picture[: rows * BAND].reshape(rows, BAND, width, 3)[:: max(1, rows // BANDS)]
    grey = cv2.cvtColor(bands.reshape(-1, width, 3), cv2.COLOR_RGB2GRAY)
    of_bands = grey.reshape(-1, BAND, width)

    def change(step: int) -> float:
        across = _square(grey[:, step:], grey[:, :-step])
        down = [_square(of_bands[:, row], of_bands[:, row + step]) for row in range(BAND - COARSE)]
        return across + sum(down) / len(down)

    return math.log((change(1) + 1e-3) / (change(COARSE) + 1e-3))


def _square(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    """The mean square of a difference."""
    return float(cv2.norm(one, other, cv2.NORM_L2SQR)) / one.size


def _around(value: Any, period: float) -> Any:
    return (value + period / 2) % period - period / 2


class Reference:
    """The mean picture at all angles, to lay another one over it."""

    def __init__(self, mean: Small, aspect: float) -> None:
        """`aspect`: width / height of the pictures before they were made square."""
        self._low, self._high = float(mean.min()), float(mean.max())
        turned = np.stack([_normal(one) for one in _turned(mean, aspect)])
        self._turned = np.conj(np.fft.rfft2(turned))  # (angles, SIDE, SIDE // 2 + 1)

    def place(self, small: Small) -> tuple[float, ...]:
        """How far a picture is to the right and below, in shares of it, and turned, in degrees.

        That of all that are more or less upright at which it is most like the mean picture
        (circular cross-correlation). At last, how much more alike it is there than sideways, and
        than upside down: below 0 it is turned, where parts do not look alike from all sides. NaN
        where it shows nothing.
        """
        # A bar that no training picture has, such as a black one, would be laid over the part.
        seen = np.clip(small, self._low, self._high)
        if float(seen.std()) < DARKEST:
            return (math.nan,) * len(PLACED)
        picture = np.fft.rfft2(_normal(seen))
        alike = np.fft.irfft2(picture * self._turned, (SIDE, SIDE))  # (angles, SIDE, SIDE)
        best = alike.reshape(len(alike), -1).max(axis=1)
        upright = np.where(_UPRIGHT, best, -1)
        angle = int(upright.argmax())
        y, x = (int(at) for at in np.unravel_index(alike[angle].argmax(), (SIDE, SIDE)))
        return (
            _around(x + _vertex(alike[angle, y], x), SIDE) / SIDE,
            _around(y + _vertex(alike[angle, :, x], y), SIDE) / SIDE,
            _around((angle + _vertex(best, angle)) * STEP, 360),
            float(upright[angle] - best[_SIDEWAYS].max()),
            float(upright[angle] - best[_UPSIDE_DOWN].max()),
        )


_AWAY = np.abs(_around(np.arange(0, 360, STEP), 360))  # degrees of the turned mean pictures
_UPRIGHT, _UPSIDE_DOWN = _AWAY < NEAR, _AWAY > 180 - NEAR
_SIDEWAYS = ~_UPRIGHT & ~_UPSIDE_DOWN


def _turned(mean: Small, aspect: float) -> Iterator[NDArray[Any]]:
    """A square picture as it would be, had the camera been turned before it was made square."""
    middle = (SIDE - 1) / 2
    for angle in range(0, 360, STEP):
        cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        turn = np.array([[cos, sin / aspect], [-sin * aspect, cos]])
        move = middle - turn @ np.array([middle, middle])
        matrix = np.column_stack([turn, move])
        inverse = cv2.WARP_INVERSE_MAP | cv2.INTER_LINEAR
        yield cv2.warpAffine(
            mean, matrix, (SIDE, SIDE), flags=inverse, borderMode=cv2.BORDER_REPLICATE
        )


def _normal(small: NDArray[Any]) -> NDArray[np.float32]:
    around = small - small.mean()
    normal: NDArray[np.float32] = around / max(float(np.linalg.norm(around)), 1e-9)
    return normal


def _vertex(line: NDArray[Any], at: int) -> float:
    """Where a parabola through the highest place of a closed line and its neighbours is highest."""
    before, here, after = float(line[at - 1]), float(line[at]), float(line[(at + 1) % len(line)])
    bend = before - 2 * here + after
    return 0.0 if abs(bend) < 1e-12 else min(max((before - after) / (2 * bend), -0.5), 0.5)


# ---- what was learned ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Learned:
    """How a number lies in the pictures that were learned."""

    count: int
    mean: float
    spread: float  # standard deviation

    @classmethod
    def of(cls, values: NDArray[np.float64]) -> Learned | None:
        """None where fewer than two are known. One in many may be far off, and does not count."""
        values = values[np.isfinite(values)]
        few = len(values) // ONE_IN
        if few:
            away = np.abs(values - np.median(values))
            usual = 1.4826 * float(np.median(away)) or float(values.std())
            far = np.argsort(away)[::-1][:few]
            values = np.delete(values, far[away[far] > FAR * usual])
        if len(values) < 2:
            return None
        return cls(len(values), float(values.mean()), float(values.std(ddof=1)))

    def merged(self, other: Learned | None) -> Learned:
        """These and others, exactly (Chan, Golub and LeVeque 1979)."""
        if other is None:
            return self
        count = self.count + other.count
        apart = other.mean - self.mean
        square = (self.count - 1) * self.spread**2 + (other.count - 1) * other.spread**2
        square += apart**2 * self.count * other.count / count
        mean = self.mean + apart * other.count / count
        return Learned(count, mean, math.sqrt(square / (count - 1)))

    def stray(self, statistic: Statistic, sure: float = SURE, variance: float = 1.0) -> float:
        """How far from the mean a new value hardly ever lies: a prediction limit, by Student's t.

        Args:
            sure: how seldom it lies farther off, as a quantile of the normal distribution.
            variance: of what is new, in that of one value.
        """
        reach = student(self.count - 1, sure) * math.sqrt(variance + 1 / self.count)
        return reach * max(self.spread, statistic.floor)


def student(degrees: int, z: float) -> float:
    """The quantile of Student's t where that of the normal distribution is z.

    Abramowitz and Stegun, 26.7.5; to 1 % from 7 degrees of freedom on.
    """
    found = z
    for power, (factor, terms) in enumerate(_T, 1):
        found += sum(c * z**n for n, c in terms.items()) / factor / degrees**power
    return found


_T: tuple[tuple[int, dict[int, int]], ...] = (
    (4, {3: 1, 1: 1}),
    (96, {5: 5, 3: 16, 1: 3}),
    (384, {7: 3, 5: 19, 3: 17, 1: -15}),
    (92160, {9: 79, 7: 776, 5: 1482, 3: -1920, 1: -945}),
)


@dataclass(frozen=True)
class Camera:
    """What the pictures of a training look like; `camera` of meta.json."""

    statistics: Mapping[str, Learned]  # and "score"
    pictures: int
    size: tuple[int, int]  # width, height of most of them
    mean: Small

    @classmethod
    def of(cls, content: dict[str, Any] | None) -> Camera | None:
        """What meta.json says; None where it says nothing, or what cannot be."""
        try:
            known = content or {}
            mean = np.frombuffer(base64.b64decode(known["mean"]), np.uint8).reshape(SIDE, SIDE)
            width, height = (int(side) for side in known["size"])
            statistics = {
                str(name): Learned(int(one["count"]), float(one["mean"]), float(one["spread"]))
                for name, one in known["statistics"].items()
                if name in (*NAMES, "score")
            }
            pictures = int(known["pictures"])
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
            return None
        if pictures < LEAST or min(width, height) < 1:
            return None
        if any(one.count < 2 or not one.spread >= 0 for one in statistics.values()):
            return None
        return cls(statistics, pictures, (width, height), (mean / 255).astype(np.float32))

    def content(self) -> dict[str, Any]:
        """As meta.json has it."""
        mean = np.rint(np.clip(self.mean, 0, 1) * 255).astype(np.uint8)
        return {
            "pictures": self.pictures,
            "size": list(self.size),
            "statistics": {
                name: {"count": one.count, "mean": _short(one.mean), "spread": _short(one.spread)}
                for name, one in self.statistics.items()
            },
            "mean": base64.b64encode(mean.tobytes()).decode(),
        }

    @cached_property
    def reference(self) -> Reference:
        return Reference(self.mean, self.size[0] / self.size[1])

    def measure(self, picture: NDArray[np.uint8], pixels: NDArray[np.uint8]) -> Values:
        """The numbers of a picture (H, W, 3), with its place; `pixels` as of `measure`."""
        values, small = measure(picture, pixels)
        values[[NAMES.index(name) for name in PLACED]] = self.reference.place(small)
        return values

    @cached_property
    def limits(self) -> dict[str, tuple[float, float]]:
        """From where to where a single picture may lie; without what can see nothing.

        On a side where even the last value that there can be is usual, it is infinite.
        """
        found = {
            name: _limits(name, statistic, known)
            for name, statistic in STATISTICS.items()
            if (known := self.statistics.get(name)) is not None
            and known.count >= LEAST
            and known.stray(statistic) <= statistic.most
        }
        if math.isinf(found.get("sideways", (-math.inf,))[0]):  # of parts that lie at any angle
            found.pop("turn", None)
        return found

    def blind(self) -> dict[Code, str]:
        """Faults that cannot be seen in pictures like these, and why."""
        found: dict[Code, str] = {}
        for name, statistic in STATISTICS.items():
            limits = self.limits.get(name, (-math.inf, math.inf))
            for code, limit in zip((statistic.below, statistic.above), limits, strict=True):
                if code is not None and math.isinf(limit) and name != "upside_down":
                    found.setdefault(code, self._why_blind(name, statistic))
        return found

    def _why_blind(self, name: str, statistic: Statistic) -> str:
        known = self.statistics.get(name)
        if known is None or known.count < LEAST:
            return f"Fewer than {LEAST} training pictures tell the {statistic.words}."
        if "camera_turned" in (statistic.below, statistic.above):
            return "The parts lie at any angle, or look alike from several sides."
        spread = statistic.form.format(max(known.spread, statistic.floor))
        return f"The {statistic.words} of the training pictures varies too much: ± {spread}."

    def faults(self, values: Values, before: Sequence[Values] = ()) -> list[Fault]:
        """What is wrong with a picture, first what is to be said first.

        Args:
            before: of the pictures before it, the oldest first: what strays a little in all of a
                few is no chance.
        """
        found = [*self._single(values), *self._steady(values, before)]
        found.sort(key=lambda fault: CODES.index(fault.code))
        return [*self._quarter_turn(values), *found]

    def _single(self, values: Values) -> Iterator[Fault]:
        for name, (low, high) in self.limits.items():
            value, statistic = float(values[NAMES.index(name)]), STATISTICS[name]
            code = statistic.below if value < low else statistic.above if value > high else None
            if code is not None:
                yield Fault(code, _sentence(code, name, value, low, high, "it"))

    def _steady(self, values: Values, before: Sequence[Values]) -> Iterator[Fault]:
        """What the middle of this picture and those before it says, in which they all agree."""
        if len(before) < FEW - 1:
            return
        middles = np.median([*before[len(before) - (FEW - 1) :], values], axis=0)
        for name, limits in self.limits.items():
            statistic, known, number = STATISTICS[name], self.statistics[name], NAMES.index(name)
            stray = known.stray(statistic, SURE_OF_FEW, OF_MIDDLE)
            stray = max(stray, statistic.steady * max(known.spread, statistic.floor))
            middle = float(middles[number])
            away, itself = middle - known.mean, float(values[number]) - known.mean
            code = statistic.below if away < 0 else statistic.above
            # The picture itself as well: the first one after the camera is set right is usable.
            if code is None or not abs(away) > stray or not itself / away > 0.5:
                continue
            if math.isfinite(limits[0] if away < 0 else limits[1]):
                low, high = known.mean - stray, known.mean + stray
                of = f"the middle of the last {FEW}"
                yield Fault(code, _sentence(code, name, middle, low, high, of))

    def _quarter_turn(self, values: Values) -> Iterator[Fault]:
        """That a picture is as high as others are wide, and as wide as they are high."""
        width, height = (float(values[NAMES.index(name)]) for name in ("width", "height"))
        wide, high = (self.limits.get(name) for name in ("width", "height"))
        if wide is None or high is None or wide[0] <= width <= wide[1]:
            return
        if wide[0] <= height <= wide[1] and high[0] <= width <= high[1]:
            yield Fault(
                "camera_turned",
                f"{_SAID['camera_turned']}: it is {math.exp(width):.0f} x {math.exp(height):.0f}"
                f" pixels, and {self.size[0]} x {self.size[1]} is usual.",
            )


def _limits(name: str, statistic: Statistic, known: Learned) -> tuple[float, float]:
    stray = known.stray(statistic)
    low, high = known.mean - stray, known.mean + stray
    if name == "brightness":  # 0 to 1
        low, high = low if low > 0 else -math.inf, high if high < 1 else math.inf
    if name in ("sideways", "upside_down"):  # of one that is turned it is about -mean
        low = -known.mean / 2 if low > 0 else -math.inf
    return low, high


_LIES = {"sideways": "sideways", "upside_down": "upside down"}


def _sentence(code: Code, name: str, value: float, low: float, high: float, of: str) -> str:
    if name in SIZES:
        value, low, high = (math.exp(one) for one in (value, low, high))
    words, form = STATISTICS[name].words, STATISTICS[name].form
    said, least, most = (form.format(one) for one in (value, low, high))
    usual = f"{least.removesuffix(' pixels')} to {most}"
    if math.isinf(low) or math.isinf(high):
        usual = f"at most {most}" if math.isinf(low) else f"at least {least}"
    if name in _LIES:
        return f"{_SAID[code]}: the part lies {_LIES[name]} ({words}: {said}; {usual} is usual)."
    return f"{_SAID[code]}: {of} has a {words} of {said}, and {usual} is usual."


_SAID: dict[Code, str] = {
    "camera_size": "The picture has another size",
    "camera_dark": "The picture is too dark",
    "camera_bright": "The picture is too bright",
    "camera_blurred": "The picture is blurred",
    "camera_turned": "The picture is turned",
    "camera_shifted": "The picture is shifted",
}


def _short(value: float) -> float:
    return float(f"{value:.7g}")

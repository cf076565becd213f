"""What the explorer knows and does, without a page: ears as codes, moved, mixed and compared."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx

from jaxear.config import DataConfig
from jaxear.data.dataset import EarImages
from jaxear.data.decoding import MAX_PIXELS, ImageError
from jaxear.data.pipeline import load_split, settings_of
from jaxear.data.records import Record, Side
from jaxear.eigenears import EigenEars
from jaxear.errors import UserError
from jaxear.figures import to_uint8
from jaxear.inference import encode_images
from jaxear.model import load_config, load_model
from jaxear.vae import EarVAE

logger = logging.getLogger(__name__)

# Sliders go this many standard deviations either way; further where an ear lies further out.
REACH = 3.0
STEP = 0.1

MAX_BYTES = 25_000_000

Metric = Literal["euclidean", "cosine"]
Sliders = np.ndarray | Sequence[float]


@dataclass(frozen=True)
class Ear:
    """An ear to start from.

    Attributes:
        name: what the page calls it.
        code: its latent code [d], with all that no component describes.
        shown: what the sliders show of it [k], in standard deviations, in steps of `STEP`.
        reach: the sliders' ends, so that `shown` lies within.
        photo: the picture that was encoded, uint8 [S, S, 3]; None for an ear that was made up.
        row: its place among the run's ears; None where it is not one of them.
    """

    name: str
    code: np.ndarray
    shown: np.ndarray
    reach: float = REACH
    photo: np.ndarray | None = None
    row: int | None = None


@dataclass(frozen=True)
class Neighbour:
    """One of the run's ears, and how far (Euclid, SD) or how similar (cosine) it is."""

    row: int
    name: str
    value: float


class Explorer:
    """Eigenears with the run's own ears around them; nothing in it changes once it is made.

    Args:
        eigenears: the components and their model.
        config: how the run prepares its pictures.
        ears: ears of the run to compare with and to start from; may be None.
        fitted: whether the components were fitted just now, for want of a file of them.

    Raises:
        UserError: they are eigenears of pixels.
    """

    def __init__(
        self,
        eigenears: EigenEars,
        config: DataConfig,
        ears: EarImages | None = None,
        *,
        fitted: bool = False,
    ):
        if not isinstance(eigenears.model, EarVAE):
            raise UserError("The explorer shows the eigenears of a trained model, not of pixels.")
        self.eigenears = eigenears
        self.model = eigenears.model
        self.fitted = fitted
        self.names = [] if ears is None else [_name(record) for record in ears.records]
        self._settings = settings_of(config)
        self._ears = ears
        self._deviations = np.sqrt(np.maximum(eigenears.explained_variance_, 1e-12))
        self._codes = (
            np.empty((0, len(eigenears.mean_)), np.float32)
            if ears is None
            else encode_images(self.model, ears.images)[0]
        )
        self._scores = self.scores(self._codes)
        # What decodes alone and taken apart once: at every picture, jaxear.inference would take the
        # whole model apart and hand all of it over, which costs more than a small decoder does.
        self._graphdef, self._decoder = nnx.split(self.model.without_encoder())

    @classmethod
    def open(cls, run_dir: str | Path, *, n_ears: int = 1000, progress: bool = True) -> Explorer:
        """The explorer of a run.

        Takes the eigenears that lie in the run, or else fits them to its training split.

        Args:
            run_dir: the run.
            n_ears: how many of the run's ears (all splits, evenly spread) to read and encode; 0
                does without its data.
            progress: show a bar while reading.

        Raises:
            UserError: not a run, its eigenears cannot be read, or its data is no longer there.
        """
        if n_ears < 0:
            raise UserError(f"--ears must be at least 0, not {n_ears}.")
        config = load_config(run_dir)
        path = Path(run_dir) / "eigenears" / "eigenears.safetensors"
        fitted = not path.is_file()
        if fitted:
            logger.info("There is no %s: fitting eigenears to the run's training split.", path)
            model = load_model(run_dir)
            images = load_split(config, "train", progress=progress).images
            n_components = min(16, len(images) - 1, model.latent_dim)
            eigenears = EigenEars.fit(model, images, n_components)
        else:
            eigenears = EigenEars.load(path)
        if n_ears == 0:
            return cls(eigenears, config, fitted=fitted)
        try:
            ears = load_split(config, "all", progress=progress)
        except UserError as error:
            raise UserError(f"{error}\nTo explore without the run's data, add --ears 0.") from error
        kept = spread(ears, n_ears)
        logger.info("Encoding %d of the run's %d ears.", len(kept), len(ears))
        return cls(eigenears, config, kept, fitted=fitted)

    @property
    def n_components(self) -> int:
        return self.eigenears.n_components

    @property
    def labels(self) -> list[str]:
        """A name for each component, with its share of the codes' variance."""
        ratios = self.eigenears.explained_variance_ratio_
        return [
            f"PC{i} · {100 * r:.0f} %" if r >= 0.0095 else f"PC{i} · {100 * r:.1f} %"
            for i, r in enumerate(ratios, start=1)
        ]

    def warm_up(self) -> None:
        """Compile what the page needs, for one ear at a time."""
        size = self._settings.image_size
        self.picture(self.eigenears.mean_)
        encode_images(self.model, np.zeros((1, size, size, 3), np.uint8))

    # Ears to start from.

    def mean(self) -> Ear:
        """The mean ear."""
        return self._ear("the mean ear", self.eigenears.mean_)

    def random(self, rng: np.random.Generator) -> Ear:
        """An ear drawn from the components: independent standard normal scores."""
        scores = np.round(rng.standard_normal(self.n_components) / STEP) * STEP
        change = (scores * self._deviations).astype(np.float32) @ self.eigenears.components_
        return self._ear("a random ear", self.eigenears.mean_ + change)

    def from_run(self, row: int) -> Ear:
        """One of the run's ears."""
        return self._ear(self.names[row], self._codes[row], photo=self.thumbnail(row), row=row)

    def from_photo(self, path: str | Path, *, side: Side = "unknown") -> Ear:
        """The ear in a file, prepared as the run prepares its own.

        Args:
            path: the file.
            side: "left" ears are mirrored where the run mirrors its own.

        Raises:
            UserError: it is too large or no picture; the message names the file without its folder.
        """
        path = Path(path)
        advice = "Give a photograph as JPEG, PNG, WebP or TIFF"
        if path.is_file() and (n_bytes := path.stat().st_size) > MAX_BYTES:
            raise UserError(
                f"{path.name} has {n_bytes / 1e6:.0f} MB. {advice} of at most "
                f"{MAX_BYTES / 1e6:.0f} MB."
            )
        try:
            photo = self._settings.prepare(Record(path, subject="", side=side))
        except ImageError as error:
            raise UserError(
                f"{path.name} cannot be used: {error.reason.rstrip('.')}. {advice}, of at most "
                f"{MAX_PIXELS / 1e6:.0f} megapixels."
            ) from error
        code = encode_images(self.model, photo[None])[0][0]
        return self._ear(path.name, code, photo=photo)

    def morph(self, a: Ear, b: Ear, share: float) -> Ear:
        """The ear on the straight line between the codes of `a` (0) and `b` (1)."""
        if share in (0, 1):
            return b if share else a
        ear = self._ear(
            f"{a.name} → {b.name}, {100 * share:.0f} %", (1 - share) * a.code + share * b.code
        )
        # One reach all the way, so that the sliders' ends do not jump.
        return dataclasses.replace(ear, reach=max(a.reach, b.reach, ear.reach))

    def _ear(
        self, name: str, code: np.ndarray, photo: np.ndarray | None = None, row: int | None = None
    ) -> Ear:
        shown = np.round(self.scores(code) / STEP) * STEP + 0.0
        reach = max(REACH, float(np.ceil(np.abs(shown).max())))
        return Ear(name, np.asarray(code, np.float32), shown, reach, photo, row)

    # Codes.

    def scores(self, codes: np.ndarray) -> np.ndarray:
        """Codes [..., d] -> scores [..., k] in standard deviations."""
        e = self.eigenears
        return (codes - e.mean_) @ e.components_.T / self._deviations

    def moved(self, ear: Ear, sliders: Sliders) -> np.ndarray:
        """The code [d] of an ear whose sliders stand at `sliders` [k].

        Only what was moved changes: the parts of a real ear's code that no component describes,
        and what the sliders' steps round away, stay as they are.
        """
        change = (np.asarray(sliders, np.float64) - ear.shown) * self._deviations
        change[np.abs(change) < 1e-6 * self._deviations] = 0
        return ear.code + (change @ self.eigenears.components_).astype(np.float32)

    def settle(self, ear: Ear, sliders: Sliders) -> Ear:
        """The ear as it is now, as a new one to start from; the same where nothing was moved."""
        code = self.moved(ear, sliders)
        if np.array_equal(code, ear.code):
            return ear
        settled = self._ear(moved_name(ear.name), code, photo=ear.photo)
        return dataclasses.replace(settled, reach=max(settled.reach, ear.reach))

    def picture(self, code: np.ndarray) -> np.ndarray:
        """Code [d] -> picture, uint8 [S, S, 3]."""
        codes = np.asarray(code, np.float32)[None]
        return to_uint8(np.asarray(_decode(self._graphdef, self._decoder, codes))[0])

    # The run's own ears.

    def neighbours(
        self, code: np.ndarray, metric: Metric, n: int = 6, *, but: int | None = None
    ) -> list[Neighbour]:
        """The run's ears nearest to a code by their scores, nearest first.

        Args:
            code: [d].
            metric: "euclidean" is the distance of the scores, in standard deviations; "cosine" the
                cosine of the angle between them, seen from the mean ear.
            n: how many.
            but: a row to leave out, the ear itself.

        Returns:
            At most n; none by cosine for the mean ear, which lies in no direction.
        """
        scores = self.scores(code)
        if metric == "euclidean":
            values = np.linalg.norm(self._scores - scores, axis=1)
            order = np.argsort(values, kind="stable")
        else:
            length = np.linalg.norm(scores)
            if length < 1e-3:
                return []
            lengths = np.maximum(np.linalg.norm(self._scores, axis=1), 1e-12)
            values = self._scores @ scores / (lengths * length)
            order = np.argsort(-values, kind="stable")
        rows = [int(row) for row in order[: n + 1] if row != but][:n]
        return [Neighbour(row, self.names[row], float(values[row])) for row in rows]

    def thumbnail(self, row: int) -> np.ndarray:
        """The picture of one of the run's ears, uint8 [S, S, 3]."""
        if self._ears is None:
            raise UserError("There are no ears of the run: it was opened with --ears 0.")
        return self._ears.take(np.array([row]))[0]

    # Animations.

    def traversal(self, ear: Ear, sliders: Sliders, component: int) -> list[np.ndarray]:
        """The ear moved along one component from one end to the other and back: pictures."""
        stops = np.array(sliders, np.float64)
        codes = []
        for score in ease(25) * 2 * ear.reach - ear.reach:
            stops[component] = score
            codes.append(self.moved(ear, stops))
        return there_and_back([self.picture(code) for code in codes])

    def morph_frames(self, a: Ear, b: Ear) -> list[np.ndarray]:
        """Ear `a` becoming `b` and back: pictures."""
        shares = ease(25)
        return there_and_back([self.picture((1 - t) * a.code + t * b.code) for t in shares])


@partial(jax.jit, static_argnums=0)
def _decode(graphdef: Any, state: Any, codes: np.ndarray) -> jax.Array:
    return nnx.merge(graphdef, state).decode(codes)


def spread(ears: EarImages, n: int) -> EarImages:
    """At most n of the ears, evenly spread over them, in their order."""
    if len(ears) <= n:
        return ears
    rows = np.linspace(0, len(ears) - 1, n).round().astype(int)
    return EarImages(ears.take(rows), [ears.records[row] for row in rows], [])


def ease(n: int) -> np.ndarray:
    """n numbers from 0 to 1 that begin and end slowly."""
    return (1 - np.cos(np.linspace(0, np.pi, n))) / 2


def there_and_back(frames: list[np.ndarray]) -> list[np.ndarray]:
    """Frames that can be repeated for ever: the inner ones come twice."""
    return [*frames, *frames[-2:0:-1]]


def moved_name(name: str) -> str:
    """What an ear is called after sliders have moved it."""
    return name if name.endswith(", moved") else f"{name}, moved"


def _name(record: Record) -> str:
    if not record.path.suffix:  # drawn, not read: "synthetic-000012"
        return f"synthetic {int(record.path.name.rsplit('-', 1)[1])}"
    # Of a photograph the subject helps, unless it is called after the file.
    stem = record.path.stem
    return stem if record.subject in ("", stem, record.path.name) else f"{record.subject} · {stem}"

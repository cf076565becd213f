"""The named factors that a synthetic ear is drawn from: anatomy, and everything that is not."""

from __future__ import annotations

import zlib
from math import erf
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Kind = Literal["anatomy", "pose", "light", "skin", "background", "camera"]
Factors = dict[str, jax.Array]

# Normal factors are cut off this many standard deviations from the mean: no impossible ears.
CUTOFF = 2.5


class Factor(NamedTuple):
    """One independent cause of variation.

    `normal` factors are Gaussian, cut off at `CUTOFF` standard deviations; `uniform` ones spread
    evenly over mean +- sqrt(3) std, so that `mean` and `std` mean the same for both.
    """

    name: str
    kind: Kind
    mean: float
    std: float
    unit: str
    description: str
    distribution: Literal["normal", "uniform"] = "normal"

    @property
    def reach(self) -> float:
        """How many standard deviations the factor goes to either side."""
        return CUTOFF if self.distribution == "normal" else 3.0**0.5

    @property
    def low(self) -> float:
        return self.mean - self.reach * self.std

    @property
    def high(self) -> float:
        return self.mean + self.reach * self.std


# Sizes follow adult auricles: 62 mm long, 35 mm wide, helix 18 mm off the head (Farkas,
# "Anthropometry of the Head and Face", 1994; Sforza et al., Forensic Sci. Int. 2009).
ANATOMY = (
    Factor("ear_length", "anatomy", 62.0, 3.5, "mm", "size of the whole ear, top to lobule"),
    Factor("ear_aspect", "anatomy", 0.58, 0.035, "1", "width over length"),
    Factor("protrusion", "anatomy", 17.0, 3.0, "mm", "distance of the outer helix from the head"),
    Factor("helix_width", "anatomy", 5.0, 0.9, "mm", "width of the rolled rim"),
    Factor("helix_curl", "anatomy", 4.0, 1.0, "mm", "height of the rim over the scaphoid fossa"),
    Factor("darwin_tubercle", "anatomy", 1.5, 0.6, "mm", "knob inside the upper back helix"),
    Factor("antihelix_height", "anatomy", 5.5, 1.3, "mm", "height of antihelix and crura"),
    Factor("antihelix_position", "anatomy", 0.0, 1.0, "mm", "shift of the antihelix to the front"),
    Factor("upper_crus_angle", "anatomy", 0.0, 9.0, "deg", "turn of the upper crus to the front"),
    Factor("lower_crus_angle", "anatomy", 0.0, 8.0, "deg", "turn of the lower crus upwards"),
    Factor("concha_depth", "anatomy", 12.0, 2.8, "mm", "depth of the concha below its edge"),
    Factor("crus_helix_length", "anatomy", 10.0, 2.5, "mm", "reach of the crus into the concha"),
    Factor(
        "tragus_size", "anatomy", 5.5, 1.2, "mm", "height of the tragus and reach over the canal"
    ),
    Factor("antitragus_size", "anatomy", 4.0, 1.5, "mm", "height of the antitragus"),
    Factor("notch_width", "anatomy", 4.5, 1.2, "mm", "width of the intertragal notch"),
    Factor("lobule_length", "anatomy", 17.0, 2.2, "mm", "notch to the lowest point of the lobule"),
    Factor(
        "lobule_attachment", "anatomy", 0.5, 0.2887, "1", "0 free, 1 grown to the cheek", "uniform"
    ),
)
NUISANCES = (
    Factor("rotation", "pose", 0.0, 6.0, "deg", "roll of the head, ear's top to the face"),
    Factor("shift_x", "pose", 0.0, 1.8, "mm", "picture's content to the right"),
    Factor("shift_y", "pose", 0.0, 1.8, "mm", "picture's content downwards"),
    Factor("scale", "pose", 1.0, 0.045, "1", "size of everything in the picture"),
    Factor("yaw", "pose", 0.0, 8.0, "deg", "head turned, camera sees it more from the front"),
    Factor("pitch", "pose", 0.0, 6.0, "deg", "camera sees the head more from above"),
    Factor("light_azimuth", "light", 0.0, 40.0, "deg", "light from above (0) to the face (+)"),
    Factor("light_elevation", "light", 52.0, 8.0, "deg", "angle of the light over the picture"),
    Factor("light_ambient", "light", 0.36, 0.08, "1", "share of light from all around"),
    Factor(
        "light_warmth", "light", 0.04, 0.045, "1", "log ratio of red to green and green to blue"
    ),
    Factor("melanin", "skin", 0.55, 0.26, "1", "optical density of the skin's pigment", "uniform"),
    Factor("redness", "skin", 0.45, 0.12, "1", "optical density of the skin's blood"),
    Factor("gloss", "skin", 0.36, 0.1, "1", "strength of the highlights"),
    Factor("blotches", "skin", 0.06, 0.022, "1", "contrast of the skin's uneven colour"),
    Factor("hair_coverage", "background", 0.0, 4.0, "mm", "hairline moved towards the ear"),
    Factor("hair_tone", "background", 0.04, 0.02, "1", "hair from black to fair", "uniform"),
    Factor("exposure", "camera", -0.25, 0.25, "stop", "brightness of the picture"),
    Factor("blur", "camera", 0.5, 0.12, "mm", "standard deviation of the lens blur"),
    Factor("noise", "camera", 0.009, 0.003, "1", "standard deviation of the sensor noise"),
)
FACTORS = ANATOMY + NUISANCES


def draw_factors(key: jax.Array, subject: jax.Array, image: jax.Array) -> Factors:
    """Draw the factors of one image: anatomy by the subject's number, the rest by the image's.

    Every factor has a stream of its own, so a new factor leaves the others' values as they are.
    """
    streams = np.asarray([zlib.crc32(f.name.encode()) for f in FACTORS], np.uint32)
    numbers = jnp.where(np.asarray([f.kind == "anatomy" for f in FACTORS]), subject, image)
    keys = jax.vmap(lambda s, i: jax.random.fold_in(jax.random.fold_in(key, s), i))(
        streams, numbers
    )
    uniform = jax.vmap(lambda k: jax.random.uniform(k, minval=-1.0, maxval=1.0))(keys)
    # Truncated normal by its inverse distribution function.
    inside = erf(CUTOFF / 2.0**0.5)
    normal = 2.0**0.5 * jax.lax.erf_inv(inside * uniform)
    is_normal = np.asarray([f.distribution == "normal" for f in FACTORS])
    scores = jnp.where(is_normal, normal, 3.0**0.5 * uniform)
    return {
        f.name: jnp.clip(f.mean + f.std * score, f.low, f.high)
        for f, score in zip(FACTORS, scores, strict=True)
    }

"""Eigenears: the principal directions of a model's latent codes, decoded to pictures.

As a library: `EigenEars.fit(model, images)`. As a command: `jaxear eigenears --run runs/NAME`.
The classic, linear ones, of pixels: `EigenEars.fit(PixelModel(128), images)`; `--pixels`.
"""

from jaxear.eigenears.components import EigenEars, without_pose
from jaxear.eigenears.writing import write_eigenears, write_pixel_eigenears

__all__ = ["EigenEars", "without_pose", "write_eigenears", "write_pixel_eigenears"]

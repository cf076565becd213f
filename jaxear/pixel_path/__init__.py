"""What code and image of a model may start from: principal components of the pixels themselves."""

from jaxear.pixel_path.fitting import augments, fit_pixel_path, views_for_pca
from jaxear.pixel_path.path import PixelPath

__all__ = ["PixelPath", "augments", "fit_pixel_path", "views_for_pca"]

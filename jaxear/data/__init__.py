"""Ear photographs and drawn ears: from files to arrays."""

from jaxear.data.dataset import EarImages, load_images
from jaxear.data.decoding import ImageError, decode
from jaxear.data.images import crop_box, mirror, prepare_image, to_square
from jaxear.data.records import Record, Side
from jaxear.data.sources import LAYOUTS, load_records
from jaxear.data.splits import Splits, split_by_subject

__all__ = [
    "LAYOUTS",
    "EarImages",
    "ImageError",
    "Record",
    "Side",
    "Splits",
    "crop_box",
    "decode",
    "load_images",
    "load_records",
    "mirror",
    "prepare_image",
    "split_by_subject",
    "to_square",
]

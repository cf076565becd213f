"""Pretrained encoders in Flax NNX, one file per family."""

from jaxear.backbones.base import Backbone, BackboneSpec, Encoder, FeatureInfo
from jaxear.backbones.hybrid import HybridBackbone
from jaxear.backbones.registry import create_backbone, get_spec, list_backbones
from jaxear.backbones.weights import read_weights, weights_path

__all__ = [
    "Backbone",
    "BackboneSpec",
    "Encoder",
    "FeatureInfo",
    "HybridBackbone",
    "create_backbone",
    "get_spec",
    "list_backbones",
    "read_weights",
    "weights_path",
]

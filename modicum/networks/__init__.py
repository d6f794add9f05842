"""Networks: timm backbones, stems for small images, heads."""

from modicum.networks.backbones import Architecture, Backbone, create_backbone
from modicum.networks.heads import Classifier, mlp

__all__ = ["Architecture", "Backbone", "Classifier", "create_backbone", "mlp"]

"""What stands on a backbone: projectors and predictors as the papers have them, and the classifier."""

import torch
from torch import Tensor, nn

from modicum.networks.backbones import Backbone


def mlp(num_inputs: int, num_hidden: int, num_outputs: int, *, num_layers: int = 2, norm: bool = False) -> nn.Sequential:
    """`num_layers` linear layers with ReLU between them; `norm` puts batch norm before each ReLU (and drops the bias there)."""
    layers: list[nn.Module] = []
    for _ in range(num_layers - 1):
        layers += [nn.Linear(num_inputs, num_hidden, bias=not norm), *([nn.BatchNorm1d(num_hidden)] if norm else []), nn.ReLU(inplace=True)]
        num_inputs = num_hidden
    return nn.Sequential(*layers, nn.Linear(num_inputs, num_outputs))


class Classifier(nn.Module):
    """Normalised images (B, C, S, S) -> logits (B, num_classes)."""

    def __init__(self, backbone: Backbone, num_classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.num_features, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images))

    @torch.no_grad()
    def set_head(self, weight: Tensor, bias: Tensor) -> None:
        """Gives the head these weights (num_classes, D) and biases (num_classes,)."""
        self.head.weight.copy_(weight)
        self.head.bias.copy_(bias)

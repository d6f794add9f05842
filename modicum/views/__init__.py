"""One image -> many: batched augmentation on the device, policies by name, every image with its own draw."""

from modicum.views.policies import Policy, build_policy

__all__ = ["Policy", "build_policy"]

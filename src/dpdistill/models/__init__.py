"""Plain networks and image maps: no batch statistics, no global random state, nothing private."""

from .augment import Dsa, expand
from .convnet import ConvNet

__all__ = ["ConvNet", "Dsa", "expand"]

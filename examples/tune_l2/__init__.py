"""An L2 weight for every feature of a linear classifier."""

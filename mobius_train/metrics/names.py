"""Names of metrics that several rooms know."""

from __future__ import annotations

# The means over all quantiles of the schedule, and the part of each that is motion.
HELDOUT_LOSS = "heldout_loss"
HELDOUT_MOTION = "heldout_motion"
# The change of all trained weights since the start, relative to their norm.
WEIGHT_CHANGE = "weight_change/all"

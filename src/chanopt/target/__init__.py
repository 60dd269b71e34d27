"""What is free on which machine: ways for a conv to come by its channels, and what each costs (design: section 6)."""

from chanopt.kernels import GROUP
from chanopt.target.grain import Gains, Grain
from chanopt.target.measured import Measured
from chanopt.target.read import SECTOR, ConvRead
from chanopt.target.realization import Realization
from chanopt.target.target import DEVICES, Target

__all__ = ["DEVICES", "GROUP", "SECTOR", "ConvRead", "Gains", "Grain", "Measured", "Realization", "Target"]

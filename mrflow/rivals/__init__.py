"""Rival transitions between resolutions, one file each."""

from mrflow.rivals.fresco import SampleConverged as SampleConverged
from mrflow.rivals.growth import Grow as Grow
from mrflow.rivals.jit import SampleAnchors as SampleAnchors
from mrflow.rivals.ralu import SampleRegions as SampleRegions
from mrflow.rivals.selflift import SelfLift as SelfLift

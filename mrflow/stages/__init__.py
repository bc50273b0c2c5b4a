"""The stages, one file each."""

from mrflow.stages.crop import Crop as Crop
from mrflow.stages.decode import Decode as Decode
from mrflow.stages.encode import Encode as Encode
from mrflow.stages.lift import Lift as Lift
from mrflow.stages.quantise import Quantise as Quantise
from mrflow.stages.refine import Refine as Refine
from mrflow.stages.reinject import Reinject as Reinject
from mrflow.stages.sample import Sample as Sample
from mrflow.stages.tiles import Tiles as Tiles
from mrflow.stages.truth import Truth as Truth
from mrflow.stages.upscale import Upscale as Upscale

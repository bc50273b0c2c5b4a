"""The upscaler slot and what fills it: interpolation, networks from files, and combinations of them."""

from mrflow.protocols.upscaler import Upscaler as Upscaler
from mrflow.upscalers.basicsr import BasicSR as BasicSR
from mrflow.upscalers.basicsr import basicsr_package as basicsr_package
from mrflow.upscalers.composite import Blend as Blend
from mrflow.upscalers.composite import ColourMatch as ColourMatch
from mrflow.upscalers.composite import EightBit as EightBit
from mrflow.upscalers.composite import Sharpen as Sharpen
from mrflow.upscalers.files import Checkpoint as Checkpoint
from mrflow.upscalers.files import load_upscaler as load_upscaler
from mrflow.upscalers.interpolate import Interpolate as Interpolate
from mrflow.upscalers.interpolate import Lanczos as Lanczos
from mrflow.upscalers.network import Network as Network
from mrflow.upscalers.network import NetworkFacts as NetworkFacts
from mrflow.upscalers.network import OpenedNetwork as OpenedNetwork
from mrflow.upscalers.spandrel import Spandrel as Spandrel

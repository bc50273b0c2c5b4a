"""Which noise levels are visited. `base` has the maths and the schedules; everything public is named here."""

from typing import TYPE_CHECKING

from mrflow.schedules.base import Beta as Beta
from mrflow.schedules.base import Cosine as Cosine
from mrflow.schedules.base import DirectSigma as DirectSigma
from mrflow.schedules.base import Explicit as Explicit
from mrflow.schedules.base import FlowMap as FlowMap
from mrflow.schedules.base import Karras as Karras
from mrflow.schedules.base import Linear as Linear
from mrflow.schedules.base import LogitNormal as LogitNormal
from mrflow.schedules.base import Schedule as Schedule
from mrflow.schedules.base import Shifted as Shifted
from mrflow.schedules.base import Sigmas as Sigmas
from mrflow.schedules.base import WithShift as WithShift
from mrflow.schedules.base import check_sigmas as check_sigmas
from mrflow.schedules.base import cut as cut
from mrflow.schedules.base import shift as shift
from mrflow.schedules.base import shift_linear as shift_linear
from mrflow.schedules.base import shift_static as shift_static
from mrflow.schedules.base import stretch as stretch
from mrflow.schedules.comfyui import BongTangent as BongTangent
from mrflow.schedules.comfyui import ComfyUI as ComfyUI
from mrflow.schedules.comfyui import KLOptimal as KLOptimal
from mrflow.schedules.comfyui import LinearQuadratic as LinearQuadratic

if TYPE_CHECKING:
    from mrflow.schedules.search import optimise as optimise


def __getattr__(name: str) -> object:
    if name != "optimise":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mrflow.schedules.search import optimise  # stands on solvers, which stand on schedules

    return optimise

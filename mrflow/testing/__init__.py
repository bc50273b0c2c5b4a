"""Help for testing what you write against mrflow: a model whose flow is exact in closed form, and laws in one line.

from mrflow.testing import check_stage
def test_mine(): check_stage(Sharpen())

`LAWS` lists every law with its formula; `mrflow.testing.strategies` has values for hypothesis.
"""

from mrflow.testing.laws import Law as Law
from mrflow.testing.laws import LawBroken as LawBroken
from mrflow.testing.of_caches import CACHE_LAWS
from mrflow.testing.of_caches import check_cache as check_cache
from mrflow.testing.of_schedules import SCHEDULE_LAWS
from mrflow.testing.of_schedules import check_schedule as check_schedule
from mrflow.testing.of_slots import BACKBONE_LAWS, GUIDANCE_LAWS, NOISE_LAWS, UPSCALER_LAWS
from mrflow.testing.of_slots import check_backbone as check_backbone
from mrflow.testing.of_slots import check_guidance as check_guidance
from mrflow.testing.of_slots import check_noise as check_noise
from mrflow.testing.of_slots import check_upscaler as check_upscaler
from mrflow.testing.of_solvers import SOLVER_LAWS
from mrflow.testing.of_solvers import check_solver as check_solver
from mrflow.testing.of_solvers import measured_order as measured_order
from mrflow.testing.of_stages import STAGE_LAWS, TRANSITION_LAWS
from mrflow.testing.of_stages import check_stage as check_stage
from mrflow.testing.of_stages import check_transition as check_transition
from mrflow.testing.toy import TOY as TOY
from mrflow.testing.toy import Mixture as Mixture
from mrflow.testing.toy import Toy as Toy
from mrflow.testing.toy import toy as toy

LAWS: tuple[Law, ...] = (
    *SCHEDULE_LAWS, *SOLVER_LAWS, *STAGE_LAWS, *TRANSITION_LAWS, *GUIDANCE_LAWS,
    *NOISE_LAWS, *CACHE_LAWS, *UPSCALER_LAWS, *BACKBONE_LAWS,
)  # fmt: skip
"""Every law; `law.hold(plug_in, **settings)` holds a plug-in to one."""

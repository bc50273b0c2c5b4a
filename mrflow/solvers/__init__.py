"""How the velocity is integrated from one noise level to the next. One file a kind of solver; the loop is `base`'s."""

from mrflow.solvers.adaptive import AdaptiveSolver as AdaptiveSolver
from mrflow.solvers.adaptive import BogackiShampine as BogackiShampine
from mrflow.solvers.adaptive import DormandPrince as DormandPrince
from mrflow.solvers.adaptive import Pair as Pair
from mrflow.solvers.base import FiniteCheck as FiniteCheck
from mrflow.solvers.base import History as History
from mrflow.solvers.base import Solver as Solver
from mrflow.solvers.base import Step as Step
from mrflow.solvers.base import StochasticSolver as StochasticSolver
from mrflow.solvers.base import integrate as integrate
from mrflow.solvers.exponential import DEIS as DEIS
from mrflow.solvers.exponential import RES2M as RES2M
from mrflow.solvers.exponential import RES2S as RES2S
from mrflow.solvers.exponential import RES3S as RES3S
from mrflow.solvers.exponential import UniPC as UniPC
from mrflow.solvers.multistep import AB2 as AB2
from mrflow.solvers.multistep import AB3 as AB3
from mrflow.solvers.multistep import DPMpp2M as DPMpp2M
from mrflow.solvers.runge_kutta import RK4 as RK4
from mrflow.solvers.runge_kutta import Euler as Euler
from mrflow.solvers.runge_kutta import Heun as Heun
from mrflow.solvers.runge_kutta import Midpoint as Midpoint
from mrflow.solvers.stochastic import SASolver as SASolver
from mrflow.solvers.stochastic import StochasticEuler as StochasticEuler

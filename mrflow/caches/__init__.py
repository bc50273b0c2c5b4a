"""Residual caches: evaluations of the network that are left out because little would change. One file a method."""

from mrflow.caches.base import Cache as Cache
from mrflow.caches.base import Cached as Cached
from mrflow.caches.base import difference as difference
from mrflow.caches.clock import Evaluation as Evaluation
from mrflow.caches.clock import Rule as Rule
from mrflow.caches.dbcache import DBCache as DBCache
from mrflow.caches.dmd import DMD as DMD
from mrflow.caches.extrapolate import Extrapolation as Extrapolation
from mrflow.caches.extrapolate import Predictor as Predictor
from mrflow.caches.l2p import L2P as L2P
from mrflow.caches.magcache import MagCache as MagCache
from mrflow.caches.seacache import SeaCache as SeaCache
from mrflow.caches.spectrum import Spectrum as Spectrum
from mrflow.caches.taylorseer import TaylorSeer as TaylorSeer
from mrflow.caches.teacache import TeaCache as TeaCache
from mrflow.caches.toma import ToMA as ToMA

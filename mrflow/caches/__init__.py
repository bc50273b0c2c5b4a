"""Residual caches: evaluations of the network that are left out because little would change. One file a method."""

from mrflow.caches.base import Cache as Cache
from mrflow.caches.base import Cached as Cached
from mrflow.caches.base import Look as Look
from mrflow.caches.base import Rule as Rule
from mrflow.caches.base import difference as difference
from mrflow.caches.dbcache import DBCache as DBCache
from mrflow.caches.extrapolate import Extrapolation as Extrapolation
from mrflow.caches.magcache import MagCache as MagCache
from mrflow.caches.taylorseer import TaylorSeer as TaylorSeer
from mrflow.caches.teacache import TeaCache as TeaCache
from mrflow.caches.toma import ToMA as ToMA

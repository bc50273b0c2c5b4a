"""A model with a cache in all its fields: a backbone like any other."""

import uuid
from dataclasses import replace

from mrflow.backbone import Backbone, Condition, FieldOptions, Wrapper
from mrflow.caches.base import Cache, check_cache
from mrflow.errors import PlanError, RecordError
from mrflow.flow import Velocity
from mrflow.records.chains import fingerprint
from mrflow.spec import ModelInfo


class Cached(Wrapper):
    """`model`, with `cache` opened anew in every field. Build it with `cache(model)` or directly.

    The branches of a guidance are asked one after another, each with a memory of its own. `info.version` names the
    cache, so that results of stages are never taken for those of the bare model.

    Raises:
        PlanError: the model cannot be taken apart, or is cached already.
    """

    def __init__(self, model: Backbone, cache: Cache) -> None:
        super().__init__(model)
        check_cache(cache, model.info)
        self._cache = cache
        try:
            mark = fingerprint(cache)
        except RecordError:  # a class whose source cannot be read: its results are never reused
            mark = uuid.uuid4().hex
        self._mark = f"+{type(cache).__name__}-{mark[:12]}"

    @property
    def info(self) -> ModelInfo:
        """The model's facts, with this cache among them."""
        info = self.model.info
        can = replace(info.capabilities, cache=False, policy=False, together=False)
        return replace(info, version=info.version + self._mark, capabilities=can, cache=self._cache)

    def check(self, options: FieldOptions) -> None:
        """As the model does, with the cache."""
        self.model.check(self._with_cache(options))

    def field(self, cond: Condition, options: FieldOptions = FieldOptions()) -> Velocity:
        """The model's field with a fresh memory."""
        return self.model.field(cond, self._with_cache(options))

    def _with_cache(self, options: FieldOptions) -> FieldOptions:
        if options.cache is not None:
            raise PlanError(f"{self.info.name} is cached already, by {self._cache!r}; give it a model without a cache")
        self.info.require(options.needs)
        return replace(options, cache=self._cache)

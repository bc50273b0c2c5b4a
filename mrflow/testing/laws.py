"""What a law is: a sentence, its formula with its source, and a check."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, TypeVar

Kind = Literal[
    "schedule", "solver", "stage", "transition", "guidance", "noise", "cache", "upscaler", "backbone"
]  # fmt: skip


class LawBroken(AssertionError):
    """A plug-in does not keep a law that mrflow relies on."""


@dataclass(frozen=True)
class Law:
    """A law that plug-ins of one kind keep.

    `sentence` says it in words, `formula` in symbols, `source` where the formula comes from. `check` takes a plug-in
    and the settings of its kind (a solver's `order`) and raises LawBroken.
    """

    kind: Kind
    name: str
    sentence: str
    formula: str
    source: str
    check: Callable[..., None] = field(repr=False)

    def hold(self, subject: object, **settings: object) -> None:
        """Hold a plug-in to this law.

        Raises:
            LawBroken: naming the plug-in, the law, and what was measured.
        """
        try:
            self.check(subject, **settings)
        except LawBroken as broken:
            raise LawBroken(f"{subject!r} breaks the law of {self.kind}s {self.name!r}: {broken}") from None


F = TypeVar("F", bound=Callable[..., None])


class Laws(list[Law]):
    """The laws that plug-ins of one kind keep, in the order in which they are held; most are written in `source`.

    Checks are given what `of` makes of a plug-in and its settings, where it is said.
    """

    def __init__(self, kind: Kind, source: str, of: Callable[..., object] | None = None) -> None:
        super().__init__()
        self.kind: Kind = kind
        self.source, self.of = source, of

    def law(self, name: str, formula: str, source: str = "") -> Callable[[F], F]:
        """A decorator: the function below it checks the law that its docstring says."""

        def add(check: F) -> F:
            def held(subject: object, **settings: object) -> None:
                if self.of is None:
                    check(subject, **settings)
                else:
                    check(self.of(subject, **settings))

            self.append(Law(self.kind, name, check.__doc__ or "", formula, source or self.source, held))
            return check

        return add

    def hold(self, subject: object, **settings: object) -> None:
        """Hold a plug-in to every one of them.

        Raises:
            LawBroken: as `Law.hold`.
        """
        for law in self:
            law.hold(subject, **settings)


def demand(kept: bool, text: str) -> None:  # noqa: FBT001  (reads like assert)
    """Raise LawBroken with this text unless the law is kept."""
    if not kept:
        raise LawBroken(text)

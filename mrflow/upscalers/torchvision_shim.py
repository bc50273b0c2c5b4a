"""torchvision for libraries that import it and hardly use it.

basicsr 1.4.2 imports `torchvision.transforms.functional_tensor`, which torchvision took away in 0.17; spandrel imports
torchvision for two of its architectures. Inside `use_shim` such an import works: the lost module is put back as a view
of `torchvision.transforms.functional`; and where there is no torchvision at all, or one that does not fit torch, every
name of it is a stand-in that raises ImportError when it is used. Afterwards nothing of either is left in `sys.modules`.
"""

import sys
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import NoReturn

LOST = "torchvision.transforms.functional_tensor"
_lock = threading.RLock()


class _Absent(type):
    """A class whose every use says that torchvision is missing."""

    def __getattr__(cls, name: str) -> "_Absent":
        if name.startswith("__"):
            raise AttributeError(name)
        return _absent(f"{cls.__name__}.{name}")

    def __call__(cls, *args: object, **kwargs: object) -> NoReturn:
        raise ImportError(f"{cls.__name__} is needed here, and torchvision cannot be imported: install one that fits")


def _absent(name: str) -> _Absent:
    return _Absent(name, (), {})


class _StandIn(ModuleType):
    __version__ = "0"
    __path__ = []  # noqa: RUF012  # makes it a package to the import system

    def __getattr__(self, name: str) -> _Absent:
        if name.startswith("__"):
            raise AttributeError(name)
        return _absent(f"{self.__name__}.{name}")


class _View(ModuleType):
    def __getattr__(self, name: str) -> object:
        import torchvision.transforms.functional as functional  # type: ignore  # pyright: ignore

        return getattr(functional, name)


class _Finder(MetaPathFinder, Loader):
    """Gives the lost module; and, where torchvision cannot be imported, all of it."""

    def __init__(self, *, whole: bool) -> None:
        self.whole = whole

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        wanted = fullname.split(".")[0] == "torchvision" if self.whole else fullname == LOST
        return ModuleSpec(fullname, self, is_package=self.whole) if wanted else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _StandIn(spec.name) if self.whole else _View(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing is run."""


@contextmanager
def use_shim() -> Generator[None]:
    """Inside, `import torchvision` works as far as importing goes."""
    with _lock:
        try:
            import torchvision  # noqa: F401  # pyright: ignore

            whole = False
        except (ImportError, RuntimeError):  # RuntimeError: one that was built for another torch
            whole = True
            _forget()
        finder = _Finder(whole=whole)
        # The lost module is looked for after the real ones, a whole stand-in before them.
        sys.meta_path.insert(0 if whole else len(sys.meta_path), finder)
        try:
            yield
        finally:
            sys.meta_path.remove(finder)
            if whole:
                _forget()
            elif isinstance(sys.modules.get(LOST), _View):
                del sys.modules[LOST]


def _forget() -> None:
    for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
        del sys.modules[name]

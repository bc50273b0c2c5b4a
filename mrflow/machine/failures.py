"""What others raise as errors of mrflow: named by where it was raised, and told apart where memory ran out."""

import sys

from mrflow.errors import Interruption, MrflowError, PromiseError, ResourceError


def name_stage(error: BaseException, where: str) -> MrflowError:
    """What a stage raised as an error that begins with the stage's name: of its own class where that is mrflow's.

    Memory that ran out becomes a ResourceError, whatever else a PromiseError.
    """
    if isinstance(error, MrflowError):
        kind: type[MrflowError] = next(k for k in type(error).__mro__ if k.__module__ == MrflowError.__module__)
        return kind(f"{where}: {error}")
    if is_out_of_memory(error):
        return ResourceError(
            f"{where}: out of memory; try a smaller size or batch ({words_of(error) or 'MemoryError'})"
        )
    return PromiseError(f"{where}: failed with {type(error).__name__}: {words_of(error)}")


def passes(error: BaseException) -> bool:
    """Whether what came out of code of users is no error of it: Ctrl-C, the exit after a signal, an `Interruption`."""
    ended = isinstance(error, SystemExit) and error.code in (130, 143)
    return ended or isinstance(error, KeyboardInterrupt | Interruption)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception of any kind says that memory ran out, on a GPU or a CPU."""
    said = any(each in words_of(error) for each in ("not enough memory", "can't allocate memory"))
    torch = sys.modules.get("torch")  # only where it was imported can its error have been raised
    return said or isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError))


def words_of(error: BaseException, most: int = 2000) -> str:
    """An exception's text, of at most so many characters; empty where it has none, or where making it fails."""
    try:
        text = str(error).strip()
    except Exception:
        return ""
    return text if len(text) <= most else f"{text[:most]}..."

"""The errors a user can meet. Every message says what is wrong, where, and what to do about it."""


class MrflowError(Exception):
    """Base of every error that mrflow raises on purpose. `exit_code` is what the command line ends with."""

    exit_code = 2


class ChainError(MrflowError, TypeError):
    """Two stages do not fit together."""


class PlanError(MrflowError, ValueError):
    """A chain, a setting or an argument cannot work; found before any tensor was made."""


class PromptError(MrflowError, ValueError):
    """A prompt that the model's text encoder cannot take."""


class WeightsError(MrflowError, ValueError):
    """A checkpoint is missing, broken, or not what was asked for."""

    exit_code = 3


class PromiseError(MrflowError, RuntimeError):
    """A stage made something other than what its plan promised."""

    exit_code = 4


class NonFiniteError(MrflowError, ArithmeticError):
    """NaN or infinity appeared in a tensor."""

    exit_code = 4


class ResourceError(MrflowError, OSError):
    """Memory, disk or a file permission is missing."""

    exit_code = 5


class DeviceLostError(MrflowError, RuntimeError):
    """The device failed in a way that only a new process mends: nothing was written off, the same command goes on."""

    exit_code = 75


class RecordError(MrflowError, ValueError):
    """A picture carries no record, or one that cannot be replayed."""


class Interruption(BaseException):
    """What passes through stages, metrics and other code of users, and is no error of theirs."""

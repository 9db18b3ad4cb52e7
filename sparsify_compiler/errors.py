"""The errors a user can meet. Each message says what was asked, what was found and what to do."""


class SparsifyError(Exception):
    """Anything the user can act on. The command line prints the message alone and exits with status 2."""


class ModelError(SparsifyError):
    """A model that cannot be read, traced or has nothing to prune."""


class TraceError(ModelError):
    """Neither torch.export nor torch.fx could turn the module into a graph."""


class DataError(SparsifyError):
    """Calibration or evaluation data that does not fit the model, or none where a method needs some."""


class CalibrationError(DataError):
    """Statistics that cannot be used: non-finite activations, or a site that saw no tokens."""


class RecipeError(SparsifyError):
    """A recipe with an unknown key, a rule that matches nothing, or an impossible value."""


class PatternError(RecipeError):
    """A pattern that cannot be parsed, or that does not tile the weight it was asked for."""


class SingularGramError(CalibrationError):
    """A Gram matrix that stayed indefinite after every stated step of damping."""


class KernelError(SparsifyError):
    """A sparse kernel that cannot take the weight or input it was given."""


class ExportError(SparsifyError):
    """A file that could not be written, or that this model cannot be written as."""


class VerificationError(ExportError):
    """An exported file whose outputs differ from the model's beyond the stated tolerance."""


class TrustError(SparsifyError):
    """An input that would run code, given without `trust`."""


class FallbackWarning(UserWarning):
    """A sparse layer that runs dense where it was moved to, because its kernel cannot run there."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error that others raised, or its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

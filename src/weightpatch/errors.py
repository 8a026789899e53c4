# ruff: noqa: N818 - the names say what is wrong; "Error" would add nothing
"""The errors of weightpatch: every one says what was given, what was expected and what to do next.

WeightpatchError
├── InvalidInput (ValueError)
│   ├── ShapeMismatch
│   ├── NonFinite
│   ├── ConflictingConstraints
│   └── NothingToEdit
├── NotEditable (TypeError)
├── PatchError
│   ├── PatchDamaged (ValueError)
│   ├── BaseMismatch
│   └── PatchConflict
├── EditFailed
└── MissingExtra (ImportError)
"""


class WeightpatchError(Exception):
    """Anything that weightpatch refuses or cannot do."""


class InvalidInput(WeightpatchError, ValueError):
    """An argument's value cannot be used."""


class ShapeMismatch(InvalidInput):
    """Tensors that belong together have shapes that do not."""


class NonFinite(InvalidInput):
    """A value that has to be finite is NaN or infinite."""


class ConflictingConstraints(InvalidInput):
    """Two constraints ask the same input for different answers."""


class NothingToEdit(InvalidInput):
    """No parameter of the model matches the given names."""


class NotEditable(WeightpatchError, TypeError):
    """The model, or one of its parameters, is of a kind that cannot be edited."""


class PatchError(WeightpatchError):
    """A patch could not be made, read, written, applied or reverted."""


class PatchDamaged(PatchError, ValueError):
    """The bytes are not a patch, or no longer the patch that was saved."""


class BaseMismatch(PatchError):
    """The patch was made for other weights than these."""


class PatchConflict(PatchError):
    """The patch cannot be applied or reverted given the patches that are applied already."""


class EditFailed(WeightpatchError):
    """An edit ended without meeting its constraint."""


class MissingExtra(WeightpatchError, ImportError):
    """A feature needs a package that is not installed; the message names the extra to install."""

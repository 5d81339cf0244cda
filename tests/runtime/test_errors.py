"""The tree of errors."""

import pytest

from offramp.runtime import errors

BUILTINS = {
    "BundleNotFound": FileNotFoundError,
    "BadBundle": ValueError,
    "BadManifest": errors.BadBundle,
    "BadSignature": errors.BadBundle,
    "BadInput": ValueError,
    "BadSetting": ValueError,
    "WrongTask": AttributeError,
    "EngineUnavailable": RuntimeError,
    "OutOfMemory": MemoryError,
    "DeviceFailed": RuntimeError,
    "OutputFailed": OSError,
    "SessionForked": RuntimeError,
    "SessionClosed": RuntimeError,
}


@pytest.mark.parametrize(("name", "builtin"), BUILTINS.items())
def test_error_inherits_the_base_and_the_builtin_that_fits(name: str, builtin: type[Exception]) -> None:
    error = getattr(errors, name)
    assert issubclass(error, errors.OfframpError) and issubclass(error, builtin)
    assert name in (errors.__doc__ or "")


def test_every_error_is_in_the_tree() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    names = {kind.__name__ for kind in kinds if issubclass(kind, errors.OfframpError)}
    assert names == {"OfframpError", *BUILTINS}

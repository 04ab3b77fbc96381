"""Makes the model that a command is to look at."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def make(factory: str, arguments: str = "{}") -> nn.Module:
    """`load`, and insist on a module.

    Raises:
        ValueError: see `load`; or it is no module.
    """
    from torch import nn

    found = load(factory, arguments)
    if not isinstance(found, nn.Module):
        raise ValueError(f"{factory!r} is a {type(found).__name__}, not a torch.nn.Module.")  # noqa: TRY004  # the user's text
    return found


def load(factory: str, arguments: str = "{}") -> Any:
    """Import what `package.module:name` says and call it with keyword arguments where it is not a model yet.

    Raises:
        ValueError: not of that form, not importable, no such name; arguments that are no JSON object.
    """
    from torch import nn

    found = find(factory)
    if not isinstance(found, nn.Module):
        try:
            given = json.loads(arguments)
        except ValueError as error:
            raise ValueError(f"--arguments {arguments!r} is no JSON: {error}.") from error
        if not isinstance(given, dict):
            raise ValueError(f"--arguments {arguments!r} is no JSON object such as '{{\"n_src\": 2}}'.")  # noqa: TRY004  # the user's text
        found = found(**given)
    return found


def find(factory: str) -> Any:
    """Import what `package.module:name` says.

    Raises:
        ValueError: not of that form, not importable, no such name.
    """
    path, separator, name = factory.partition(":")
    if not (separator and path and name):
        raise ValueError(f"{factory!r} is not of the form package.module:name.")
    sys.path.insert(0, str(Path.cwd()))  # as `python -m` does: the user's own code lies where they stand
    try:
        found: Any = importlib.import_module(path)
    except ImportError as error:
        raise ValueError(
            f"Cannot import {path!r}: {error}. Run from the folder that holds it, or install it."
        ) from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise ValueError(f"{path!r} has no {name!r}.")
        found = getattr(found, part)
    return found

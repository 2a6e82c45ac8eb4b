"""Every exception Quire raises on purpose.

QuireError
├── ArgumentError (ValueError)    a value no backend could accept
│   ├── ShapeError                ... wrong shape, stride or layout
│   ├── DtypeError                ... wrong dtype
│   └── DeviceError               ... on the wrong device
├── UnsupportedError              a sound request that this backend, model or machine cannot serve
├── OutOfPages (MemoryError)      the pool has no page left; nothing was changed
├── PageStateError                a page is not what its owner takes it for: its counts or its content were changed
└── ModelError                    a folder or configuration that is no usable model

Each message is one sentence in four parts: the name, what was expected, what came, and the fix.
"""

from __future__ import annotations


class QuireError(Exception):
    """Base of all errors raised by Quire."""


class ArgumentError(QuireError, ValueError):
    """An argument that no backend could accept."""


class ShapeError(ArgumentError):
    """An argument with the wrong shape, strides or number of dimensions."""


class DtypeError(ArgumentError):
    """An argument with the wrong dtype."""


class DeviceError(ArgumentError):
    """An argument that lives on the wrong device."""


class UnsupportedError(QuireError):
    """A sound request that the chosen backend, model or machine cannot serve."""


class OutOfPages(QuireError, MemoryError):
    """The pool has too few free pages; nothing was changed by the failed request."""


class PageStateError(QuireError):
    """A page whose owners or content are not what a sequence takes them for; no token was computed from it."""


class ModelError(QuireError):
    """A folder, checkpoint or configuration that is not a usable model."""


# Packages of the extras of pyproject.toml, by their import names.
_EXTRAS = {
    "hf": ("huggingface_hub", "rich", "safetensors", "tokenizers", "transformers", "typer"),
    "serve": ("fastapi", "llguidance", "prometheus_client", "pydantic", "starlette", "uvicorn"),
}


def extra_is_missing(what: str, error: ModuleNotFoundError) -> UnsupportedError:
    """The sentence for a failed import of a package of an extra; any other failed import is raised again.

    what: what cannot be used without it.
    """
    package = (error.name or "").partition(".")[0]
    for extra, packages in _EXTRAS.items():
        if package in packages:
            return UnsupportedError(
                f"{what} needs {package}, which is not installed. Fix: pip install '.[{extra}]' in Quire's folder"
            )
    raise error

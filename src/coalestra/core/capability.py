"""What the installed version offers, for applications that want to know before they start."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import field
from typing import Any

from coalestra import __version__
from coalestra.core import health
from coalestra.core.errors import ERROR_DIAGNOSTICS_SCHEMA_VERSION, CapabilityRequirementError
from coalestra.core.frozen import FrozenDict, record
from coalestra.core.serialization import json_safe
from coalestra.core.validation import instance, integer, mapping, text

__all__ = [
    "COALESTRA_API_STABILITY", "COALESTRA_CAPABILITIES_SCHEMA",
    "COALESTRA_CAPABILITIES_SCHEMA_VERSION", "CoalestraCapabilities", "capabilities",
    "require_capabilities",
]  # fmt: skip

COALESTRA_API_STABILITY = "0.6"
"""The series of versions that keep to this API."""

COALESTRA_CAPABILITIES_SCHEMA = "coalestra.capabilities"
"""The name of the JSON schema of ``CoalestraCapabilities.to_dict``."""

COALESTRA_CAPABILITIES_SCHEMA_VERSION = 1
"""The version of that schema."""

_FEATURES = (
    "automatic_observability_buffering", "blocking_source_timeout_guarantees",
    "builder_health_assessment", "builder_health_serialization", "controlled_payload_copy_shutdown",
    "payload_copy_health", "payload_copy_offload", "snapshot_acceptance", "snapshot_consistency",
    "snapshot_requests", "source_authority", "sync_submission_backlog",
    "transactional_revalidation", "versioned_error_diagnostics",
)  # fmt: skip


_SCHEMAS = {
    "builder_health": health.BUILDER_HEALTH_SCHEMA_VERSION,
    "builder_health_assessment": health.BUILDER_HEALTH_ASSESSMENT_SCHEMA_VERSION,
    "capabilities": COALESTRA_CAPABILITIES_SCHEMA_VERSION,
    "error_diagnostics": ERROR_DIAGNOSTICS_SCHEMA_VERSION,
}
_DEFAULTS = {
    "allow_unsafe_blocking_sources": False,
    "buffer_observability": "auto",
    "require_source_timeout_declarations": True,
}


@record
class CoalestraCapabilities:
    """What a version of the library offers.

    Attributes:
        package_version: the version itself.
        api_stability: the series of versions that keep to this API.
        python_requires: the versions of Python it runs on.
        stability: how settled it is.
        features: the names of what it can do.
        schemas: the version of each JSON schema it writes, by name.
        defaults: how the settings that concern safety stand unless set.
    """

    package_version: str
    api_stability: str = COALESTRA_API_STABILITY
    python_requires: str = ">=3.10"
    stability: str = "beta"
    features: tuple[str, ...] = _FEATURES
    schemas: Mapping[str, int] = field(default_factory=lambda: _SCHEMAS)
    defaults: Mapping[str, Any] = field(default_factory=lambda: _DEFAULTS)

    def __post_init__(self) -> None:
        object.__setattr__(self, "features", tuple(self.features))
        object.__setattr__(self, "schemas", FrozenDict(self.schemas))
        object.__setattr__(self, "defaults", FrozenDict(self.defaults))

    def supports(self, feature: str) -> bool:
        """Return whether the version has the feature of that name."""
        return feature in self.features

    def require(
        self, *, features: Iterable[str] = (), schemas: Mapping[str, int] | None = None
    ) -> None:
        """Raise unless the version has every feature, and every schema in at least the version.

        Raises:
            CapabilityRequirementError: naming everything that is missing or too old.
        """
        if isinstance(features, (str, bytes)):
            raise TypeError(
                f"features must be a collection of names, got {features!r}; write ({features!r},)"
            )
        wanted = [text("features", name) for name in instance("features", features, (Iterable,))]
        missing = tuple(name for name in dict.fromkeys(wanted) if not self.supports(name))
        mismatches: dict[str, tuple[int, int | None]] = {}
        for name, minimum in mapping("schemas", schemas, optional=True).items():
            integer(f"schemas[{text('schemas', name)!r}]", minimum, minimum=1)
            installed = self.schemas.get(name)
            if installed is None or installed < minimum:
                mismatches[name] = (minimum, installed)
        if missing or mismatches:
            raise CapabilityRequirementError(missing_features=missing, schema_mismatches=mismatches)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON-safe data."""
        return {
            "schema": COALESTRA_CAPABILITIES_SCHEMA,
            "schema_version": COALESTRA_CAPABILITIES_SCHEMA_VERSION,
            **json_safe(self),
        }


def capabilities() -> CoalestraCapabilities:
    """Return what the installed version offers; always the same object."""
    return _INSTALLED


def require_capabilities(
    *, features: Iterable[str] = (), schemas: Mapping[str, int] | None = None
) -> CoalestraCapabilities:
    """Return what the installed version offers if that is enough for the application.

    It is judged by `CoalestraCapabilities.require`.
    """
    _INSTALLED.require(features=features, schemas=schemas)
    return _INSTALLED


_INSTALLED = CoalestraCapabilities(__version__)

"""A builder's health: the facts, their JSON form and their verdict."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from coalestra.core.assessment import BuilderHealthAssessment, BuilderHealthAssessmentPolicy
from coalestra.core.assessment_rules import assess
from coalestra.core.health_facts import HealthFacts
from coalestra.core.serialization import json_safe
from coalestra.core.validation import flag, instance

BUILDER_HEALTH_SCHEMA = "coalestra.builder-health"
"""The name of the JSON schema of ``BuilderHealth.to_dict``."""

BUILDER_HEALTH_SCHEMA_VERSION = 1
"""The version of that schema."""


@dataclass(frozen=True)
class BuilderHealth(HealthFacts):
    """The state of a builder at one moment; the attributes are those of ``HealthFacts``."""

    def assess(
        self,
        *,
        previous: BuilderHealth | None = None,
        policy: BuilderHealthAssessmentPolicy | None = None,
    ) -> BuilderHealthAssessment:
        """Judge this snapshot.

        Args:
            previous: an earlier snapshot of the same builder; with it the growth of the failure
                counters is judged too.
            policy: the thresholds; the default ones if None.

        Raises:
            TypeError: for an argument of another type.
        """
        instance("previous", previous, BuilderHealth, optional=True)
        instance("policy", policy, BuilderHealthAssessmentPolicy, optional=True)
        return assess(self, previous=previous, policy=policy)

    def to_dict(
        self,
        *,
        include_assessment: bool = True,
        previous: BuilderHealth | None = None,
        assessment_policy: BuilderHealthAssessmentPolicy | None = None,
    ) -> dict[str, Any]:
        """Return every attribute, and the verdict, as JSON-safe data.

        Args:
            include_assessment: if False, ``assessment`` is None.
            previous: see ``assess``.
            assessment_policy: see ``assess``.

        Raises:
            TypeError: for an argument of another type.
        """
        verdict: BuilderHealthAssessment | None = None
        if flag("include_assessment", include_assessment):
            verdict = self.assess(previous=previous, policy=assessment_policy)
        return {
            "schema": BUILDER_HEALTH_SCHEMA,
            "schema_version": BUILDER_HEALTH_SCHEMA_VERSION,
            **json_safe(self),
            "assessment": None if verdict is None else verdict.to_dict(),
        }

"""One patient's deciding attenuation over time, without the patient's name: studies linked by a keyed digest."""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass
from datetime import date


@dataclass(frozen=True, slots=True)
class EarlierValue:
    """The deciding attenuation in HU of a study of one patient."""

    study_date: date
    index_hu: float


@dataclass(frozen=True, slots=True)
class TrendPoint:
    """What is remembered of a study for the trend; ``patient_key`` is `patient_key`'s digest."""

    patient_key: str
    value: EarlierValue


def patient_key(secret: bytes, patient_id: str, issuer: str, birth_date: str) -> str | None:
    """HMAC-SHA256 over ID, issuer and birth date: equal for one patient, and nothing without the secret.

    None when ID or birth date is missing: an ID alone may be an anonymiser's or one that a system gave twice, and a
    link between two persons is worse than none.
    """
    parts = [part.strip() for part in (issuer, patient_id, birth_date)]
    if not parts[1] or not parts[2]:
        return None
    text = "".join(f"{len(part)}:{part}" for part in parts)
    return hmac.new(secret, text.encode(), hashlib.sha256).hexdigest()

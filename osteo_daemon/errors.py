"""Every exception of the product in one tree.

The class is the policy, its docstring is the message: ``str(error)`` gives the docstring's first line followed by
what the raiser adds. No code decides by matching on message text.

==================== =====================================================================
``Transient``        the same step may succeed later: retry with back-off
``Refused``          the peer says no for good: fail that delivery, keep the object
``Damaged``          what was received cannot be used: hold the study, keep every byte
``ConfigurationError`` ``BundleError``  refuse to start
``LeaseLost``        another worker holds the job: drop the work, commit nothing
==================== =====================================================================

`exit_status` says how a command ends that one of them ended.

Nothing here may carry patient identity: messages reach logs and the event table.
"""

from __future__ import annotations

from enum import IntEnum


class ExitStatus(IntEnum):
    """How ``osteo`` ends; the words are those of docs/cli.md."""

    meaning: str

    def __new__(cls, number: int, meaning: str) -> ExitStatus:
        """A number that knows its meaning."""
        status = int.__new__(cls, number)
        status._value_ = number
        status.meaning = meaning
        return status

    DONE = 0, "done; what was asked about is as it should be"
    AMISS = 1, "done, and something is not as it should be (or the person said no, or osteo itself failed)"
    REFUSED_TO_START = 2, "wrong usage, settings or bundle: put that right first; nothing was done"
    UNUSABLE = 3, "what was named can't be used, or can't be done to it: the message says why"
    LATER = 4, "a peer, the job store or the disk can't do it now: the same command may succeed later"


class OsteoError(Exception):
    """Something went wrong in osteo_daemon"""

    def __init__(self, detail: str = "") -> None:
        self.detail = detail
        message = (type(self).__doc__ or "").strip().splitlines()[0].rstrip(".")
        super().__init__(f"{message}: {detail}" if detail else message)


class ConfigurationError(OsteoError):
    """The settings cannot be used"""


class BundleError(OsteoError):
    """A model bundle cannot be used"""


class Transient(OsteoError):
    """A step failed that may succeed later"""


class StoreUnavailable(Transient):
    """The job store did not answer"""


class SpoolFull(Transient):
    """The spool has no room"""


class QuotaExceeded(Transient):
    """The sender has had its share for the time being"""


class PeerUnavailable(Transient):
    """The peer did not answer or asked to try again"""


class WorkerDied(Transient):
    """The screening process ended by itself"""


class PeerBusy(PeerUnavailable):
    """The peer answers, but cannot do this for now"""


class Refused(OsteoError):
    """The peer refuses this object for good"""


class Damaged(OsteoError):
    """What was received cannot be used"""


class NotDicom(Damaged):
    """The file is not a readable DICOM object"""


class PixelDataUnreadable(Damaged):
    """The pixel data cannot be decoded"""


class UnsupportedSopClass(Damaged):
    """The SOP class is not one that this node stores"""


class DataSetMismatch(Damaged):
    """The data set is not the object that the command announces"""


class ConflictingInstance(Damaged):
    """Other pixels arrived under a SOP Instance UID that is already stored"""


class MalformedMessage(Damaged):
    """A message over HTTP cannot be read"""


class Declined(OsteoError):
    """A peer asks for something that is not done

    ``status`` (PS3.7 annex C) and ``error_id`` (0000,0903) tell the peer why.
    """

    def __init__(self, status: int, detail: str, error_id: int | None = None) -> None:
        self.status = status
        self.error_id = error_id
        super().__init__(detail)


class LeaseLost(OsteoError):
    """The lease on this job has passed to another worker"""


class IllegalTransition(OsteoError):
    """The job cannot change to that state"""


class NotEligible(OsteoError):
    """The study is not eligible for screening

    A normal outcome, never an error of the node. ``code`` is one of `osteo_daemon.domain.eligibility.ExclusionCode`.
    """

    def __init__(self, code: str, reason: str) -> None:
        self.code = code
        self.reason = reason
        super().__init__(f"{code}: {reason}")


class VertebraeUnusable(OsteoError):
    """Vertebrae that came from outside cannot be used

    The localiser's network takes over; the manifest keeps the reason.
    """


class RefitRefused(OsteoError):
    """The site's labels do not allow a refit

    A normal outcome: more or better labels are needed, or what is odd about them must be looked into.
    """


def exit_status(error: OsteoError) -> ExitStatus:
    """How a command ends that this error ended: by its class alone."""
    if isinstance(error, ConfigurationError | BundleError):
        return ExitStatus.REFUSED_TO_START
    return ExitStatus.LATER if isinstance(error, Transient) else ExitStatus.UNUSABLE

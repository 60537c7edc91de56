"""What a challenger may lose against the champion, and when its canary is ended."""

from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from registry.core.errors import UsageError
from registry.model.refs import Share


class CanaryPolicy(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """When a canary is ended: the table ``[canary]`` of a policy.

    The canary guard checks the traffic after ``min_requests`` requests to the challenger. It ends
    the canary if the challenger's error rate is more than ``max_error_gap`` above the champion's
    and chance does not explain that. It also ends the canary if the challenger's mean time is more
    than ``max_latency_ratio`` times the champion's, and its median is longer, too. No client waits
    for a shadow, so its times do not count: the guard ends it for failures, and for agreement with
    the champion below ``min_agreement`` if that is set.
    """

    min_requests: Annotated[int, Meta(ge=1)] = 50
    max_error_gap: Share = 0.01
    max_latency_ratio: Annotated[float, Meta(gt=0)] = 3.0
    min_agreement: Share | None = None


class Policy(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a challenger may lose against the champion. A file ``policies/NAME.toml`` changes it.

    The gate refuses a loss of accuracy that is significant, and any loss above
    ``max_accuracy_loss``. It refuses a loss of a class's recall above ``max_recall_loss`` if it is
    significant or if its whole 95 % interval lies beyond that limit. The significance is shared
    among the classes (Bonferroni), because with many classes one soon differs by chance. A forward
    pass on the machine of the gate may take ``max_latency_ratio`` times the champion's. The
    expected calibration error (``max_calibration_loss``) and the log loss (``max_log_loss_ratio``)
    have no limit by default: a version that is right more often may well be less sure of it.

    The gate compares on the pictures that both versions held out, if there are at least
    ``min_examples``, or half of what the champion held out if that is less.
    ``registry.promotion.pairing`` says what happens with fewer.
    """

    min_examples: Annotated[int, Meta(ge=1)] = 30
    significance: Annotated[float, Meta(gt=0, lt=1)] = 0.05
    max_accuracy_loss: Share = 0.005
    max_recall_loss: Share = 0.03
    max_calibration_loss: Share | None = None
    max_log_loss_ratio: Annotated[float, Meta(gt=0)] | None = None
    max_latency_ratio: Annotated[float, Meta(gt=0)] = 2.0
    canary: CanaryPolicy = CanaryPolicy()


def read_policy(file: Path) -> Policy:
    """The policy in ``file``; the default policy if there is no such file.

    Raises:
        UsageError: the file cannot be read, or contains a name that a policy does not have.
    """
    try:
        return msgspec.toml.decode(file.read_bytes(), type=Policy)
    except FileNotFoundError:
        return Policy()
    except (OSError, msgspec.MsgspecError, ValueError) as error:
        raise UsageError(f"the policy {file} cannot be used: {error}") from error

"""What a challenger may lose against the champion, and when its trial is ended."""

from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from registry.core.errors import UsageError
from registry.model.refs import Share


class CanaryPolicy(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """When a trial on real traffic is ended: the table ``[canary]`` of a policy.

    Once the challenger has had ``min_requests``, its error rate may be ``max_error_gap`` above the
    champion's, unless that may be chance, and its mean time ``max_latency_ratio`` times the
    champion's, unless its median is no longer. In the shadow, where nobody waits, only failures
    count, and, if it is given, ``min_agreement`` with the champion.
    """

    min_requests: Annotated[int, Meta(ge=1)] = 50
    max_error_gap: Share = 0.01
    max_latency_ratio: Annotated[float, Meta(gt=0)] = 3.0
    min_agreement: Share | None = None


class Policy(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a challenger may lose against the champion. A file ``policies/NAME.toml`` changes it.

    A loss of accuracy is refused when it is significant, or more than ``max_accuracy_loss`` in any
    case; one of a class's recall when it is more than ``max_recall_loss`` and significant, with the
    significance shared among the classes (Bonferroni), as one of many differs by chance soon, or
    when all of its 95 % interval is below that. A forward pass on the judging machine may take
    ``max_latency_ratio`` times the champion's. How much the expected calibration error may rise,
    and by what the log loss may be multiplied, has no limit until it is given one: a version that
    is right more often may well be less sure of it.

    The two are compared on the pictures that both held out, if these are at least ``min_examples``,
    or half of what the champion held out. ``registry.promotion.pairing`` has what follows if they
    are fewer.
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
    """The policy in ``file``; the default one when there is no such file.

    Raises:
        UsageError: it cannot be read, or names something that is no part of a policy.
    """
    try:
        return msgspec.toml.decode(file.read_bytes(), type=Policy)
    except FileNotFoundError:
        return Policy()
    except (OSError, msgspec.MsgspecError, ValueError) as error:
        raise UsageError(f"the policy {file} cannot be used: {error}") from error

"""The audit log of a model: its decisions, with author, time and reason.

The log is append-only. A line that changes the champion or the canary claims to be the model's
next move. If several lines claim the same move, the first one stands and the others are overtaken.
So the order of the lines decides between operators who act at once, and every reader gets the same
result. No lock is needed, and no compare-and-set, which the registry's aliases do not have.

The line numbers show that a line is missing. They do not show that a line was rewritten: an account
that may write to the registry can rewrite the log (SECURITY.md). This module only reads lines;
``AuditLogStore`` knows where they are kept.
"""

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Literal

import msgspec
from msgspec import Struct

from registry.core.errors import UsageError
from registry.core.names import Sha256, shortened
from registry.model.refs import Canary

Action = Literal[
    "promoted", "forced", "rolled back", "adopted", "refused", "canary started", "canary stopped"
]
# A line is a tag of at most 100,000 characters in MLflow; JSON writes a control character as six.
MAX_TEXT_CHARS = 8_000
MAX_AUTHOR_CHARS = 200
# Actions that set the champion. Each of them also stops a canary.
CHAMPION_ACTIONS = ("promoted", "forced", "rolled back", "adopted")


def moments(day: str) -> tuple[datetime, datetime]:
    """The first and the last moment of a day in UTC, or twice a moment that has a time.

    Raises:
        UsageError: it is neither.
    """
    try:
        moment = datetime.fromisoformat(day)
    except ValueError as error:
        raise UsageError(f"at is {day!r}; write 2026-11-17 or 2026-11-17T15:00") from error
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return moment, moment if len(day) > 10 else moment + timedelta(days=1, microseconds=-1)


class Entry(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One decision, written before it is carried out.

    It has many fields because a line of the audit log must be complete in itself.

    Attributes:
        action: the kind of decision. ``adopted``: the alias was moved by other means than Convoy.
        at: UTC in ISO 8601, by the writer's clock.
        by: the name of the token that decided; "NAME (unverified)" where the command line took a
            name from its environment; or a machine.
        to_version: the version that the decision is about.
        details: the gate result, or what else explains the decision.
        canary: what a line ``canary started`` began.
        move: the number that the line claims among the model's moves; a refusal has none.
        nonce: a random text. Lines of one repeated call share it, those of two operators do not.
    """

    action: Action
    at: str
    by: str
    from_version: int | None
    to_version: int
    from_manifest_sha256: Sha256 | None = None
    to_manifest_sha256: Sha256 | None = None
    reason: str | None = None
    details: str | None = None
    canary: Canary | None = None
    move: int | None = None
    nonce: str = ""

    def __post_init__(self) -> None:
        if datetime.fromisoformat(self.at).tzinfo is None:
            raise ValueError(f"at is {self.at}, without its time zone")

    def to_json(self) -> bytes:
        """UTF-8 JSON with sorted keys: equal entries give equal bytes."""
        return msgspec.json.encode(self, order="sorted")

    @property
    def sets_champion(self) -> bool:
        """Whether this line sets the champion."""
        return self.action in CHAMPION_ACTIONS


class Line(Struct, frozen=True, kw_only=True):
    """An entry with its number. ``stands`` is false for a move that another line overtook."""

    number: int
    entry: Entry
    stands: bool


class AuditLog:
    """The lines of one model's audit log, oldest first, and what follows from them."""

    def __init__(self, rows: Iterable[tuple[int, bytes]] = ()) -> None:
        """Read ``rows``: the number of each line and its JSON, in any order."""
        self.lines: list[Line] = []
        self._numbers: set[int] = set()
        self._unreadable: dict[int, str] = {}
        moves = 0
        for number, data in sorted(rows):
            self._numbers.add(number)
            try:
                entry = msgspec.json.decode(data, type=Entry)
            except (msgspec.MsgspecError, ValueError, RecursionError) as error:
                self._unreadable[number] = str(error)
                continue
            stands = entry.move is None or entry.move > moves
            if stands and entry.move is not None:
                moves = entry.move
            self.lines.append(Line(number=number, entry=entry, stands=stands))

    @property
    def moves(self) -> list[Line]:
        """The moves that stand."""
        return [line for line in self.lines if line.stands and line.entry.move is not None]

    @property
    def champion_moves(self) -> list[Line]:
        """The moves that stand and set the champion."""
        return [line for line in self.moves if line.entry.sets_champion]

    @property
    def champion(self) -> int | None:
        """The version that should serve; None before the first move."""
        return self.champion_moves[-1].entry.to_version if self.champion_moves else None

    @property
    def previous(self) -> int | None:
        """The version that was champion before."""
        return self.champion_moves[-1].entry.from_version if self.champion_moves else None

    @property
    def canary(self) -> Canary | None:
        """The canary beside the champion."""
        return self.moves[-1].entry.canary if self.moves else None

    @property
    def last(self) -> int:
        """The number of the newest line; 0 when there is none."""
        return max(self._numbers, default=0)

    def continued(self, entry: Entry) -> Entry:
        """``entry`` as the next line, and unless it is a refusal, the next move.

        Its texts are cut to what the registry takes: an error of any length can be written down.
        """
        moves = self.moves
        latest = moves[-1].entry.move or 0 if moves else 0
        return msgspec.structs.replace(
            entry,
            move=None if entry.action == "refused" else latest + 1,
            by=shortened(entry.by, MAX_AUTHOR_CHARS),
            reason=entry.reason and shortened(entry.reason, MAX_TEXT_CHARS),
            details=entry.details and shortened(entry.details, MAX_TEXT_CHARS),
        )

    def champion_periods(self, start: datetime, end: datetime) -> list[Line]:
        """The lines whose champion was that at some moment from ``start`` to ``end``, in order.

        Both must know their time zone. The lines' order counts, not their clocks: a move that
        claims to be older than one before it happened at the same moment.
        """
        began: list[datetime] = []
        champion_moves = self.champion_moves
        for line in champion_moves:
            at = datetime.fromisoformat(line.entry.at)
            began.append(max(at, began[-1]) if began else at)
        ended = [*began[1:], datetime.max.replace(tzinfo=UTC)]
        return [
            line
            for line, first, last in zip(champion_moves, began, ended, strict=False)
            if first <= end and last > start
        ]

    def faults(self, newest: int | None = None) -> list[str]:
        """Lines that are missing or cannot be read; a line that was rewritten is not found.

        Args:
            newest: the number of the newest line, as it was noted elsewhere; without it, a log that
                was cut off at its end cannot be told from a shorter one.
        """
        faults = [
            f"line {number} cannot be read: {why}" for number, why in self._unreadable.items()
        ]
        if self._numbers and newest is None:
            faults.append("nothing says which line was the newest: some may be missing at the end")
        last = max(self.last, newest or 0)
        return faults + [
            f"line {n} is missing" for n in range(1, last + 1) if n not in self._numbers
        ]

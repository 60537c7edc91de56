"""What the lines of an audit log mean, also after races, and which faults it finds."""

from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.model.refs import Canary
from registry.store.audit_log import Action, AuditLog, Entry


def entry(
    to_version: int, action: Action = "promoted", at: str = "2026-11-17T08:00:00+00:00", **more: Any
) -> Entry:
    return Entry(action=action, at=at, by="me", from_version=None, to_version=to_version, **more)


def written(*entries: Entry) -> list[tuple[int, bytes]]:
    """Rows of writers that had each read all earlier rows."""
    rows: list[tuple[int, bytes]] = []
    for number, each in enumerate(entries, start=1):
        rows.append((number, AuditLog(rows).continued(each).to_json()))
    return rows


def moved(*versions: int) -> list[tuple[int, bytes]]:
    return written(*(entry(version) for version in versions))


def test_an_empty_audit_log_has_no_champion() -> None:
    audit_log = AuditLog()
    assert (audit_log.champion, audit_log.previous, audit_log.moves, audit_log.faults()) == (
        None,
        None,
        [],
        [],
    )


def test_the_last_move_says_which_version_is_champion() -> None:
    rows = written(
        entry(1),
        entry(2),
        entry(3, "refused"),
        entry(1, "rolled back"),
    )
    audit_log = AuditLog(rows)
    assert audit_log.champion == 1
    assert [line.entry.action for line in audit_log.moves] == [
        "promoted",
        "promoted",
        "rolled back",
    ]
    assert audit_log.lines[2].stands  # a refusal is not a move, so no line overtakes it
    assert audit_log.faults(newest_of(rows)) == []


def test_the_first_line_of_concurrent_promotions_stands() -> None:
    rows = moved(1)
    seen = AuditLog(rows)
    rivals = [seen.continued(entry(version)).to_json() for version in (2, 3, 4)]
    rows += list(enumerate(rivals, start=2))
    audit_log = AuditLog(rows)
    assert [line.stands for line in audit_log.lines] == [True, True, False, False]
    assert audit_log.champion == 2
    assert audit_log.faults(newest_of(rows)) == []
    later = [*rows, (5, audit_log.continued(entry(5)).to_json())]
    assert AuditLog(later).champion == 5
    assert AuditLog(later).faults(newest_of(later)) == []


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12))
def test_writers_with_outdated_copies_agree_on_the_moves(lags: list[int]) -> None:
    """Each writer has not read the last few lines; exactly one move stands for each number."""
    rows: list[tuple[int, bytes]] = []
    for number, lag in enumerate(lags, start=1):
        seen = AuditLog(rows[: max(0, len(rows) - lag)])
        rows.append((number, seen.continued(entry(number)).to_json()))
    audit_log = AuditLog(reversed(rows))  # the registry may list them in any order
    numbers = [line.entry.move for line in audit_log.moves]
    assert numbers == list(range(1, len(numbers) + 1))
    assert audit_log.champion == audit_log.moves[-1].entry.to_version
    assert audit_log.faults(newest_of(rows)) == []


def newest_of(rows: list[tuple[int, bytes]]) -> int:
    return AuditLog(rows).last


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_a_missing_or_unreadable_line_is_a_fault(number: int) -> None:
    rows = moved(1, 2, 3)
    rows.append((4, AuditLog(rows[:2]).continued(entry(4)).to_json()))  # a race with line 3
    newest = newest_of(rows)
    assert AuditLog(rows).faults(newest) == []
    removed = [row for row in rows if row[0] != number]
    assert AuditLog(removed).faults(newest) == [f"line {number} is missing"]
    garbage = [(n, b"{" if n == number else old) for n, old in rows]
    assert any("cannot be read" in fault for fault in AuditLog(garbage).faults(newest))


@pytest.mark.parametrize(
    "text", ["x" * 1_000_000, "\x00" * 1_000_000, "ä\n" * 500_000, "\udcff" * 1_000_000]
)
def test_a_line_with_texts_of_any_length_fits_a_tag_of_the_registry(text: str) -> None:
    long = msgspec.structs.replace(entry(1, reason=text, details=text), by=text)
    line = AuditLog().continued(long)
    assert len(line.to_json().decode()) < 100_000
    assert line.reason is not None
    assert line.reason.endswith("… (1,000,000 characters)")


def test_the_champions_of_a_period() -> None:
    rows = written(
        entry(1, at="2026-11-10T09:00:00+00:00"),
        entry(2, at="2026-11-17T15:00:00+00:00"),
        entry(1, "rolled back", at="2026-11-17T14:59:00+00:00"),  # by a clock that is behind
        entry(3, at="2026-11-18T08:00:00+00:00"),
    )
    audit_log = AuditLog(rows)

    def during(*hours: tuple[int, int]) -> list[int]:
        start, end = (datetime(2026, 11, day, hour, tzinfo=UTC) for day, hour in hours)
        return [line.entry.to_version for line in audit_log.champion_periods(start, end)]

    assert during((9, 0), (9, 23)) == []
    assert during((9, 0), (10, 23)) == [1]
    assert during((12, 0), (12, 0)) == [1]
    assert during((17, 0), (17, 23)) == [1, 2, 1]
    assert during((17, 16), (18, 12)) == [1, 3]
    assert during((19, 0), (20, 0)) == [3]
    assert AuditLog().champion_periods(datetime.min.replace(tzinfo=UTC), datetime.now(UTC)) == []


def test_without_a_note_of_the_newest_line_the_end_may_be_missing() -> None:
    assert AuditLog(moved(1, 2)).faults() == [
        "nothing says which line was the newest: some may be missing at the end"
    ]
    assert AuditLog().faults() == []


def test_a_missing_line_does_not_undo_later_lines() -> None:
    rows = [row for row in moved(1, 2, 3, 4) if row[0] != 3]
    assert AuditLog(rows).champion == 4
    again = AuditLog(rows).continued(entry(5))
    assert AuditLog([*rows, (5, again.to_json())]).champion == 5


def test_a_canary_lasts_until_it_is_stopped_or_the_champion_changes() -> None:
    canary = Canary(version=2, share=0.1)
    started = entry(2, "canary started", canary=canary)
    rows = written(entry(1), started)
    audit_log = AuditLog(rows)
    assert (audit_log.champion, audit_log.previous, audit_log.canary) == (1, None, canary)
    assert AuditLog(written(entry(1), started, entry(2, "refused"))).canary == canary
    for after in (entry(2, "canary stopped"), entry(2), entry(3, "rolled back")):
        assert AuditLog(written(entry(1), started, after)).canary is None
    assert AuditLog(written(entry(1), started, entry(2, "canary stopped"))).champion == 1
    again = AuditLog(
        written(entry(1), started, entry(2, "canary started", canary=Canary(version=2, share=0.5)))
    )
    assert again.canary == Canary(version=2, share=0.5)
    assert again.faults(again.last) == []


def test_only_the_first_of_a_concurrent_canary_and_promotion_stands() -> None:
    rows = moved(1)
    seen = AuditLog(rows)
    rivals = [
        seen.continued(entry(3)),
        seen.continued(entry(2, "canary started", canary=Canary(version=2))),
    ]
    rows += [(number, each.to_json()) for number, each in enumerate(rivals, start=2)]
    assert (AuditLog(rows).champion, AuditLog(rows).canary) == (3, None)

"""What a row of decisions means, in whatever race it was written, and whether it was touched."""

from datetime import UTC, datetime

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.model.refs import Trial
from registry.store.audit_log import Entry, Ledger


def entry(to_version: int, action: str = "promoted", at: str = "2026-11-17T08:00:00+00:00", **more):
    return Entry(action=action, at=at, by="me", from_version=None, to_version=to_version, **more)


def written(*entries: Entry) -> list[tuple[int, bytes]]:
    """Rows of writers who each had seen all before."""
    rows: list[tuple[int, bytes]] = []
    for number, each in enumerate(entries, start=1):
        rows.append((number, Ledger(rows).continued(each).to_json()))
    return rows


def moved(*versions: int) -> list[tuple[int, bytes]]:
    return written(*(entry(version) for version in versions))


def test_an_empty_ledger_has_no_champion() -> None:
    ledger = Ledger()
    assert (ledger.champion, ledger.previous, ledger.moves, ledger.faults()) == (None, None, [], [])


def test_the_last_move_says_who_serves() -> None:
    rows = written(
        entry(1),
        entry(2),
        entry(3, "refused"),
        entry(1, "rolled back"),
    )
    ledger = Ledger(rows)
    assert ledger.champion == 1
    assert [line.entry.action for line in ledger.moves] == ["promoted", "promoted", "rolled back"]
    assert ledger.lines[2].stands  # a refusal moves nothing and is overtaken by nobody
    assert ledger.faults(newest_of(rows)) == []


def test_of_those_who_promote_at_once_the_first_line_stands() -> None:
    rows = moved(1)
    seen = Ledger(rows)
    rivals = [seen.continued(entry(version)).to_json() for version in (2, 3, 4)]
    rows += list(enumerate(rivals, start=2))
    ledger = Ledger(rows)
    assert [line.stands for line in ledger.lines] == [True, True, False, False]
    assert ledger.champion == 2
    assert ledger.faults(newest_of(rows)) == []
    later = [*rows, (5, ledger.continued(entry(5)).to_json())]
    assert Ledger(later).champion == 5
    assert Ledger(later).faults(newest_of(later)) == []


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12))
def test_every_writer_sees_a_prefix_and_all_agree(lags: list[int]) -> None:
    """Each writer had not seen the last few lines; exactly one move stands for each number."""
    rows: list[tuple[int, bytes]] = []
    for number, lag in enumerate(lags, start=1):
        seen = Ledger(rows[: max(0, len(rows) - lag)])
        rows.append((number, seen.continued(entry(number)).to_json()))
    ledger = Ledger(reversed(rows))  # whatever order the registry lists them in
    numbers = [line.entry.move for line in ledger.moves]
    assert numbers == list(range(1, len(numbers) + 1))
    assert ledger.champion == ledger.moves[-1].entry.to_version
    assert ledger.faults(newest_of(rows)) == []


def newest_of(rows: list[tuple[int, bytes]]) -> int:
    return Ledger(rows).last


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_a_line_that_is_missing_or_unreadable_shows(number: int) -> None:
    rows = moved(1, 2, 3)
    rows.append((4, Ledger(rows[:2]).continued(entry(4)).to_json()))  # a race with line 3
    newest = newest_of(rows)
    assert Ledger(rows).faults(newest) == []
    removed = [row for row in rows if row[0] != number]
    assert Ledger(removed).faults(newest) == [f"line {number} is missing"]
    garbage = [(n, b"{" if n == number else old) for n, old in rows]
    assert any("cannot be read" in fault for fault in Ledger(garbage).faults(newest))


@pytest.mark.parametrize(
    "text", ["x" * 1_000_000, "\x00" * 1_000_000, "ä\n" * 500_000, "\udcff" * 1_000_000]
)
def test_a_line_with_texts_of_any_length_fits_a_tag_of_the_registry(text: str) -> None:
    said = msgspec.structs.replace(entry(1, reason=text, verdict=text), by=text)
    line = Ledger().continued(said)
    assert len(line.to_json().decode()) < 100_000
    assert line.reason is not None
    assert line.reason.endswith("… (1,000,000 characters)")


def test_who_was_champion_then() -> None:
    rows = written(
        entry(1, at="2026-11-10T09:00:00+00:00"),
        entry(2, at="2026-11-17T15:00:00+00:00"),
        entry(1, "rolled back", at="2026-11-17T14:59:00+00:00"),  # by a clock that is behind
        entry(3, at="2026-11-18T08:00:00+00:00"),
    )
    ledger = Ledger(rows)

    def during(*hours: tuple[int, int]) -> list[int]:
        start, end = (datetime(2026, 11, day, hour, tzinfo=UTC) for day, hour in hours)
        return [line.entry.to_version for line in ledger.reigns(start, end)]

    assert during((9, 0), (9, 23)) == []
    assert during((9, 0), (10, 23)) == [1]
    assert during((12, 0), (12, 0)) == [1]
    assert during((17, 0), (17, 23)) == [1, 2, 1]
    assert during((17, 16), (18, 12)) == [1, 3]
    assert during((19, 0), (20, 0)) == [3]
    assert Ledger().reigns(datetime.min.replace(tzinfo=UTC), datetime.now(UTC)) == []


def test_a_ledger_without_its_newest_line_noted_may_be_cut_off() -> None:
    assert Ledger(moved(1, 2)).faults() == [
        "nothing says which line was the newest: some may be missing at the end"
    ]
    assert Ledger().faults() == []


def test_a_missing_line_does_not_undo_those_after_it() -> None:
    rows = [row for row in moved(1, 2, 3, 4) if row[0] != 3]
    assert Ledger(rows).champion == 4
    again = Ledger(rows).continued(entry(5))
    assert Ledger([*rows, (5, again.to_json())]).champion == 5


def test_a_trial_stands_until_it_is_withdrawn_or_the_champion_moves() -> None:
    trial = Trial(version=2, share=0.1)
    tried = entry(2, "tried", trial=trial)
    rows = written(entry(1), tried)
    ledger = Ledger(rows)
    assert (ledger.champion, ledger.previous, ledger.trial) == (1, None, trial)
    assert Ledger(written(entry(1), tried, entry(2, "refused"))).trial == trial
    for after in (entry(2, "withdrawn"), entry(2), entry(3, "rolled back")):
        assert Ledger(written(entry(1), tried, after)).trial is None
    assert Ledger(written(entry(1), tried, entry(2, "withdrawn"))).champion == 1
    again = Ledger(written(entry(1), tried, entry(2, "tried", trial=Trial(version=2, share=0.5))))
    assert again.trial == Trial(version=2, share=0.5)
    assert again.faults(again.last) == []


def test_a_trial_and_a_promotion_at_once_are_one_move() -> None:
    rows = moved(1)
    seen = Ledger(rows)
    rivals = [seen.continued(entry(3)), seen.continued(entry(2, "tried", trial=Trial(version=2)))]
    rows += [(number, each.to_json()) for number, each in enumerate(rivals, start=2)]
    assert (Ledger(rows).champion, Ledger(rows).trial) == (3, None)

"""Classifies pictures into a file, and goes on where an earlier run ended."""

from collections.abc import Iterable, Iterator
from typing import Protocol

from msgspec import Struct

from convoy.classify.answer_file import AnswerFile
from convoy.classify.inputs import Listing, Picture, ReadPicture, read_picture
from convoy.classify.progress import Progress
from convoy.classify.rows import Answer, row_of


class Source(Protocol):
    """Answers pictures: a service, or a version in this process."""

    def check(self) -> str | None:
        """The model that will answer, if it is known; raises ``ConvoyError`` if none can."""

    def class_count(self, model: str, version: int) -> int | None:
        """How many classes a version has; None if it does not answer now.

        Raises:
            ConvoyError: this cannot be found out.
        """

    def answers(
        self, pictures: Iterable[ReadPicture]
    ) -> Iterator[tuple[ReadPicture, Answer | str]]:
        """Each picture, in order, with its answer or the text of an error.

        Raises:
            ConvoyError: no further picture would be answered.
        """


class Summary(Struct, kw_only=True):
    """What a run did. ``interrupted`` is set if it did not reach all pictures."""

    pictures: int
    answered: int = 0
    answered_before: int = 0
    failed: int = 0
    versions: dict[str, int] = {}
    interrupted: bool = False


def classify_into(file: AnswerFile, source: Source, listing: Listing) -> Summary:
    """Add a row for each picture that ``file`` has no answer for.

    Ctrl-C ends the run early, and so does an error that holds for all pictures; the rows stay.

    Args:
        file: opened, and checked by ``check_comparable``.
        source: answers the pictures.
        listing: the pictures.

    Raises:
        NotComparable: another model than the one of the rows in the file answers.
        ConvoyError: as ``source.answers``.
        OSError: a row cannot be written.
    """
    summary = Summary(pictures=len(listing.pictures))
    with Progress(len(listing.pictures)) as progress:
        unanswered = _unanswered(file, listing.pictures, summary, progress)
        try:
            for picture, answer in source.answers(unanswered):
                file.append(row_of(picture.uri, picture.sha256, answer))
                failed = isinstance(answer, str)
                progress.advance(failed=failed)
                _count(summary, answer)
        except KeyboardInterrupt:
            summary.interrupted = True
    if not summary.interrupted:
        file.finish()
    return summary


def _unanswered(
    file: AnswerFile, pictures: Iterable[Picture], summary: Summary, progress: Progress
) -> Iterator[ReadPicture]:
    """The pictures without an answer in ``file``, read one at a time."""
    for picture in pictures:
        found = read_picture(picture)
        if file.known.is_answered(found.uri, found.sha256):
            summary.answered_before += 1
            progress.advance()
        else:
            yield found


def _count(summary: Summary, answer: Answer | str) -> None:
    if isinstance(answer, str):
        summary.failed += 1
        return
    summary.answered += 1
    version = f"{answer.model} version {answer.version}"
    summary.versions[version] = summary.versions.get(version, 0) + 1

"""Tokens: shown once, kept as digests, gone at once."""

import stat

import pytest

from registry.auth.tokens import Tokens
from registry.core.errors import TokensUnavailable, UsageError
from registry.core.paths import Paths


@pytest.fixture
def tokens(paths: Paths) -> Tokens:
    return Tokens(paths.tokens)


def test_a_token_opens_and_its_text_is_nowhere(tokens: Tokens, paths: Paths) -> None:
    text = tokens.add("ann", "admin")
    found = tokens.find(text)
    assert found is not None
    assert (found.name, found.may("decide")) == ("ann", True)
    data = paths.tokens.read_text()
    assert text not in data
    assert text.removeprefix("convoy_") not in data
    assert stat.S_IMODE(paths.tokens.stat().st_mode) == 0o600
    assert len(text) > 40


@pytest.mark.parametrize("text", ["", "convoy_", "convoy_x", "ä\ud800", "a" * 10_000])
def test_what_is_no_token_opens_nothing(tokens: Tokens, text: str) -> None:
    assert tokens.find(text) is None
    tokens.add("ann", "viewer")
    assert tokens.find(text) is None


def test_a_removed_token_opens_nothing_any_more(tokens: Tokens, paths: Paths) -> None:
    texts = [tokens.add(name, "viewer") for name in ("ann", "bob")]
    Tokens(paths.tokens).remove("ann")
    assert tokens.find(texts[0]) is None
    assert tokens.find(texts[1]) is not None
    with pytest.raises(UsageError, match="no token 'ann'"):
        tokens.remove("ann")


def test_names_are_plain_and_taken_once(tokens: Tokens) -> None:
    tokens.add("ann", "viewer")
    with pytest.raises(UsageError, match="already"):
        tokens.add("ann", "admin")
    with pytest.raises(UsageError, match="is not a name"):
        tokens.add("<b>", "viewer")


def test_a_damaged_file_opens_nothing_and_is_named(tokens: Tokens, paths: Paths) -> None:
    paths.root.mkdir(parents=True)
    paths.tokens.parent.mkdir(parents=True, exist_ok=True)
    paths.tokens.write_text('[{"name": "ann", "role": "king"}]')
    with pytest.raises(UsageError, match=r"tokens\.json cannot be read"):
        tokens.all()
    with pytest.raises(TokensUnavailable):  # whoever asks is not told where it lies
        tokens.find("convoy_x")

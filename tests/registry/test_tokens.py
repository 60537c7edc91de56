"""Tokens are shown once and stored as digests; a removed token is refused at once."""

import stat

import pytest

from registry.auth.tokens import Tokens
from registry.core.errors import TokensUnavailable, UsageError
from registry.core.paths import Paths


@pytest.fixture
def tokens(paths: Paths) -> Tokens:
    return Tokens(paths.tokens)


def test_a_token_is_found_and_its_text_is_not_stored(tokens: Tokens, paths: Paths) -> None:
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
def test_a_text_that_is_not_a_token_is_refused(tokens: Tokens, text: str) -> None:
    assert tokens.find(text) is None
    tokens.add("ann", "viewer")
    assert tokens.find(text) is None


def test_a_removed_token_is_refused(tokens: Tokens, paths: Paths) -> None:
    texts = [tokens.add(name, "viewer") for name in ("ann", "bob")]
    Tokens(paths.tokens).remove("ann")
    assert tokens.find(texts[0]) is None
    assert tokens.find(texts[1]) is not None
    with pytest.raises(UsageError, match="no token 'ann'"):
        tokens.remove("ann")


def test_a_name_that_is_taken_or_has_other_characters_is_refused(tokens: Tokens) -> None:
    tokens.add("ann", "viewer")
    with pytest.raises(UsageError, match="already"):
        tokens.add("ann", "admin")
    with pytest.raises(UsageError, match="is not a name"):
        tokens.add("<b>", "viewer")


def test_with_a_damaged_file_all_tokens_are_refused_and_the_error_names_the_file(
    tokens: Tokens, paths: Paths
) -> None:
    paths.root.mkdir(parents=True)
    paths.tokens.parent.mkdir(parents=True, exist_ok=True)
    paths.tokens.write_text('[{"name": "ann", "role": "king"}]')
    with pytest.raises(UsageError, match=r"tokens\.json cannot be read"):
        tokens.all()
    with pytest.raises(TokensUnavailable):  # the client does not learn the file's path
        tokens.find("convoy_x")

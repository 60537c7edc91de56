"""``Authorization: Bearer …``: what a caller sent, and what that token may do."""

from registry.auth.tokens import RIGHTS, Right, Token
from registry.core.errors import TokenInsufficient, TokenMissing


def bearer_token(header: str) -> str:
    """The token in the value of an ``Authorization`` header; empty when it has none."""
    scheme, _, text = header.partition(" ")
    return text.strip() if scheme.lower() == "bearer" else ""


def require(token: Token | None, right: Right) -> Token:
    """``token`` itself.

    Raises:
        KeyMissing: there is none.
        KeyInsufficient: its role has not that ``right``.
    """
    if token is None:
        raise TokenMissing("send a token that is known here: Authorization: Bearer …")
    if not token.may(right):
        allowed = " and ".join(RIGHTS[token.role])
        raise TokenInsufficient(f"the token {token.name!r} may {allowed}, not {right}")
    return token

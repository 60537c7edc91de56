"""``Authorization: Bearer …``: reads a client's token and checks that it permits a request."""

from registry.auth.tokens import RIGHTS, Right, Token
from registry.core.errors import TokenInsufficient, TokenMissing


def bearer_token(header: str) -> str:
    """The token in an ``Authorization`` header's value; empty if there is none."""
    scheme, _, text = header.partition(" ")
    return text.strip() if scheme.lower() == "bearer" else ""


def require(token: Token | None, right: Right) -> Token:
    """``token`` unchanged, if its role has the ``right``.

    Raises:
        TokenMissing: ``token`` is None.
        TokenInsufficient: its role does not have the ``right``.
    """
    if token is None:
        raise TokenMissing("no known token was sent; send one: Authorization: Bearer …")
    if not token.may(right):
        allowed = " and ".join(RIGHTS[token.role])
        raise TokenInsufficient(f"the token {token.name!r} may {allowed}, not {right}")
    return token

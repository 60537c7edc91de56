"""Where a service of this machine is asked, and with which token."""

DEFAULT_PORT = "8080"
SERVICE_KEY = "CONVOY_SERVICE_KEY"  # pragma: allowlist secret
"""Who knows this variable's value may look at a service that asks for keys."""


def local_address(host: str, port: int | str) -> str:
    """Where a process on this machine reaches a service that listens on ``host``."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

"""The address of a service on this machine, and the variable with its service key."""

DEFAULT_PORT = "8080"
SERVICE_KEY = "CONVOY_SERVICE_KEY"  # pragma: allowlist secret
"""The environment variable of the service key, which lets its holder read a service's traffic."""


def local_address(host: str, port: int | str) -> str:
    """The URL at which processes on this machine reach a service that listens on ``host``."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

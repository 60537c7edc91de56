"""The registry asks a service how it does; where that asks for keys, with the one of its own."""

import pytest

from registry.errors import ModelNotReady
from registry.services import SERVICE_KEY, read_live


def test_a_service_is_asked_over_http(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SERVICE_KEY, "between ourselves")
    live = read_live([url], "digits")
    assert live.champion == 1
    with pytest.raises(ModelNotReady, match="does not say"):
        read_live([url], "other")

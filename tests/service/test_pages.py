"""The service's pages at ``/`` and ``/docs``, in a real Chromium."""

from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
from flask import Flask
from flask.testing import FlaskClient
from playwright.sync_api import Browser

from service.http.openapi import OPERATIONS, Operation
from service.protocols.mlflow_scoring.protocol import MlflowScoring
from service.protocols.openinference.protocol import OpenInference
from service.protocols.torchserve import TorchServe
from service.protocols.v1 import V1
from tests.browsing import assert_readable
from tests.conftest import NewPage, wait_for

PHONE = {"width": 390, "height": 844}
PROTOCOLS = (V1, OpenInference, MlflowScoring, TorchServe)
DESCRIBED = [*(each for protocol in PROTOCOLS for each in protocol.operations), *OPERATIONS]


@pytest.mark.parametrize("operation", DESCRIBED, ids=lambda each: f"{each.method} {each.path}")
def test_every_example_has_the_type_of_its_operations_answer(operation: Operation) -> None:
    if operation.answer is None:
        assert isinstance(operation.example, str)
        return
    plain = msgspec.json.decode(msgspec.json.encode(operation.example))
    assert msgspec.convert(plain, operation.answer) == operation.example


def test_the_docs_show_a_command_an_answer_and_a_form_for_each_operation(
    client: FlaskClient,
) -> None:
    page = client.get("/docs").text
    paths = client.get("/openapi.json").get_json()["paths"]
    operations = [(method, path) for path, methods in paths.items() for method in methods]
    assert len(operations) == len(DESCRIBED)
    for method, path in operations:
        assert f'data-method="{method.upper()}" data-path="{path}"' in page
    assert page.count('<pre class="curl"') == len(operations)
    url = "http://127.0.0.1:8080/v1/models/fashion/versions/1/classify?top_k=2"
    assert f"curl -s --data-binary @picture.png &#39;{url}&#39;" in page
    assert "Ankle boot" in page
    for name in client.get("/openapi.json").get_json()["components"]["schemas"]:
        assert f'id="schema-{name}"' in page


def try_operation(page: Any, method: str, path: str, *pictures: Path) -> Any:
    """Send the form of an operation; return the element with its answer."""
    form = page.locator(f'form[data-method="{method}"][data-path="{path}"]')
    form.evaluate("form => { form.closest('details').open = true; }")
    if pictures:
        form.locator("input[type=file]").set_input_files([str(each) for each in pictures])
    form.locator("button").click()
    form.locator(".answer .status").wait_for()
    return form.locator(".answer")


@pytest.mark.browser
def test_the_docs_send_requests_and_show_their_answers(
    new_page: NewPage, url: str, png: bytes, tmp_path: Path
) -> None:
    page, faults = new_page(viewport=PHONE)
    page.goto(f"{url}/docs")
    name = 'form[data-path="/v1/models/{name}"] input[name=name]'
    wait_for(lambda: page.input_value(name) == "digits")
    picture, text = tmp_path / "digit.png", tmp_path / "notes.txt"
    picture.write_bytes(png)
    text.write_text("no picture")
    answer = try_operation(page, "POST", "/v1/classify", picture).inner_text()
    assert answer.startswith("200 OK")
    assert "x-model-version: 1" in answer
    assert '"predictions"' in answer
    answer = try_operation(page, "POST", "/v1/classify", picture, text).inner_text()
    assert answer.startswith("200 OK")
    assert '"status": 415' in answer
    path = "/v1/models/{name}/versions/{version}/classify"
    assert try_operation(page, "POST", path, picture).inner_text().startswith("200 OK")
    for path in ("/v2/models/{name}/infer", "/invocations"):
        answer = try_operation(page, "POST", path, picture, picture).inner_text()
        assert answer.startswith("200 OK"), path
        assert '"probabilities"' in answer
    path = "/predictions/{name}"
    assert try_operation(page, "PUT", path, picture).inner_text().startswith("200 OK")
    paths = ("/v1/models", "/v1/models/{name}", "/livez", "/readyz", "/metrics", "/v2", "/ping")
    for path in (*paths, "/v2/models/{name}", "/v2/models/{name}/stats"):
        assert try_operation(page, "GET", path).inner_text().startswith("200 OK"), path
    assert url in page.locator(".curl").first.inner_text()
    assert faults == []


@pytest.mark.browser
def test_the_docs_keep_a_token_in_memory_only(new_page: NewPage, url: str, app: Flask) -> None:
    page, faults = new_page()
    sent: list[str | None] = []
    page.on("request", lambda each: sent.append(each.headers.get("authorization")))
    page.goto(f"{url}/docs")
    page.fill("#token", "convoy_secret")
    assert try_operation(page, "GET", "/livez").inner_text().startswith("200 OK")
    assert sent[-1] == "Bearer convoy_secret"
    stored = "[localStorage.length, sessionStorage.length, document.cookie]"
    assert page.evaluate(stored) == [0, 0, ""]
    page.reload()
    assert page.input_value("#token") == ""
    assert faults == []


@pytest.mark.browser
def test_the_page_classifies_several_files_and_names_the_one_that_is_not_a_picture(
    new_page: NewPage, url: str, png: bytes, tmp_path: Path
) -> None:
    page, faults = new_page(viewport=PHONE)
    page.goto(url)
    page.wait_for_selector("#model >> text=digits version 1")
    files = []
    for number in range(9):
        files.append(tmp_path / f"digit-{number}.png")
        files[-1].write_bytes(b"no picture" if number == 4 else png)
    page.set_input_files("#file", [str(each) for each in files])
    page.wait_for_selector("#status >> text=9 of 9 answered, 1 with an error")
    items = page.locator("#results > li")
    assert items.count() == 9
    texts = items.all_inner_texts()
    assert all(f"digit-{number}.png" in text for number, text in enumerate(texts))
    assert [number for number, text in enumerate(texts) if "digits version 1" not in text] == [4]
    assert page.locator(".failed").all_inner_texts() == [
        "digit-4.png: the body is not a JPEG, PNG, WebP, GIF, BMP, TIFF or PPM image"
    ]
    assert page.evaluate("document.querySelector('.picture img').naturalWidth") == 8
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    page.set_input_files("#file", str(files[0]))  # replaces the pictures on the page
    page.wait_for_selector("#status >> text=1 of 1 answered")
    assert items.count() == 1
    assert page.locator(".bars li").count() == 5
    assert [fault for fault in faults if "415" not in fault] == []


@pytest.mark.browser
def test_the_page_sends_at_most_four_pictures_at_a_time(
    new_page: NewPage, url: str, png: bytes, tmp_path: Path
) -> None:
    page, _ = new_page()
    held: list[Any] = []
    page.route("**/v1/classify", lambda route: held.append(route))
    page.goto(url)
    (tmp_path / "digit.png").write_bytes(png)
    page.set_input_files("#file", [str(tmp_path / "digit.png")] * 7)
    wait_for(lambda: page.locator(".waiting").count() == 7)

    def more_are_sent_than(answered: int) -> bool:
        return page.locator(".waiting").count() > 0 and len(held) > answered

    for answered in range(7):
        wait_for(partial(more_are_sent_than, answered))
        assert len(held) - answered <= 4
        held[answered].continue_()
        page.wait_for_selector(f"#status >> text={answered + 1} of 7 answered")
    assert len(held) == 7


@pytest.mark.browser
def test_the_docs_are_readable_without_javascript(browser: Browser, url: str) -> None:
    page = browser.new_context(java_script_enabled=False).new_page()
    page.goto(f"{url}/docs")
    assert "curl -s" in page.locator(".curl").first.inner_text()
    assert page.locator("form.try:visible").count() == 0


@pytest.mark.browser
def test_no_page_scrolls_sideways_on_a_phone_or_is_hard_to_read(
    new_page: NewPage, url: str, png: bytes, tmp_path: Path
) -> None:
    (tmp_path / ("a_long_name" * 12 + ".png")).write_bytes(png)
    (tmp_path / "notes.png").write_text("no picture")
    for scheme in ("light", "dark"):
        page, _ = new_page(viewport=PHONE, color_scheme=scheme)
        page.goto(url)
        page.set_input_files("#file", [str(each) for each in tmp_path.glob("*.png")])
        page.wait_for_selector("#status >> text=2 of 2 answered")
        page.evaluate("for (const each of document.querySelectorAll('details')) each.open = true")
        assert_readable(page)
        page.goto(f"{url}/docs")
        try_operation(page, "GET", "/v1/models")
        page.evaluate("for (const each of document.querySelectorAll('details')) each.open = true")
        assert_readable(page)

"""The routes of a scoring server besides ``/invocations``: ping, health and version."""

from flask import Blueprint, Flask, Response

from service.http.health import is_ready

blueprint = Blueprint("mlflow_scoring", __name__)

PROTOCOL_OF = "3.17.2"
"""The version of MLflow whose scoring protocol this is."""


def init_app(app: Flask, health_route: str | None) -> None:
    """Add the routes, and ``health_route`` as a further path of ``/health``."""
    app.register_blueprint(blueprint)
    taken = {rule.rule for rule in app.url_map.iter_rules()}
    if health_route and health_route not in taken:
        app.add_url_rule(health_route, "mlflow_scoring.health", health)


@blueprint.get("/ping")
def ping() -> Response:
    """200 when the service is ready, with TorchServe's body; SageMaker reads the status only."""
    healthy = is_ready()
    status = "Healthy" if healthy else "Unhealthy"
    body = f'{{"status": "{status}"}}\n'
    return Response(body, 200 if healthy else 503, mimetype="application/json")


@blueprint.get("/health")
def health() -> Response:
    """200 and an empty line when the service is ready."""
    return Response("\n", 200 if is_ready() else 503, mimetype="text/plain")


@blueprint.get("/version")
def version() -> Response:
    """The version of MLflow whose scoring protocol this is."""
    return Response(PROTOCOL_OF, mimetype="text/plain")

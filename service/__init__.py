"""The HTTP service: encoded images in, JSON with predictions and the version that answered out.

Imports ``registry``, and neither ``training`` nor MLflow. ``create_app`` only connects the parts.
A request finds them in the app's ``State`` (``service.state``).
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flask import Flask

    from service.loading.open_slots import Slots
    from service.observability.metrics import Metrics
    from service.settings import Settings


METRICS_MAX_AGE_S = 1.0


def create_app(
    settings: "Settings | None" = None,
    slots: "Slots | None" = None,
    metrics: "Metrics | None" = None,
) -> "Flask":
    """The WSGI application.

    Args:
        settings: by default read from the environment.
        slots: the models by name. By default one slot for each of ``settings.models``; each loads
            the current deployment, if there is one, and follows it from a thread.
        metrics: where requests are counted; by default new counters.

    Raises:
        UsageError: a setting cannot be used.
    """
    from flask import Flask

    from service.access.auth import AccessControl
    from service.http import docs, health, models, page, problems, request_context
    from service.http.cors import Cors
    from service.inference.pipeline import Pipeline
    from service.loading.open_slots import open_slots
    from service.loading.watchdog import Watchdog
    from service.observability.access_log import AccessLog
    from service.observability.metrics import Metrics
    from service.observability.request_recorder import RequestRecorder
    from service.observability.tracing.tracer import Tracer
    from service.protocols.inference_app import InferenceApp, InferenceProtocol
    from service.protocols.mlflow_scoring import routes as mlflow_scoring
    from service.protocols.mlflow_scoring.protocol import MlflowScoring
    from service.protocols.openinference import routes as openinference
    from service.protocols.openinference.protocol import OpenInference
    from service.protocols.torchserve import TorchServe
    from service.protocols.v1 import V1
    from service.settings import Settings
    from service.shadow.client import ShadowFeed
    from service.state import State

    settings = settings or Settings.from_environment()
    metrics = metrics or Metrics(METRICS_MAX_AGE_S)
    is_worker = slots is None
    slots = open_slots(settings, metrics) if slots is None else slots
    for name in slots:
        metrics.expect(name)
    watchdog = Watchdog(slots.values(), settings.forward_timeout_s, settings.max_rss_mb)
    if is_worker:
        metrics.start()
        watchdog.start()
    app = Flask(__name__)
    app.url_map.strict_slashes = False
    shadow = ShadowFeed(settings.shadow_socket, metrics.shadowed)
    access_control = AccessControl(settings)
    tracer = None
    if settings.tracing and settings.spans_socket:
        dropped = metrics.families.traces_dropped.inc
        tracer = Tracer(settings.tracing, settings.spans_socket, dropped)
    access_log = AccessLog() if settings.access_log == "on" else None
    has_records = tracer is not None or access_log is not None
    state = app.extensions["convoy"] = State(
        settings=settings,
        slots=slots,
        metrics=metrics,
        watchdog=watchdog,
        access_control=access_control,
        recorder=RequestRecorder(tracer, access_log, access_control.describe)
        if has_records
        else None,
        pipeline=Pipeline(
            slots, settings, metrics, shadow, problems.outcome, lambda: watchdog.reason
        ),
    )
    request_context.init_app(app)
    problems.init_app(app)
    for module in (models, health, page, openinference):
        app.register_blueprint(module.blueprint)
    mlflow_scoring.init_app(app, settings.health_route)
    protocols: list[InferenceProtocol] = [
        V1(settings),
        OpenInference(settings),
        MlflowScoring(settings),
        TorchServe(settings),
    ]
    docs.init_app(app, [each for protocol in protocols for each in protocol.operations])
    probes = request_context.probe_paths(app)
    app.wsgi_app = InferenceApp(app.wsgi_app, state, protocols, probes)  # type: ignore[method-assign]
    if origins := settings.cors_origin_list:
        app.wsgi_app = Cors(app.wsgi_app, origins, settings.sticky_header)  # type: ignore[method-assign]
    return app

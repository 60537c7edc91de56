"""From labelled pictures to a registered version: data, recipes, one loop, reports, publishing.

Builds on ``registry`` and knows nothing of ``service``. The loop and the data load no MLflow; only
``tracking`` does, so a network can be trained and measured where there is no registry at all.
"""

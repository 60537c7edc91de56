"""From labelled pictures to a registered version: data, recipes, one loop, reports, publishing.

Imports ``registry`` and never ``service``. Only ``publishing.tracking`` imports MLflow itself: the
data modules and the loop can train and measure a network on a machine without a registry.
"""

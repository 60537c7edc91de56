"""The protocol of MLflow's scoring server, which SageMaker and Vertex AI call, too.

Imports ``service.http``, ``service.inference`` and ``service.state``; not MLflow. Decides nothing.
Source: MLflow 3.17.2, ``mlflow/pyfunc/scoring_server``.
"""

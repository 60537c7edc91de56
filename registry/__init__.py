"""What a model version is, how it runs, and where versions live.

Both ``training`` and ``service`` build on this package; it imports neither. Nothing is re-exported
here: import from the module that has what you need, and pay only for that module's one heavy
dependency (torch in ``networks``; Pillow in ``preprocess``; MLflow in ``store``; SciPy in ``gates``
and ``trial_guard``; pandas in ``pyfunc``; Flask in ``api``, ``pages`` and ``problems``; gunicorn in
``control``).
"""

"""What a model version is, how it runs, and where versions live.

Both ``training`` and ``service`` build on this package; it imports neither. Nothing is re-exported
here: import from the module that has what you need, and pay only for that module's one heavy
dependency (torch in ``networks``, ``devices`` and ``classifier``; Pillow in ``preprocess``; MLflow
in ``store``; SciPy in ``gates``; pandas in ``pyfunc``).
"""

"""What a model version is, how it runs, and where versions live.

Both ``training`` and ``service`` build on this package; it imports neither. Its folders depend on
each other in one direction: ``core`` ← ``auth``, ``model`` ← ``store`` ← ``delivery``,
``promotion`` ← ``canary`` ← ``control`` ← ``cli``. Nothing is re-exported: import from the module
that has what you need, and pay only for that module's one heavy dependency.
"""

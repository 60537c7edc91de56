"""Model versions: what they are, how they run, and where they are stored.

``training`` and ``service`` both build on this package; it imports neither. Its folders depend on
each other in one direction: ``core`` ← ``auth``, ``model`` ← ``store`` ← ``delivery``,
``promotion`` ← ``canary`` ← ``control`` ← ``cli``. This package re-exports nothing: import from the
module that you need, and only the one heavy dependency of that module is loaded.
"""

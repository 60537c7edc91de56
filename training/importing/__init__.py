"""Imports models that were trained elsewhere, with proof that they answer as they did there."""

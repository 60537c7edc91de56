"""Measures versions on real traffic, and ends a canary that breaks the policy.

Imports ``core``, ``model``, ``store`` and ``promotion``. ``traffic_stats`` is light, because the
service imports it.
"""

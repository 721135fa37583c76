"""Measurements: models, systems, timing and reports. The library imports nothing from here."""

"""Measuring: models, systems, timing and reports. The library itself imports nothing from here."""

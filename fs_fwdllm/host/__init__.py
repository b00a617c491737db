"""Hosts own processes, messages and data sets; methods own mathematics. ``local`` is the embedded default."""

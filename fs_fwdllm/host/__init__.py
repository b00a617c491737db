"""Hosts own processes, messages and data sets; methods own mathematics. ``local`` is the embedded default.

:mod:`~.hosts` is the table of them. What several share is :mod:`~.supervise` (processes of one machine),
:mod:`~.placement` (which client lives in which process) and :mod:`~.chunks` (texts that are too long for one message).
"""

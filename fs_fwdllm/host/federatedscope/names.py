"""Names shared by the parts of this host; imports nothing."""

from __future__ import annotations

__all__ = ["MESSAGE_EVALUATE", "MESSAGE_UPDATE", "MESSAGE_WORK", "NO_RESULTS"]

#: Types of our messages. None of them is one the host unpickles.
MESSAGE_WORK = "fwdllm_work"
MESSAGE_UPDATE = "fwdllm_update"
MESSAGE_EVALUATE = "fwdllm_evaluate"
#: The content of a client's results when it holds no sample to evaluate on: the host cannot send an empty mapping.
NO_RESULTS = "none"

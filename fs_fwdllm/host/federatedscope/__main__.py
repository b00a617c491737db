"""``python -m fs_fwdllm.host.federatedscope --cfg FILE key value ...``: the host's main, with our methods."""

from __future__ import annotations

import sys

from fs_fwdllm.errors import FwdLLMError
from fs_fwdllm.host.federatedscope.host_main import launch
from fs_fwdllm.host.supervise import INTERRUPTED

if __name__ == "__main__":
    try:
        launch(sys.argv[1:])
    except FwdLLMError as error:
        sys.exit(f"error: {type(error).__name__}: {error}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)

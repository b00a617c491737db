"""The one file a FederatedScope checkout needs: it makes the installed package ``fs_fwdllm`` known to the host.

``fs-fwdllm hook install PATH`` places it in ``federatedscope/contrib/configs/``, where FederatedScope imports it before
it reads a configuration. Without the package it does nothing but say so: the host must keep working.
"""

try:
    import fs_fwdllm.host.federatedscope.plugin  # noqa: F401 - registers on import
except ImportError as error:
    import logging

    logging.getLogger("federatedscope.fs_fwdllm").warning(
        "fs_fwdllm is not available in this environment (%s); its trainers and methods are not registered", error
    )

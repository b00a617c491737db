"""The one file a FederatedScope checkout needs. It does nothing yet: the FederatedScope host is not in this version.

When that host lands, this file is copied or linked into ``federatedscope/contrib/configs/`` of an unmodified checkout
(branch ``llm``), where FederatedScope imports it before it reads a configuration. It will then register the ``fwdllm``
section, the trainers, the server and client workers and the metrics of the installed package ``fs_fwdllm``, and import
nothing else. Until then the host ``local`` runs the same configuration files: ``fs-fwdllm run --cfg FILE``.
"""

"""The command ``fs-fwdllm``; :mod:`~fs_fwdllm.cli.main` has its commands."""

"""``python -m fs_fwdllm.host.fedml``: one process of a run."""

from fs_fwdllm.host.fedml.process import main

if __name__ == "__main__":
    raise SystemExit(main())

"""``python -m fs_fwdllm`` is the command ``fs-fwdllm``."""

from fs_fwdllm.cli.main import main

if __name__ == "__main__":
    main()

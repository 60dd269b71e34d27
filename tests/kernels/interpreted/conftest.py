"""These tests run kernels in Triton's interpreter; tests/kernels/test_interpreted.py starts them in processes of their own.

Triton reads TRITON_INTERPRET when a kernel is defined, so one process either interprets kernels or compiles them.
"""

from __future__ import annotations

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    from chanopt.kernels.interpreter import repair

    repair()
else:
    collect_ignore_glob = ["test_*.py"]

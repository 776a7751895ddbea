"""The interpreted tests belong to processes of their own, which test_interpreter.py starts."""

import os

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]

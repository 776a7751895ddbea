"""Hash of the operators' schemas, computed the same way by the build (from the files) and at run time (from the dicts).

A library built from other schemas would be called with the wrong arguments; comparing hashes refuses it instead.
This file imports nothing but the standard library, because the build loads it by path where torch may be absent.
"""

import ast
import hashlib
from pathlib import Path


def hash_of(schemas: dict[str, str]) -> str:
    """First 16 hex digits of the SHA-256 of the sorted lines ``name + text``, e.g. ``kelu_fwd(Tensor x) -> Tensor``."""
    lines = "\n".join(sorted(f"{name}{text}" for name, text in schemas.items()))
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


def read_schemas(ops_dir: Path) -> dict[str, str]:
    """Every literal dict named ``SCHEMAS`` in ``ops_dir/*.py``, merged, without importing the files."""
    found: dict[str, str] = {}
    for path in sorted(Path(ops_dir).glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8"), filename=str(path)).body:
            names = [t.id for t in node.targets if isinstance(t, ast.Name)] if isinstance(node, ast.Assign) else []
            if "SCHEMAS" in names:
                schemas = ast.literal_eval(node.value)
                if twice := found.keys() & schemas.keys():
                    raise ValueError(f"{path.name} defines schemas that another file defines too: {sorted(twice)}")
                found.update(schemas)
    return found


def schema_hash(ops_dir: Path) -> str:
    """Hash of all schemas under ``ops_dir``, as the build passes it to the compiler."""
    return hash_of(read_schemas(ops_dir))

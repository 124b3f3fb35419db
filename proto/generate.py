"""Generates the stubs of adaplex.v1 beside their .proto: `make proto`."""

from __future__ import annotations

import sys
from importlib import resources
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent
SOURCE = ROOT / "adaplex_proto" / "v1" / "adaplex.proto"


def main() -> int:
    """Run protoc with the proto folder as the root, so that the stubs import each other by their package's name."""
    include = str(resources.files("grpc_tools") / "_proto")
    code = protoc.main(
        ["protoc", f"-I{ROOT}", f"-I{include}"]
        + [f"--{kind}_out={ROOT}" for kind in ("python", "pyi", "grpc_python")]
        + [str(SOURCE)]
    )
    return int(code)


if __name__ == "__main__":
    sys.exit(main())

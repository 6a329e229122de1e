"""`qdq env`."""

from __future__ import annotations

from pathlib import Path


def env(*, json: Path | None = None) -> int:
    """Versions of everything that changes a result, and which engines can be built here.

    Such as:

        qdq env --json env.json

    Args:
        json: Also write the versions to this file.
    """
    from qdq.files import write_json
    from qdq.run import describe_environment, guard_command

    guard_command(outputs=[json])
    environment = describe_environment()
    width = max(map(len, environment))
    for name, version in environment.items():
        print(f"{name:{width}}  {version}")
    backends = {
        "tensorrt-rtx-cu13": "TensorRT-RTX, without a GPU",
        "tensorrt": "TensorRT, on this GPU",
    }
    can = [what for package, what in backends.items() if environment[package] != "not installed"]
    print(f"builds: {' and '.join(can) or 'no engine; install it with: pip install qdq[rtx]'}")
    if json is not None:
        write_json(json, environment)
    return 0

"""`qdq env`: versions, and the engines that can be built here."""

from __future__ import annotations

from pathlib import Path


def env(*, json: Path | None = None) -> int:
    """Print the versions of everything that changes a result, and which engines can be built here.

    For example:

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
    builders = []
    for package, description in backends.items():
        if environment[package] != "not installed":
            builders.append(description)
    if builders:
        print(f"builds: {' and '.join(builders)}")
    else:
        print("builds: no engine; install it with: pip install qdq[rtx]")
    if json is not None:
        write_json(json, environment)
    return 0

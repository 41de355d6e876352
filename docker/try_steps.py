"""Runs the steps of the Dockerfile on a bare Debian without Docker: as root, in a folder that becomes the machine.

    python docker/try_steps.py --root /var/tmp/bare [--build-arg NAME=VALUE ...] [--share FOLDER ...]

The bare machine is made with debootstrap, once: Debian bookworm, its Python and pip, nothing else. Every RUN is then
done inside it by /bin/sh, in a mount and process namespace of its own, as a build would; COPY brings the files that git
knows. --share shows a folder of this machine inside, for pip (PIP_FIND_LINKS and other PIP_ variables are passed on).
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from dockerfile_parse import DockerfileParser

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def main() -> int:
    arguments = parse_arguments()
    if os.geteuid() != 0:
        sys.exit("a bare machine is made and entered as root")
    make_bare(arguments.root)
    chosen = dict(each.split("=", 1) for each in arguments.build_arg)
    environment = {"PATH": PATH, "HOME": "/root"} | {k: v for k, v in os.environ.items() if k.startswith("PIP_")}
    folder = "/"
    for step in steps(HERE / "Dockerfile"):
        kind, value = step["instruction"], step["value"]
        if kind == "ARG":
            name, _, default = value.partition("=")
            if chosen.get(name, default):
                environment[name] = chosen.get(name, default)
        elif kind == "ENV":
            environment |= dict(word.split("=", 1) for word in shlex.split(value))
        elif kind == "WORKDIR":
            folder = value
            (arguments.root / value.lstrip("/")).mkdir(parents=True, exist_ok=True)
        elif kind == "COPY":
            copy(arguments.root / folder.lstrip("/"), value)
        elif kind == "RUN":
            code = run(arguments, folder, environment, value)
            if code != 0:
                print(f"line {step['startline'] + 1}: exit code {code}")
                return code
        elif kind not in ("FROM", "CMD"):
            sys.exit(f"line {step['startline'] + 1}: {kind} is not known here; teach {Path(__file__).name} about it")
    return 0


def steps(dockerfile: Path) -> list[dict[str, str]]:
    """The instructions in order, without comments."""
    with dockerfile.open("rb") as file:
        found: list[dict[str, str]] = DockerfileParser(fileobj=file).structure
    return [step for step in found if step["instruction"] != "COMMENT"]


def make_bare(root: Path) -> None:
    """What the base image has. Left as it is where it is there."""
    done = root / "etc" / "bare"
    if done.exists():
        return
    packages = "--include=python3,python3-dev,python3-pip,ca-certificates"
    subprocess.run(["debootstrap", "--variant=minbase", packages, "bookworm", root], check=True)
    (root / "usr/bin/python").symlink_to("python3")
    for mark in root.glob("usr/lib/python3*/EXTERNALLY-MANAGED"):
        mark.unlink()
    done.touch()


def copy(target: Path, value: str) -> None:
    if value != ". .":
        sys.exit(f"COPY {value}: only the whole project is copied")
    into = shlex.quote(str(target.resolve()))
    words = f"git ls-files -z | tar c --null --files-from=- | tar x --no-same-owner --directory={into}"
    subprocess.run(["bash", "-o", "pipefail", "-c", words], cwd=ROOT, check=True)


def run(arguments: argparse.Namespace, folder: str, environment: dict[str, str], command: str) -> int:
    """The exit code of a command inside."""
    print(f"RUN {command[:100]}", flush=True)
    root = shlex.quote(str(arguments.root))
    lines = ["set -e", f"mount -t proc proc {root}/proc", f"mount --rbind /dev {root}/dev",
             f"cp /etc/resolv.conf {root}/etc/resolv.conf"]  # fmt: skip
    for shared in map(shlex.quote, arguments.share):
        lines += [f"mkdir -p {root}/{shared}", f"mount --rbind {shared} {root}/{shared}"]
    inner = f"cd {shlex.quote(folder)} && {command}"
    lines.append(f"exec chroot {root} /bin/sh -c {shlex.quote(inner)}")
    begun = time.monotonic()
    code = subprocess.run(
        ["unshare", "--mount", "--pid", "--fork", "/bin/sh", "-c", "\n".join(lines)], env=environment, check=False
    ).returncode
    print(f"    {time.monotonic() - begun:.0f} s", flush=True)
    return code


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="the folder that becomes the machine")
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--share", action="append", default=[], metavar="FOLDER", help="seen inside at the same path")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())

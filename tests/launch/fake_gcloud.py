"""A stand-in for gcloud: knows the generally available flags, replays scripted answers.

It works in the folder of the environment variable FAKE_GCLOUD:
  calls     written: one JSON list of arguments per call
  states    read: what each `describe` finds, one per line; the last line stays
  codes     read: exit code of each ssh or scp, one per line; 0 once they are used up
  home      where there is one, it is a worker: ssh and scp happen there
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys

FOLDER = pathlib.Path(os.environ["FAKE_GCLOUD"])
WIDE = {"--zone", "--project", "--format", "--quiet"}
# https://cloud.google.com/sdk/gcloud/reference/compute/tpus: the flags of the GA track only.
FLAGS = {
    ("queued-resources", "describe"): WIDE,
    ("queued-resources", "delete"): WIDE | {"--async", "--force"},
    ("queued-resources", "create"): WIDE
    | {"--accelerator-type", "--async", "--labels", "--network", "--node-id", "--reserved"}
    | {"--runtime-version", "--service-account", "--spot", "--subnetwork", "--topology", "--type"}
    | {"--valid-until-duration"},
    ("tpu-vm", "ssh"): WIDE | {"--command", "--internal-ip", "--ssh-flag", "--worker"},
    ("tpu-vm", "scp"): WIDE | {"--compress", "--recurse", "--scp-flag", "--worker"},
}


def take(file: str, keep_last: bool = False) -> str | None:
    """Removes and returns the first line of a script."""
    path = FOLDER / file
    lines = path.read_text().splitlines() if path.exists() else []
    if not lines:
        return None
    if len(lines) > 1 or not keep_last:
        path.write_text("".join(line + "\n" for line in lines[1:]))
    return lines[0]


def describe(words: list[str], flags: dict[str, str]) -> int:
    state = take("states", keep_last=True) or "ABSENT"
    if state == "ABSENT":
        print("ERROR: NOT_FOUND: Resource was not found", file=sys.stderr)
        return 1
    if state == "DENIED":
        print("ERROR: PERMISSION_DENIED: log in first", file=sys.stderr)
        return 1
    print(state)
    return 0


def ssh(words: list[str], flags: dict[str, str]) -> int:
    code = int(take("codes") or 0)
    home = FOLDER / "home"
    if code or not home.is_dir():
        return code
    environment = {**os.environ, "HOME": str(home), "HOSTNAME": "t1v-n-0-w-3"}
    command = ["bash", "-c", flags["--command"]]
    return subprocess.run(command, cwd=home, env=environment, check=False).returncode


def scp(words: list[str], flags: dict[str, str]) -> int:
    code = int(take("codes") or 0)
    if not code and (FOLDER / "home").is_dir():
        source, target = words
        shutil.copy(source, FOLDER / "home" / target.split(":")[1])
    return code


def main(arguments: list[str]) -> int:
    with (FOLDER / "calls").open("a") as calls:
        calls.write(json.dumps(arguments) + "\n")
    if arguments[:2] != ["compute", "tpus"]:
        print(f"not in the GA track: {arguments}", file=sys.stderr)
        return 2
    group, verb, *rest = arguments[2:]
    words = [word for word in rest if not word.startswith("--")]
    flags = dict(word.partition("=")[::2] for word in rest if word.startswith("--"))
    unknown = flags.keys() - FLAGS[group, verb]
    if unknown:
        print(f"{group} {verb} has no GA flag {sorted(unknown)}", file=sys.stderr)
        return 2
    actions = {"describe": describe, "ssh": ssh, "scp": scp}
    return actions[verb](words, flags) if verb in actions else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

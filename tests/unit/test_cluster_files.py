"""Tests of the files for clusters without one: Kubernetes' schemas, the promises of the image, all shell scripts."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from mvd_scale.distributed import torchrun
from mvd_scale.errors import FAULT_CODE

REPOSITORY = Path(__file__).resolve().parents[2]
LAUNCH = REPOSITORY / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch"])


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    """The objects of launch/kubernetes.yaml by kind."""
    content = yaml.safe_load((LAUNCH / "kubernetes.yaml").read_text())
    assert (content["apiVersion"], content["kind"]) == ("v1", "List")
    return {item["kind"]: item for item in content["items"]}


@pytest.fixture(scope="module")
def pod(cluster: dict[str, Any]) -> dict[str, Any]:
    return cluster["Job"]["spec"]["template"]["spec"]


@pytest.fixture(scope="module")
def dockerfile() -> list[tuple[str, str]]:
    """Instructions of launch/Dockerfile, with their continued lines."""
    text = (LAUNCH / "Dockerfile").read_text()
    lines = re.sub(r"\\\n\s*", " ", "\n".join(line for line in text.splitlines() if not line.startswith("#")))
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in lines.splitlines() if line.strip())]


@pytest.mark.parametrize("version", ["1.33", kubernetes_validate.latest_version()])
@pytest.mark.parametrize("kind", ["Job", "Service", "NetworkPolicy", "PersistentVolumeClaim"])
def test_kubernetes_takes_every_object(cluster: dict[str, Any], kind: str, version: str) -> None:
    kubernetes_validate.validate(cluster[kind], version, strict=True)


def test_the_schemas_see_a_misspelt_field(cluster: dict[str, Any]) -> None:
    job = json.loads(json.dumps(cluster["Job"]))
    job["spec"]["podFailurePolicies"] = job["spec"].pop("podFailurePolicy")
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, "1.33", strict=True)


def action(rules: list[dict[str, Any]], code: int) -> str:
    """What the Job does when the container ends with a code; `Count` is what Kubernetes does where no rule fits."""
    fitting = (rule["action"] for rule in rules if code in rule.get("onExitCodes", {}).get("values", []))
    return next(fitting, "Count")


def test_exit_codes_decide_whether_a_pod_is_started_again(cluster: dict[str, Any], pod: dict[str, Any]) -> None:
    spec = cluster["Job"]["spec"]
    rules = spec["podFailurePolicy"]["rules"]
    codes = {code: action(rules, code) for code in (1, 2, FAULT_CODE, 137, 138, 143)}
    assert codes == {1: "Count", 2: "FailJob", FAULT_CODE: "Count", 137: "Count", 138: "Ignore", 143: "Ignore"}
    assert {rule["action"] for rule in rules if "onPodConditions" in rule} == {"Ignore"}
    names = {rule["onExitCodes"]["containerName"] for rule in rules if "onExitCodes" in rule}
    assert names == {container["name"] for container in pod["containers"]}
    # Kubernetes requires these for such rules, and values in order.
    assert (pod["restartPolicy"], spec["completionMode"]) == ("Never", "Indexed")
    assert all(v == sorted(set(v)) for v in (r["onExitCodes"]["values"] for r in rules if "onExitCodes" in r))
    assert spec["maxFailedIndexes"] == 0


def test_pods_find_each_other_and_count_themselves(cluster: dict[str, Any], pod: dict[str, Any]) -> None:
    job, service, policy = cluster["Job"], cluster["Service"], cluster["NetworkPolicy"]
    name, spec = job["metadata"]["name"], job["spec"]
    (container,) = pod["containers"]
    env = {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in container["env"]}
    assert int(env["PET_NNODES"]) == spec["completions"] == spec["parallelism"]
    assert env["PET_NPROC_PER_NODE"] == container["resources"]["limits"]["nvidia.com/gpu"]
    assert env["PET_MASTER_ADDR"].replace("$(NAME)", env["NAME"]) == f"{name}-0.{service['metadata']['name']}"
    assert env["PET_NODE_RANK"]["fieldRef"]["fieldPath"].endswith("['batch.kubernetes.io/job-completion-index']")
    assert (pod["subdomain"], service["spec"]["clusterIP"]) == (name, "None")
    assert service["spec"]["publishNotReadyAddresses"] is True
    pods = {"batch.kubernetes.io/job-name": name}
    assert service["spec"]["selector"] == policy["spec"]["podSelector"]["matchLabels"] == pods
    assert policy["spec"]["ingress"] == [{"from": [{"podSelector": {"matchLabels": pods}}]}]


def test_what_torchrun_reads_from_the_pod(cluster: dict[str, Any], pod: dict[str, Any], monkeypatch: Any) -> None:
    (container,) = pod["containers"]
    assert container["command"] == ["python", "-m", torchrun.__name__]
    for entry in container["env"]:
        monkeypatch.setenv(entry["name"], entry.get("value", "1").replace("$(NAME)", "mvd-scale"))
    read = torchrun.parse_args(container["args"])
    assert (read.nnodes, read.nproc_per_node, read.node_rank) == ("2", "8", 1)
    assert (read.master_addr, read.master_port) == ("mvd-scale-0.mvd-scale", 29500)
    assert read.rdzv_conf == "timeout=3600"
    assert (read.module, read.training_script) == (True, "mvd_scale")
    assert read.training_script_args[0] == "pretrain"


def test_pods_have_few_rights_and_much_shared_memory(pod: dict[str, Any]) -> None:
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    assert pod["automountServiceAccountToken"] is False
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes[mounts["/dev/shm"]["name"]]["emptyDir"]["medium"] == "Memory"
    assert mounts["/data"]["readOnly"] is True
    assert "persistentVolumeClaim" in volumes[mounts["/runs"]["name"]]


def test_ranks_have_the_time_to_save_before_they_are_killed(pod: dict[str, Any]) -> None:
    """Kubernetes' grace, torchrun's and the time between Slurm's signal and the limit are one number."""
    seconds = int(torchrun._DEFAULTS["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])
    assert pod["terminationGracePeriodSeconds"] == seconds
    assert f"#SBATCH --signal=B:USR1@{seconds}\n" in (LAUNCH / "slurm.sbatch").read_text()


@pytest.mark.parametrize("file", ["slurm.sbatch", "kubernetes.yaml", "Dockerfile"])
def test_what_to_edit_stands_at_the_top(file: str) -> None:
    lines = (LAUNCH / file).read_text().splitlines()
    (start,) = (number for number, line in enumerate(lines) if "Edit from here ..." in line)
    (end,) = (number for number, line in enumerate(lines) if "... to here." in line)
    assert start < 20
    assert end < 60


def test_nothing_below_the_top_of_the_kubernetes_file_names_a_value_of_the_user() -> None:
    top, _, rest = (LAUNCH / "kubernetes.yaml").read_text().partition("... to here.")
    anchors = set(re.findall(r"&(\w+)", top))
    assert anchors == set(re.findall(r"[ \[]\*(\w+)", top + rest))
    assert "&" not in rest


def test_the_image_is_named_by_its_tag(dockerfile: list[tuple[str, str]]) -> None:
    (base,) = (rest for name, rest in dockerfile if name == "FROM")
    assert base == "nvcr.io/nvidia/pytorch:${NGC_TAG}"
    defaults = dict(rest.split("=", 1) for name, rest in dockerfile if name == "ARG")
    assert re.fullmatch(r"\d\d\.\d\d-py3", defaults["NGC_TAG"])
    assert re.fullmatch(r"[\d.]+", defaults["FLASH_ATTN"])
    assert re.fullmatch(r"[\d.]+", defaults["APEX"])


def test_the_image_runs_as_nobody_special(dockerfile: list[tuple[str, str]], pod: dict[str, Any]) -> None:
    names = [name for name, _ in dockerfile]
    assert "USER" not in names[: names.index("RUN")]
    (user,) = (rest for name, rest in dockerfile if name == "USER")
    context = pod["securityContext"]
    assert user == f"{context['runAsUser']}:{context['runAsGroup']}", "Kubernetes cannot tell that a name is not root"
    assert "RUN" not in names[names.index("USER") :]
    assert ("HEALTHCHECK", "NONE") in dockerfile


def test_the_image_takes_nothing_on_trust(dockerfile: list[tuple[str, str]]) -> None:
    """No script of a server is run, and pip does not exchange the torch of the image."""
    runs = [rest for name, rest in dockerfile if name == "RUN"]
    assert runs
    assert not any(re.search(r"\b(curl|wget)\b|http:|--trusted-host|git\+|sudo", run) for run in runs)
    names = [name for name, _ in dockerfile]
    assert "ADD" not in names
    assert any(name == "ENV" and rest.startswith("PIP_CONSTRAINT=") for name, rest in dockerfile)
    first = next(run for run in runs if "pip install" in run or "PIP_CONSTRAINT" in run)
    assert "torch" in first
    assert "pip install" not in first


def test_the_image_has_all_packages_and_nothing_else() -> None:
    lines = (REPOSITORY / ".dockerignore").read_text().splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    assert patterns[0] == "*"
    kept = {pattern.removeprefix("!") for pattern in patterns if pattern.startswith("!")}
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    folders = {"mvd_scale", *(path.partition("/")[0] for path in project["tool"]["setuptools"]["package-dir"].values())}
    assert kept == {*folders, "pyproject.toml", project["project"]["readme"], *project["project"]["license-files"]}
    assert all((REPOSITORY / name).exists() for name in kept)


def test_the_extras_of_the_image_exist(dockerfile: list[tuple[str, str]]) -> None:
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (wanted,) = (rest.partition("=")[2] for name, rest in dockerfile if name == "ARG" and rest.startswith("EXTRAS="))
    assert {*wanted.split(",")} <= extras.keys()


def test_the_devcontainer_is_the_image() -> None:
    text = (REPOSITORY / ".devcontainer" / "devcontainer.json").read_text()
    container = json.loads("\n".join(line for line in text.splitlines() if not line.startswith("//")))
    build = REPOSITORY / ".devcontainer"
    assert (build / container["build"]["dockerfile"]).resolve() == LAUNCH / "Dockerfile"
    assert (build / container["build"]["context"]).resolve() == REPOSITORY
    assert any(word.startswith("--shm-size=") for word in container["runArgs"])
    assert (
        f"useradd --create-home --uid 2000 --user-group {container['remoteUser']}"
        in (LAUNCH / "Dockerfile").read_text()
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_a_script_has_no_fault_that_shellcheck_knows(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    shellcheck = Path(sys.executable).with_name("shellcheck")
    command = [shellcheck, "--external-sources", "--source-path", LAUNCH, script]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


def test_commands_of_the_image_have_no_fault_that_shellcheck_knows(dockerfile: list[tuple[str, str]]) -> None:
    arguments = {rest.partition("=")[0] for name, rest in dockerfile if name == "ARG"} | {"PIP_CONSTRAINT"}
    for run in (rest for name, rest in dockerfile if name == "RUN"):
        text = f"#!/bin/bash\nexport {' '.join(sorted(arguments))}\n{run}\n"
        shellcheck = Path(sys.executable).with_name("shellcheck")
        result = subprocess.run([shellcheck, "-"], input=text, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout

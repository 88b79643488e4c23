"""The life of the image: it is built without a registry, run by podman as somebody who is not root and with nothing writable but its
volume, stopped, replaced by a newer one, and started by another user.

    unshare --mount --propagation private --net --pid --fork python3 container.py PROJECT PROGRAM DIRECTORY

container.rs runs this. What it finds wrong is on standard output, as is the word that it has come to the end, or why it is left out.
The network is its own, so the gateway has its default ports; images and volumes are in DIRECTORY."""

import json
import os
import subprocess
import sys
import time
import urllib.request

PATIENCE_S = 40
PROJECT, PROGRAM, DIRECTORY = sys.argv[1:]
HTTP = "http://127.0.0.1:8080"
ENGINE = f"{DIRECTORY}/podman"
# Of this machine's podman nothing but the program: it needs no service, no network plug-in and no control groups.
WRAPPER = f"""#!/bin/sh
exec podman --root {DIRECTORY}/images --runroot {DIRECTORY}/run --storage-driver vfs --cgroup-manager cgroupfs \\
    --events-backend none --log-level error "$@"
"""
# As config/kubernetes runs it. The limits are this machine's: its root may be one that cannot raise any.
RUN = """run --detach --network host --cgroups disabled --ulimit nofile=4096:4096 --ulimit nproc=1024:1024 --health-interval disable
 --read-only --cap-drop all --security-opt no-new-privileges""".split()


def sh(*command, ok=True, **more):
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300, **more)
    if ok and done.returncode != 0:
        fail(f"{' '.join(command)}: {done.returncode}\n{done.stdout}")
    return done.stdout


def engine(*arguments, ok=True):
    return sh(ENGINE, *arguments, ok=ok)


def fail(what):
    print(f"not so: {what}", flush=True)
    for name in subprocess.run([ENGINE, "ps", "-aq"], capture_output=True, text=True).stdout.split():
        subprocess.run([ENGINE, "logs", name], stderr=subprocess.STDOUT)
    sys.exit(1)


def leave_out(why):
    print(f"left out: {why}", flush=True)
    sys.exit(0)


def expect(claim, what):
    if not claim:
        fail(what)


def wait(what, ready):
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until:
        try:
            value = ready()
        except OSError:
            value = None
        if value:
            return value
        time.sleep(0.05)
    fail(f"waited for: {what}")


def request(path, key="", body=None):
    headers = {"Authorization": key, "Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(HTTP + path, body, headers), timeout=20) as answer:
        return answer.read()


def publish(key):
    answer = json.loads(request("/v1/ingest/press-4/spindle/temp", key, b'{"value": 21.5}'))
    expect(answer["accepted"] == 1, f"the reading is accepted: {answer}")


def inside(container, *command):
    return engine("exec", container, "headgate", *command)


def start(name, image, *options, volume="data"):
    engine(*RUN, "--name", name, "--volume", f"{volume}:/var/lib/headgate", *options, image)
    wait(f"{name} serves", lambda: request("/livez") == b"alive\n")


def stop(name):
    began = time.monotonic()
    engine("stop", "--time", "15", name)
    took = time.monotonic() - began
    state = json.loads(engine("inspect", name))[0]["State"]
    expect(state["ExitCode"] == 0 and took < 12, f"SIGTERM drains it: {state['ExitCode']} after {took:.1f} s")
    expect("stopped" in engine("logs", name), "it says that it has stopped")


def prepare():
    """Namespaces are not enough everywhere: where containers cannot be made, there is nothing to test."""
    with open(ENGINE, "w") as file:
        file.write(WRAPPER)
    os.chmod(ENGINE, 0o755)
    sh("ip", "link", "set", "lo", "up")
    # The runtime gives what a container has as its input to the container's user: that is not to be this machine's /dev/null.
    null = f"{DIRECTORY}/null"
    sh("mknod", "-m", "666", null, "c", "1", "3")
    sh("mount", "--bind", null, "/dev/null")
    # Control groups of both versions at once are none that the runtime takes.
    if "0::/" not in open("/proc/self/cgroup").read() or \
            subprocess.run(["mount", "-t", "cgroup2", "cgroup2", "/sys/fs/cgroup"], capture_output=True).returncode != 0:
        leave_out("control groups of version 2 cannot be mounted here")
    done = subprocess.run([ENGINE, "info"], capture_output=True, text=True)
    if done.returncode != 0:
        leave_out(f"podman does not work here: {done.stderr.strip()}")


def it_is_built_without_a_registry():
    environment = {**os.environ, "ENGINE": ENGINE, "PROGRAM": PROGRAM}
    sh(f"{PROJECT}/config/container/build", "-t", "headgate:1", env=environment)
    version = engine("run", "--rm", *RUN[2:], "headgate:1", "--version", ok=False)
    if "OCI runtime error" in version or "OCI permission denied" in version:
        leave_out(f"containers cannot be run here: {version.strip()}")
    expect("headgate" in version, version)
    image = json.loads(engine("image", "inspect", "headgate:1"))[0]
    config = image["Config"]
    expect(config["User"] == "10001:10001", "it runs as somebody who is not root")
    expect(config["StopSignal"] == "SIGTERM" and list(config["Volumes"]) == ["/var/lib/headgate"], str(config))
    expect(sorted(config["ExposedPorts"]) == ["1883/tcp", "8080/tcp", "8443/tcp", "8883/tcp"], str(config))
    expect(config["Entrypoint"] == ["headgate"] and config["Cmd"] == ["serve"], str(config))
    health = image.get("Healthcheck") or image.get("HealthCheck") or {}
    expect(health.get("Test") == ["CMD", "headgate", "ping"], f"it has a health check: {health}")
    # A newer image, and that others can be made of it.
    with open(f"{DIRECTORY}/Newer", "w") as file:
        file.write('FROM localhost/headgate:1\nLABEL org.opencontainers.image.version="2"\n')
    engine("build", "--format", "docker", "-f", f"{DIRECTORY}/Newer", "-t", "headgate:2", DIRECTORY)


def it_serves_as_nobody_with_nothing_writable_but_its_volume():
    start("first", "headgate:1")
    key = json.loads(inside("first", "datasource", "create", "Press 4", "--json"))["key"]["secret"]
    publish(key)
    expect("alive" in inside("first", "ping") and "ready" in inside("first", "ping", "--ready"), "the health check")
    expect(engine("healthcheck", "run", "first").strip() in ("", "healthy"), "podman's own run of it")
    shell = engine("exec", "first", "sh", ok=False)
    expect("not found" in shell, f"there is no shell: {shell}")
    pid = json.loads(engine("inspect", "first"))[0]["State"]["Pid"]
    of = dict(line.split(":\t", 1) for line in open(f"/proc/{pid}/status").read().splitlines() if ":\t" in line)
    expect(of["Uid"].split() == ["10001"] * 4 and int(of["CapEff"], 16) == 0 and of["NoNewPrivs"] == "1", str(of))
    volume = engine("volume", "inspect", "data", "--format", "{{.Mountpoint}}").strip()
    owner = os.stat(volume)
    expect((owner.st_uid, owner.st_gid, owner.st_mode & 0o777) == (10001, 10001, 0o700), f"the volume is its own: {owner}")
    stop("first")
    return key


def a_newer_image_goes_on_with_the_volume(key):
    start("second", "headgate:2")
    publish(key)
    records = lambda: inside("second", "records", "press-4", "--json").splitlines()
    wait("the readings of both", lambda: len(records()) == 2)
    stop("second")


def another_user_is_told_whose_the_volume_is():
    engine(*RUN, "--name", "third", "--volume", "data:/var/lib/headgate", "--user", "10002:10002", "headgate:2")
    expect(engine("wait", "third").strip() == "1", "it ends")
    said = engine("logs", "third")
    expect("Permission denied" in said and "owner of the data directory" in said, said)
    # As with fsGroup in Kubernetes, whose volumes are of root and a group.
    start("fourth", "headgate:2", "--user", "10003:10001", volume=f"{DIRECTORY}/group")
    stop("fourth")


def main():
    os.mkdir(f"{DIRECTORY}/group")
    os.chown(f"{DIRECTORY}/group", 0, 10001)
    os.chmod(f"{DIRECTORY}/group", 0o2775)
    prepare()
    it_is_built_without_a_registry()
    key = it_serves_as_nobody_with_nothing_writable_but_its_volume()
    a_newer_image_goes_on_with_the_volume(key)
    another_user_is_told_whose_the_volume_is()
    print("the image has lived", flush=True)


main()

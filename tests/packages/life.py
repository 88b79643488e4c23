"""The life of the Debian package under a real systemd, on a copy of this machine's files that only it sees.

    unshare --mount --propagation private --pid --fork --uts --ipc --net --cgroup python3 life.py boot DIRECTORY

boots systemd there, as process 1 of namespaces of its own (deb.rs). It starts this file once more as a service, which installs
the packages in the directory, uses what they bring, upgrades, removes and purges. What it finds wrong is in DIRECTORY/found, as is
the word that it has come to the end. The network is its own too, so the gateway has its default ports."""

import json
import os
import signal
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request

PATIENCE_S = 40
HTTP = "http://127.0.0.1:8080"
# They would change the kernel, which is everybody's.
MASKED = ("systemd-udevd systemd-udev-trigger systemd-sysctl systemd-binfmt systemd-modules-load systemd-remount-fs "
          "systemd-timesyncd systemd-networkd systemd-resolved systemd-logind console-getty getty@tty1 "
          "systemd-random-seed systemd-journal-flush systemd-update-utmp").split()
SERVICE = """[Unit]
After=basic.target
[Service]
Type=oneshot
ExecStart=/usr/bin/python3 /mnt/life.py inside
StandardOutput=file:/mnt/found
StandardError=file:/mnt/found
ExecStopPost=/bin/systemctl --force --force poweroff
TimeoutStartSec=300
"""


def boot(directory):
    root, layer = f"{directory}/machine", f"{directory}/layer"
    units = f"{root}/etc/systemd/system"

    def run(*command):
        subprocess.run(command, check=True)

    os.makedirs(root)
    os.makedirs(layer)
    # In memory: an overlay on an overlay, as in a container, has to be.
    run("mount", "-t", "tmpfs", "tmpfs", layer)
    os.makedirs(f"{layer}/up")
    os.makedirs(f"{layer}/work")
    run("mount", "-t", "overlay", "overlay", "-o", f"lowerdir=/,upperdir={layer}/up,workdir={layer}/work", root)
    for kind, place in (("proc", "proc"), ("sysfs", "sys"), ("cgroup2", "sys/fs/cgroup"), ("tmpfs", "run"), ("tmpfs", "tmp")):
        run("mount", "-t", kind, kind, f"{root}/{place}")
    run("mount", "--rbind", "/dev", f"{root}/dev")
    run("mount", "--bind", directory, f"{root}/mnt")
    # Nothing else of this machine starts, and a gateway that it has is none of ours.
    run("sh", "-c", f"rm -rf {units}/*.wants/* {root}/var/lib/headgate {root}/var/backups/headgate {root}/etc/headgate "
                    f"{root}/usr/sbin/policy-rc.d")
    # The index of all manuals of this machine is not what is tested, and takes a minute.
    run("rm", "-f", f"{root}/var/lib/man-db/auto-update")
    for unit in MASKED:
        run("ln", "-sf", "/dev/null", f"{units}/{unit}.service")
    os.makedirs(f"{units}/multi-user.target.wants", exist_ok=True)
    with open(f"{units}/inside.service", "w") as unit:
        unit.write(SERVICE)
    run("ln", "-sf", "../inside.service", f"{units}/multi-user.target.wants/inside.service")
    run("ln", "-sf", "/lib/systemd/system/multi-user.target", f"{units}/default.target")
    run("cp", os.path.abspath(__file__), f"{directory}/life.py")
    # Not chroot, in which nobody can make a user namespace.
    os.makedirs(f"{root}/srv/before", exist_ok=True)
    subprocess.run(["pivot_root", ".", "srv/before"], cwd=root, check=True)
    os.chdir("/")
    run("umount", "--lazy", "/srv/before")
    # As on a machine: what systemd mounts for a service, such as its credentials, is seen by it.
    run("mount", "--make-rshared", "/")
    log = os.open("/mnt/boot.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    environment = {"container": "lxc", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
    os.execve("/lib/systemd/systemd", ["systemd", "--system", "--log-target=console", "--show-status=no"], environment)


def sh(command, ok=True):
    done = subprocess.run(["sh", "-c", command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if ok and done.returncode != 0:
        fail(f"{command}: {done.returncode}\n{done.stdout}")
    return done.stdout


def fail(what):
    print(f"not so: {what}", flush=True)
    print(sh("systemctl status --no-pager headgate; journalctl --no-pager -u headgate | tail -40", ok=False), flush=True)
    sys.exit(1)


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


def owner(path):
    return sh(f"stat -c '%U:%G %a' {path}").strip()


def show(name):
    return sh(f"systemctl show headgate -P {name}").strip()


def is_active():
    return sh("systemctl is-active headgate", ok=False).strip() == "active"


def install(version):
    return sh(f"DEBIAN_FRONTEND=noninteractive dpkg -i /mnt/headgate_{version}.deb 2>&1")


def request(path, key, body=None, url=HTTP, context=None):
    headers = {"Authorization": key, "Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(url + path, body, headers), context=context, timeout=20) as answer:
        return answer.read()


def publish(key, **where):
    answer = json.loads(request("/v1/ingest/press-4/spindle/temp", key, b'{"value": 21.5}', **where))
    expect(answer["accepted"] == 1, f"the reading is accepted: {answer}")


def stored(count):
    # Root finds the admin key where the service keeps it.
    wait(f"{count} readings", lambda: len(sh("headgate records press-4 --json", ok=False).splitlines()) >= count)


def status(pid):
    lines = open(f"/proc/{pid}/status").read().splitlines()
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)


def journal():
    return sh("journalctl --no-pager -o cat -u headgate")


def drop_in(name, text):
    os.makedirs("/etc/systemd/system/headgate.service.d", exist_ok=True)
    with open(f"/etc/systemd/system/headgate.service.d/{name}.conf", "w") as file:
        file.write(text)
    sh("systemctl daemon-reload")


def it_is_installed_and_runs():
    install("0.1.0-1")
    # "active" is what a service of this type is when it has said that it is ready.
    expect(is_active(), "the installation starts the service")
    expect(sh("systemctl is-enabled headgate").strip() == "enabled", "and it starts at boot")
    expect("serving MQTT at 127.0.0.1:1883" in show("StatusText"), show("StatusText"))
    for path, wanted in (("/var/lib/headgate", "headgate:headgate 700"), ("/var/backups/headgate", "headgate:headgate 700"),
                         ("/etc/headgate", "root:headgate 750"), ("/etc/headgate/headgate.toml", "root:headgate 640")):
        expect(owner(path) == wanted, f"{path}: {owner(path)}")
    expect("/etc/headgate/headgate.toml" in sh("dpkg-query -W -f '${Conffiles}' headgate"), "it is a conffile")
    expect("nologin" in sh("getent passwd headgate"), "nobody signs in as the user of the service")
    for path in ("man/man1/headgate.1.gz", "man/man1/headgate-key-rotate.1.gz", "doc/headgate/headgate.toml",
                 "bash-completion/completions/headgate", "zsh/vendor-completions/_headgate",
                 "fish/vendor_completions.d/headgate.fish"):
        expect(os.path.getsize(f"/usr/share/{path}") > 100, path)
    sh("bash -n /usr/share/bash-completion/completions/headgate")
    sh("headgate check-config /etc/headgate/headgate.toml")
    unit = "/usr/lib/systemd/system/headgate.service"
    verified = sh(f"systemd-analyze verify --man=no {unit} 2>&1", ok=False)
    expect("headgate" not in verified, verified)
    # In tenths, of ten, of which 0 is a service that can do nothing. It exits with 1 above.
    sh(f"systemd-analyze security --no-pager --offline=true --threshold=20 {unit}")


def it_can_do_what_it_has_to_and_nothing_else():
    pid = show("MainPID")
    of = status(pid)
    expect(of["NoNewPrivs"] == "1" and of["Seccomp"] == "2" and int(of["CapEff"], 16) == 0, str(of))
    expect(show("LimitNOFILE") == "131072" and show("LimitRTPRIO") == "1", "the limits of the unit")
    # Where this machine lets its root raise limits: a container's root may not.
    if "1" in sh("prlimit --nofile=131072:131072 --rtprio=1:1 true && echo 1", ok=False):
        limits = open(f"/proc/{pid}/limits").read()
        expect("Max open files            131072" in limits and "Max realtime priority     1 " in limits, limits)
        # The filter of system calls lets the threads that commit have what the limit allows them.
        wait("the priority in the journal", lambda: "real-time (SCHED_RR 1)" in journal())
    created = json.loads(sh("headgate datasource create 'Press 4' --json"))
    key = created["key"]["secret"]
    publish(key)
    stored(1)
    sh("headgate backup /var/backups/headgate/first")
    sh("systemctl reload headgate")
    wait("the reload", lambda: "the configuration was read again" in journal())
    expect(is_active() and show("MainPID") == pid, "it runs on after a reload")
    sh("systemctl stop headgate")
    expect(show("Result") == "success" and show("ExecMainStatus") == "0", "it drains")
    files = sh("find /var/lib/headgate ! -user headgate -o -perm /077 ! -type l").split()
    expect(files == [], f"its files are its own: {files}")
    sh("systemctl start headgate")
    publish(key)
    stored(2)
    return key


def one_that_hangs_is_killed_and_starts_again(key):
    drop_in("watchdog", "[Service]\nWatchdogSec=2s\n")
    sh("systemctl restart headgate")
    pid = show("MainPID")
    time.sleep(5)
    expect(show("MainPID") == pid, "one that lives is left alone")
    os.kill(int(pid), signal.SIGSTOP)
    wait("another process", lambda: is_active() and show("MainPID") not in ("0", pid))
    expect(show("NRestarts") == "1", show("NRestarts"))
    publish(key)
    stored(3)
    os.unlink("/etc/systemd/system/headgate.service.d/watchdog.conf")


def the_examples_of_drop_ins_work(key):
    sh("mkdir -p /etc/letsencrypt/live/gateway.example && cp /mnt/own.pem /etc/letsencrypt/live/gateway.example/fullchain.pem && "
       "cp /mnt/own.key /etc/letsencrypt/live/gateway.example/privkey.pem && chmod 600 /etc/letsencrypt/live/gateway.example/*")
    examples = "/usr/share/doc/headgate/examples"
    for name in ("10-tls", "20-port-443"):
        drop_in(name, open(f"{examples}/{name}.conf").read())
    sh("systemctl restart headgate")
    context = ssl.create_default_context(cafile="/mnt/issuer.pem")
    publish(key, url="https://localhost:443", context=context)
    stored(4)
    sh("rm -r /etc/systemd/system/headgate.service.d && systemctl daemon-reload && systemctl restart headgate")


def an_upgrade_restarts_it_and_keeps_what_was_changed(key):
    sh("echo '[trace]\nformat = \"json\"' >> /etc/headgate/headgate.toml; chmod 644 /etc/headgate/headgate.toml")
    pid = show("MainPID")
    install("0.1.1-1")
    expect(is_active() and show("MainPID") != pid, "an upgrade restarts the service")
    expect("json" in open("/etc/headgate/headgate.toml").read(), "what was changed stays")
    expect(owner("/etc/headgate/headgate.toml").endswith("644"), "and who may read it")
    publish(key)
    stored(5)
    # Somebody has disabled it: an upgrade leaves it so.
    sh("systemctl disable --now headgate")
    install("0.1.1-1")
    enabled = sh("systemctl is-enabled headgate", ok=False).strip()
    expect(enabled == "disabled" and not is_active(), f"a service that was disabled stays so: {enabled}")
    sh("systemctl enable --now headgate")


def a_removal_keeps_everything_and_a_purge_the_readings(key):
    sh("dpkg --remove headgate")
    expect(not is_active() and not os.path.exists("/usr/bin/headgate"), "a removal stops the service")
    expect(os.path.exists("/etc/headgate/headgate.toml"), "a removal keeps the configuration")
    expect(os.path.exists("/var/lib/headgate/records.db"), "and the readings")
    install("0.1.0-1")
    expect(is_active(), "it is there again")
    publish(key)
    stored(6)
    purged = sh("dpkg --purge headgate 2>&1")
    expect("/var/lib/headgate" in purged, f"a purge says that it keeps the readings: {purged}")
    expect(not os.path.exists("/etc/headgate"), "a purge removes the configuration")
    expect(os.path.exists("/var/lib/headgate/records.db"), "and never the readings")
    expect(owner("/var/lib/headgate") == "headgate:headgate 700", "which stay the user's own")
    # Nothing to keep: nothing is left.
    install("0.1.0-1")
    sh("systemctl stop headgate; rm -rf /var/lib/headgate/* /var/backups/headgate/*")
    purged = sh("dpkg --purge headgate 2>&1")
    left = sh("ls -d /var/lib/headgate /var/backups/headgate /etc/headgate 2>/dev/null", ok=False)
    expect(left == "" and "rm -r" not in purged, f"nothing is left: {left} {purged}")


def tell(what):
    print(f"{time.monotonic():.1f} s: {what}", flush=True)


def inside():
    tell("booted")
    it_is_installed_and_runs()
    tell("installed")
    key = it_can_do_what_it_has_to_and_nothing_else()
    tell("used")
    one_that_hangs_is_killed_and_starts_again(key)
    tell("hung and started again")
    the_examples_of_drop_ins_work(key)
    tell("served over TLS")
    an_upgrade_restarts_it_and_keeps_what_was_changed(key)
    tell("upgraded")
    a_removal_keeps_everything_and_a_purge_the_readings(key)
    print("the package has lived", flush=True)


if __name__ == "__main__":
    boot(sys.argv[2]) if sys.argv[1] == "boot" else inside()

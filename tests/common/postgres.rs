//! A PostgreSQL server of a test's own: Debian's, on a free port, in a temporary directory, with its defaults but for syncs. It
//! refuses to run as root, so that it runs as the user that Debian has made for it.

use std::net::TcpListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use tempfile::TempDir;

use super::{Setup, wait_for};

/// The password of the only user.
pub const PASSWORD: &str = "s3cret-of-postgres";

/// A server. Killed, with its children, when it is dropped.
pub struct PostgresServer {
    dir: TempDir,
    pub port: u16,
    settings: Vec<String>,
    child: Option<Child>,
}

impl PostgresServer {
    /// A running one, with the user `headgate`. A kill takes nothing from the kernel, and a server that syncs would wait for a
    /// busy disk.
    pub fn start() -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let port = TcpListener::bind("127.0.0.1:0")
            .and_then(|listener| listener.local_addr())
            .expect("a port")
            .port();
        std::fs::write(dir.path().join("password"), PASSWORD).expect("written");
        give_to_server(dir.path());
        let mut server = Self { dir, port, settings: vec!["fsync=off".to_owned()], child: None };
        let made = server
            .command("initdb")
            // What was just made need not survive a loss of power.
            .args(["--no-sync", "-U", "headgate", "--auth=scram-sha-256", "-E", "UTF8", "--locale=C", "-D"])
            .arg(server.dir.path().join("data"))
            .arg("--pwfile")
            .arg(server.dir.path().join("password"))
            .output()
            .expect("initdb runs");
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        server.resume();
        server
    }

    /// Starts it again, and waits until it answers.
    pub fn resume(&mut self) {
        self.begin_again();
        self.wait_until_up();
    }

    /// Waits until it answers.
    pub fn wait_until_up(&self) {
        wait_for("PostgreSQL to answer", || self.try_sql("SELECT 1").ok());
    }

    /// Starts it again, and waits for nothing.
    pub fn begin_again(&mut self) {
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(self.dir.path().join("log"))
            .expect("a log");
        let mut command = self.command("postgres");
        command.arg("-D").arg(self.dir.path().join("data")).args(["-p", &self.port.to_string()]);
        command.args(["-c", "listen_addresses=127.0.0.1", "-c"]);
        command.arg(format!("unix_socket_directories={}", self.dir.path().display()));
        for setting in &self.settings {
            command.args(["-c", setting]);
        }
        command.stdout(log.try_clone().expect("a handle")).stderr(log);
        self.child = Some(command.spawn().expect("postgres starts"));
    }

    /// Kills it with all its children, as a loss of power of its machine would but for the disk's cache.
    pub fn kill(&mut self) {
        let Some(mut child) = self.child.take() else { return };
        let children = children_of(child.id());
        let _ = child.kill();
        for pid in &children {
            // SAFETY: kill(2) of a process that is a child of our own child.
            unsafe { libc::kill(*pid, libc::SIGKILL) };
        }
        let _ = child.wait();
        // It does not start while one of them is there, which has its memory.
        wait_for("its children to be gone", || children.iter().all(|pid| is_gone(*pid)).then_some(()));
    }

    /// Where it is, for the settings of a gateway; the password is not in it.
    pub fn url(&self) -> String {
        format!("postgres://headgate@127.0.0.1:{}/postgres", self.port)
    }

    /// A gateway that stores into it.
    pub fn stored_into(&self, setup: Setup) -> Setup {
        setup.set("storage.postgres.url", self.url()).set("storage.postgres.password", PASSWORD)
    }

    /// What `psql` prints for a statement: a line a row, columns with | between.
    pub fn sql(&self, statement: &str) -> Vec<String> {
        self.try_sql(statement).unwrap_or_else(|error| panic!("{statement}: {error}"))
    }

    pub fn try_sql(&self, statement: &str) -> Result<Vec<String>, String> {
        let asked = Command::new("psql")
            .args(["-XAtq", "-v", "ON_ERROR_STOP=1", "-h", "127.0.0.1", "-p", &self.port.to_string()])
            .args(["-U", "headgate", "-d", "postgres", "-c"])
            .arg(format!("SET search_path = headgate, public; {statement}"))
            .env("PGPASSWORD", PASSWORD)
            .env("PGCONNECT_TIMEOUT", "20")
            .stdin(Stdio::null())
            .output()
            .expect("psql runs");
        match asked.status.success() {
            true => Ok(String::from_utf8_lossy(&asked.stdout).lines().map(str::to_owned).collect()),
            false => Err(String::from_utf8_lossy(&asked.stderr).into_owned()),
        }
    }

    /// Starts it again with TLS.
    pub fn use_tls(&mut self, certificate: &Path, key: &Path) {
        self.kill();
        self.settings.extend([
            "ssl=on".to_owned(),
            format!("ssl_cert_file={}", certificate.display()),
            format!("ssl_key_file={}", key.display()),
        ]);
        self.resume();
    }

    /// Starts it again with TLS for those alone who show a certificate of this issuer's with their name.
    pub fn want_certificates(&mut self, issuer: &Path) {
        self.kill();
        let rules = "hostssl all all 127.0.0.1/32 cert\nhostnossl all all 127.0.0.1/32 scram-sha-256\n";
        let rules = self.put_file("pg_hba.conf", rules.as_bytes());
        self.settings
            .extend([format!("ssl_ca_file={}", issuer.display()), format!("hba_file={}", rules.display())]);
        self.resume();
    }

    /// Puts a file beside its data that it may read.
    pub fn put_file(&self, name: &str, content: &[u8]) -> PathBuf {
        let path = self.dir.path().join(name);
        std::fs::write(&path, content).expect("written");
        give_to_server(&path);
        path
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(programs().join(program));
        command.current_dir(self.dir.path()).stdin(Stdio::null()).env("LC_ALL", "C");
        if let Some((user, group)) = server_user() {
            command.uid(user).gid(group);
        }
        command
    }
}

impl Drop for PostgresServer {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Where Debian has the newest version.
fn programs() -> PathBuf {
    let versions = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let found =
        versions.map(|version| version.path().join("bin")).filter(|bin| bin.join("postgres").exists()).max();
    found.expect("PostgreSQL is installed (apt-get install postgresql)")
}

/// The user that a server of root's runs as.
fn server_user() -> Option<(u32, u32)> {
    // SAFETY: geteuid(2) has no arguments and cannot fail.
    if unsafe { libc::geteuid() } != 0 {
        return None;
    }
    let users = std::fs::read_to_string("/etc/passwd").expect("/etc/passwd");
    let line =
        users.lines().find(|line| line.starts_with("postgres:")).expect("Debian's package makes the user");
    let mut fields = line.split(':').skip(2).map(|field| field.parse().expect("a number"));
    Some((fields.next().expect("a user"), fields.next().expect("a group")))
}

fn give_to_server(path: &Path) {
    if let Some((user, group)) = server_user() {
        std::os::unix::fs::chown(path, Some(user), Some(group)).expect("root may");
    }
    let mode = if path.is_dir() { 0o700 } else { 0o600 };
    let mode = std::os::unix::fs::PermissionsExt::from_mode(mode);
    std::fs::set_permissions(path, mode).expect("root may");
}

/// Whether a process has ended, even if nobody has been told of it.
fn is_gone(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(") ").next().is_none_or(|rest| rest.is_empty() || rest.starts_with('Z'))
}

fn children_of(parent: u32) -> Vec<i32> {
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let is_child = |pid: &i32| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let after_name = stat.rsplit(") ").next().unwrap_or_default();
        after_name.split(' ').nth(1) == Some(&*parent.to_string())
    };
    processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).filter(is_child).collect()
}

//! `config/kubernetes`: what the API server would take, and what the gateway understands of it.

use std::collections::BTreeSet;
use std::process::Command;

use serde_json::Value;

use crate::common::{Gateway, python, scratch};
use crate::{installed, project, text};

const FILES: [&str; 2] = ["config/kubernetes/headgate.yaml", "config/kubernetes/cluster.yaml"];

/// The objects of a file.
fn objects(file: &str) -> Vec<Value> {
    let program = "import json, sys, yaml; print(json.dumps(list(yaml.safe_load_all(open(sys.argv[1])))))";
    let output = python(program, &[project(file).to_str().expect("UTF-8")]);
    assert!(output.status.success(), "{file}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("JSON")
}

fn of_kind(objects: &[Value], kind: &str) -> Vec<Value> {
    objects.iter().filter(|object| object["kind"] == kind).cloned().collect()
}

fn list<'a>(value: &'a Value, pointer: &str) -> &'a Vec<Value> {
    value.pointer(pointer).and_then(Value::as_array).unwrap_or_else(|| panic!("{pointer}"))
}

/// Every setting, by the name of its variable; `config/headgate.toml` has them all, which another test sees to.
fn variables() -> BTreeSet<String> {
    fn walk(value: &Value, path: &str, found: &mut BTreeSet<String>) {
        match value {
            Value::Object(members) => members.iter().for_each(|(name, value)| {
                walk(value, &format!("{path}__{name}"), found);
            }),
            _ => _ = found.insert(format!("HEADGATE{}", &path.to_uppercase()[1..])),
        }
    }
    let config: Value = toml::from_str(&text("config/headgate.toml")).expect("TOML");
    let mut found = BTreeSet::new();
    walk(&config, "", &mut found);
    found
}

#[test]
fn the_objects_are_those_that_the_api_server_knows() {
    for file in FILES {
        let output = Command::new(installed("venv/bin/kubernetes-validate"))
            .args(["--strict", "--kubernetes-version", "1.30"])
            .arg(project(file))
            .output()
            .expect("there is kubernetes-validate (tests/run installs it)");
        let words = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        assert!(output.status.success(), "{file}: {words}");
        assert_eq!(words.matches(" passed ").count(), objects(file).len(), "{words}");
    }
}

#[test]
fn every_name_in_them_leads_to_something() {
    let known = variables();
    assert!(known.contains("HEADGATE_NATS__STREAM__REPLICAS"), "{known:?}");
    let dir = scratch();
    let gateway = Gateway::start(dir.path());
    for file in FILES {
        let objects = objects(file);
        let set = &of_kind(&objects, "StatefulSet")[0];
        let pod = set.pointer("/spec/template/spec").expect("a pod");
        let container = &pod["containers"][0];
        let mut listens = BTreeSet::new();
        let variables: Vec<String> =
            list(container, "/env").iter().map(|env| env["name"].to_string()).collect();
        for env in list(container, "/env") {
            let (name, value) =
                (env["name"].as_str().expect("a name"), env["value"].as_str().expect("a value"));
            assert!(known.contains(name), "{file}: {name} is no setting");
            if name.ends_with("__LISTEN") {
                let address: std::net::SocketAddr = value.parse().expect("an address");
                assert!(address.ip().is_unspecified(), "a pod's loopback is reached by nobody: {value}");
                listens.insert(u64::from(address.port()));
            }
        }
        assert_eq!(variables.iter().collect::<BTreeSet<_>>().len(), variables.len(), "{file}");
        // What is commented out is understood too.
        for name in text(file).split(|c: char| !c.is_ascii_alphanumeric() && c != '_') {
            let is_setting = !name.starts_with("HEADGATE_") || known.contains(name);
            assert!(is_setting, "{file}: {name} is no setting");
        }
        let ports = list(container, "/ports");
        let numbers: BTreeSet<u64> =
            ports.iter().map(|port| port["containerPort"].as_u64().expect("a port")).collect();
        assert!(listens.is_subset(&numbers), "{file}: {listens:?} {numbers:?}");
        let names: BTreeSet<&str> = ports.iter().map(|port| port["name"].as_str().expect("a name")).collect();
        let labels = set.pointer("/spec/template/metadata/labels").expect("labels");
        assert_eq!(set.pointer("/spec/selector/matchLabels"), Some(labels), "{file}");
        let services = of_kind(&objects, "Service");
        for service in &services {
            assert_eq!(&service["spec"]["selector"], labels, "{file}");
            for port in list(service, "/spec/ports") {
                assert!(names.contains(port["targetPort"].as_str().expect("by name")), "{file}: {port}");
            }
        }
        let named: Vec<&Value> = services.iter().map(|service| &service["metadata"]["name"]).collect();
        assert!(named.contains(&&set["spec"]["serviceName"]), "{file}: its service is there");
        for budget in of_kind(&objects, "PodDisruptionBudget") {
            assert_eq!(budget.pointer("/spec/selector/matchLabels"), Some(labels), "{file}");
        }
        for probe in ["startupProbe", "livenessProbe", "readinessProbe"] {
            let get = &container[probe]["httpGet"];
            assert_eq!(get["port"], "http", "{file}: {probe}");
            let path = get["path"].as_str().expect("a path");
            assert_eq!(path, if probe == "readinessProbe" { "/readyz" } else { "/livez" });
            assert_eq!(gateway.get(path, "").status, 200);
        }
        let claims = list(set, "/spec/volumeClaimTemplates").iter().map(|claim| &claim["metadata"]["name"]);
        let volumes: Vec<&Value> =
            list(pod, "/volumes").iter().map(|volume| &volume["name"]).chain(claims).collect();
        for mount in list(container, "/volumeMounts") {
            assert!(volumes.contains(&&mount["name"]), "{file}: {mount}");
        }
        // A drain has to fit, and nothing of it is root's.
        assert!(pod["terminationGracePeriodSeconds"].as_u64().is_some_and(|grace| grace > 10), "{file}");
        assert_eq!(pod["securityContext"]["runAsNonRoot"], true, "{file}");
        assert_eq!(container["securityContext"]["readOnlyRootFilesystem"], true, "{file}");
        let containerfile = text("config/container/Containerfile");
        let of = &pod["securityContext"];
        let user = format!("USER {}:{}", of["runAsUser"], of["runAsGroup"]);
        assert!(
            containerfile.lines().any(|line| line == user),
            "{file}: the image's user is another than {user}"
        );
    }
}

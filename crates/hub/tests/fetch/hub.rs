use std::collections::BTreeMap;
use std::net::TcpListener;
use std::time::{Duration, Instant};

use oxiformers_hub::cache::{self, Kind, Verdict};
use oxiformers_hub::{Error, Event, FetchOptions, Source, fetch_dataset, resolve};
use serde_json::{Value, json};
use sha1::Digest;

use crate::server::{Route, Server};
use crate::{Random, files_below, hex, noise, options, sha256, spawn};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

fn git(content: &[u8]) -> String {
    let mut hasher = sha1::Sha1::new_with_prefix(format!("blob {}\0", content.len()));
    hasher.update(content);
    hex(&hasher.finalize())
}

/// A Hub with one repository, whose large files (`.safetensors`, `.gguf`) lie on a server of their own.
struct Hub {
    hub: Server,
    store: Server,
}

impl Hub {
    fn new(files: &[(&str, &[u8])], cuts: &[usize]) -> Self {
        let (hub, store) = (Server::new(), Server::new());
        let mut tree: Vec<Value> = vec![json!({"type": "directory", "oid": git(b""), "path": "folder"})];
        for (name, content) in files {
            let large = name.ends_with(".safetensors") || name.ends_with(".gguf");
            let mut entry = json!({"type": "file", "oid": git(content), "size": content.len(), "path": name});
            let path = format!("/org/name/resolve/{COMMIT}/{name}");
            if large {
                entry["lfs"] = json!({"oid": sha256(content), "size": content.len(), "pointerSize": 134});
                let to = format!("{}/{name}", store.url);
                let answer =
                    Route::redirect(&to).header("X-Linked-Etag", &format!("\"{}\"", sha256(content)));
                hub.route(&path, answer);
                store.route(
                    &format!("/{name}"),
                    Route::new(*content).cut(cuts.iter().copied()),
                );
            } else {
                hub.route(
                    &path,
                    Route::new(*content).header("ETag", &format!("\"{}\"", git(content))),
                );
            }
            tree.push(entry);
        }
        let info = json!({"id": "org/name", "_id": "1", "sha": COMMIT, "private": false, "siblings": []});
        hub.route("/api/models/org/name/revision/main", Route::new(info.to_string()));
        hub.route(
            &format!("/api/models/org/name/tree/{COMMIT}"),
            Route::new(Value::from(tree).to_string()),
        );
        Self { hub, store }
    }

    /// Number of requests for the content of files.
    fn transfers(&self) -> usize {
        let content = |server: &Server| {
            server
                .log()
                .iter()
                .filter(|request| request.method == "GET" && !request.path.starts_with("/api"))
                .count()
        };
        content(&self.hub) + content(&self.store)
    }
}

fn source(text: &str) -> Source {
    text.parse().unwrap()
}

#[test]
fn the_layout_of_the_cache() {
    let weights = noise(1, 400_000);
    let files: [(&str, &[u8]); 5] = [
        ("config.json", b"{\"model_type\": \"llama\"}"),
        ("README.md", b"words"),
        ("1_Pooling/config.json", b"{}"),
        ("model.safetensors", &weights),
        ("pytorch_model.bin", b"not wanted"),
    ];
    let hub = Hub::new(&files, &[]);
    let home = tempfile::tempdir().unwrap();
    let options = FetchOptions {
        token: Some("secret".into()),
        ..options(home.path(), &hub.hub.url)
    };
    let model = resolve(&source("org/name"), &options).unwrap();
    assert_eq!(
        model.names().collect::<Vec<_>>(),
        ["1_Pooling/config.json", "config.json", "model.safetensors"]
    );
    assert_eq!(model.get("model.safetensors").unwrap().unwrap(), weights);

    let repo = options.hub_cache.join("models--org--name");
    assert_eq!(std::fs::read_to_string(repo.join("refs/main")).unwrap(), COMMIT);
    let mut expected = vec![
        "refs/main".to_owned(),
        format!("blobs/{}", git(files[0].1)),
        format!("blobs/{}", git(b"{}")),
        format!("blobs/{}", sha256(&weights)),
    ];
    expected.extend(model.names().map(|name| format!("snapshots/{COMMIT}/{name}")));
    expected.sort();
    assert_eq!(files_below(&repo), expected);
    #[cfg(unix)]
    {
        let link =
            std::fs::read_link(repo.join(format!("snapshots/{COMMIT}/1_Pooling/config.json"))).unwrap();
        assert_eq!(link.to_str().unwrap(), format!("../../../blobs/{}", git(b"{}")));
    }
    // The token goes to the Hub and nowhere else.
    let authorized = |server: &Server| {
        server
            .log()
            .iter()
            .filter(|request| request.headers.contains_key("authorization"))
            .count()
    };
    assert_eq!(authorized(&hub.hub), hub.hub.log().len());
    assert_eq!(authorized(&hub.store), 0);

    // Again: the Hub is asked what is new, and nothing is.
    let transfers = hub.transfers();
    resolve(&source("org/name@main"), &options).unwrap();
    assert_eq!(hub.transfers(), transfers);

    // Offline: nobody is asked.
    let asked = hub.hub.log().len();
    let offline = FetchOptions {
        offline: true,
        ..options.clone()
    };
    assert_eq!(resolve(&source("org/name"), &offline).unwrap().names().count(), 3);
    assert_eq!(
        resolve(&source(&format!("org/name@{COMMIT}")), &offline)
            .unwrap()
            .names()
            .count(),
        3
    );
    assert!(matches!(
        resolve(&source("org/name@other"), &offline),
        Err(Error::Offline { .. })
    ));
    assert_eq!(hub.hub.log().len(), asked);

    // Out of reach: the cache, and a word about it.
    drop(hub);
    let notices = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
    let seen = notices.clone();
    let told = options.clone().with_progress(move |event: Event<'_>| {
        if let Event::Notice(text) = event {
            seen.lock().unwrap().push(text.to_owned());
        }
    });
    assert_eq!(resolve(&source("org/name"), &told).unwrap().names().count(), 3);
    assert!(notices.lock().unwrap()[0].contains("cannot be reached"));

    let models = cache::list(&options).unwrap();
    assert_eq!((models[0].kind, models[0].name.as_str()), (Kind::Hub, "org/name"));
    assert_eq!(models[0].size, 400_000 + 23 + 2);
    assert_eq!(models[0].revisions[0].refs, ["main"]);
    assert!(
        cache::verify(None, &options)
            .unwrap()
            .iter()
            .all(|file| file.verdict == Verdict::Good)
    );
    std::fs::write(repo.join("blobs").join(git(b"{}")), "[]").unwrap();
    std::fs::remove_file(repo.join("blobs").join(sha256(&weights))).unwrap();
    let verdicts: BTreeMap<String, Verdict> = cache::verify(Some("org/name"), &options)
        .unwrap()
        .into_iter()
        .map(|file| (file.file, file.verdict))
        .collect();
    assert!(matches!(
        verdicts[&format!("blobs/{}", git(b"{}"))],
        Verdict::Corrupt { .. }
    ));
    assert_eq!(
        verdicts[&format!("snapshots/{COMMIT}/model.safetensors")],
        Verdict::Missing
    );
    // Without its weights it is not a model any more.
    assert!(matches!(
        resolve(&source("org/name"), &offline),
        Err(Error::Offline { .. })
    ));
    cache::remove("org/name", &options).unwrap();
    assert!(cache::list(&options).unwrap().is_empty());
}

#[test]
fn shards_and_broken_connections() {
    let (a, b) = (noise(2, 150_000), noise(3, 150_000));
    let index = br#"{"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}"#;
    let files: [(&str, &[u8]); 5] = [
        ("config.json", b"{}"),
        ("model.safetensors.index.json", index),
        ("a.safetensors", &a),
        ("b.safetensors", &b),
        ("consolidated.safetensors", b"not wanted"),
    ];
    let mut random = Random(5);
    for _ in 0..4 {
        let cuts: Vec<usize> = (0..3).map(|_| random.below(150_000) as usize).collect();
        let hub = Hub::new(&files, &cuts);
        let home = tempfile::tempdir().unwrap();
        let model = resolve(&source("org/name"), &options(home.path(), &hub.hub.url)).unwrap();
        assert_eq!(
            model.names().collect::<Vec<_>>(),
            [
                "a.safetensors",
                "b.safetensors",
                "config.json",
                "model.safetensors.index.json"
            ]
        );
        assert_eq!(model.get("b.safetensors").unwrap().unwrap(), b);
        assert!(
            hub.store
                .log()
                .iter()
                .any(|request| request.headers.contains_key("range"))
        );
    }
}

#[test]
fn one_gguf_of_a_repository() {
    let files: [(&str, &[u8]); 3] = [
        ("m.Q4_K_M.gguf", b"GGUF4"),
        ("m.Q8_0.gguf", b"GGUF8"),
        ("config.json", b"{}"),
    ];
    let hub = Hub::new(&files, &[]);
    let home = tempfile::tempdir().unwrap();
    let options = options(home.path(), &hub.hub.url);
    let names = |text: &str| -> Vec<String> {
        resolve(&source(text), &options)
            .unwrap()
            .names()
            .map(str::to_owned)
            .collect()
    };
    assert_eq!(names("org/name"), ["m.Q4_K_M.gguf"]);
    assert_eq!(names("org/name:Q8_0"), ["m.Q8_0.gguf"]);
    assert_eq!(names("org/name:m.Q8_0.gguf"), ["m.Q8_0.gguf"]);
    let error = resolve(&source("org/name:Q2_K"), &options)
        .unwrap_err()
        .to_string();
    assert!(error.contains("m.Q8_0.gguf"), "{error}");
}

#[test]
fn many_at_once_fetch_it_once() {
    let weights = noise(4, 200_000);
    let hub = Hub::new(&[("config.json", b"{}"), ("model.safetensors", &weights)], &[]);
    let home = tempfile::tempdir().unwrap();
    let options = options(home.path(), &hub.hub.url);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let model = resolve(&source("org/name"), &options).unwrap();
                assert_eq!(model.get("model.safetensors").unwrap().unwrap(), weights);
            });
        }
    });
    assert_eq!(hub.store.count("/model.safetensors"), 1);
}

#[test]
fn processes_that_are_killed_and_processes_side_by_side() {
    let weights = noise(6, 1_200_000);
    let hub = Hub::new(&[("config.json", b"{}"), ("model.safetensors", &weights)], &[]);
    hub.store.route(
        "/model.safetensors",
        Route::new(weights.clone()).pace(Duration::from_millis(10)),
    );
    let home = tempfile::tempdir().unwrap();
    let options = options(home.path(), &hub.hub.url);
    let offline = FetchOptions {
        offline: true,
        ..options.clone()
    };
    let mut random = Random(17);
    let mut killed = 0;
    for _ in 0..20 {
        let mut child = spawn("org/name", home.path(), &hub.hub.url);
        std::thread::sleep(Duration::from_millis(10 + random.below(190)));
        killed += usize::from(child.try_wait().unwrap().is_none());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(
            cache::verify(None, &options)
                .unwrap()
                .iter()
                .all(|file| file.verdict == Verdict::Good)
        );
        // What the cache gives out is whole.
        if let Ok(model) = resolve(&source("org/name"), &offline) {
            assert_eq!(model.get("model.safetensors").unwrap().unwrap(), weights);
        }
    }
    assert!(killed >= 2, "{killed}");
    let model = resolve(&source("org/name"), &options).unwrap();
    assert_eq!(model.get("model.safetensors").unwrap().unwrap(), weights);
    assert!(
        hub.store
            .log()
            .iter()
            .any(|request| request.headers.contains_key("range"))
    );

    // An empty cache and three processes: one transfer.
    let home = tempfile::tempdir().unwrap();
    let before = hub.store.count("/model.safetensors");
    let mut children: Vec<_> = (0..3)
        .map(|_| spawn("org/name", home.path(), &hub.hub.url))
        .collect();
    assert!(children.iter_mut().all(|child| child.wait().unwrap().success()));
    assert_eq!(hub.store.count("/model.safetensors"), before + 1);
}

#[test]
fn hostile_answers() {
    let home = tempfile::tempdir().unwrap();
    for name in [
        "../../evil.json",
        "/etc/evil.json",
        "a/../../evil.json",
        "..\\evil.json",
    ] {
        let hub = Hub::new(&[(name, b"{}"), ("model.safetensors", b"x")], &[]);
        let error = resolve(&source("org/name"), &options(home.path(), &hub.hub.url)).unwrap_err();
        assert!(matches!(error, Error::UnsafePath { .. }), "{name}: {error}");
    }
    let hub = Hub::new(&[("model.safetensors", b"weights")], &[]);
    hub.store.route("/model.safetensors", Route::new(*b"WEIGHTS"));
    let error = resolve(&source("org/name"), &options(home.path(), &hub.hub.url)).unwrap_err();
    assert!(matches!(error, Error::Checksum { .. }), "{error}");
    hub.store
        .route("/model.safetensors", Route::new(vec![0; 100_000]));
    let fast = FetchOptions {
        retries: 1,
        ..options(home.path(), &hub.hub.url)
    };
    let error = resolve(&source("org/name"), &fast).unwrap_err();
    assert!(error.to_string().contains("more than the 7 bytes"), "{error}");
    let info = json!({"id": "org/name", "sha": "../../evil"});
    hub.hub
        .route("/api/models/org/name/revision/main", Route::new(info.to_string()));
    let error = resolve(&source("org/name"), &options(home.path(), &hub.hub.url)).unwrap_err();
    assert!(error.to_string().contains("40 hexadecimal digits"), "{error}");
    assert!(
        files_below(home.path()).is_empty(),
        "{:?}",
        files_below(home.path())
    );
}

#[test]
fn a_hub_that_does_not_answer() {
    let home = tempfile::tempdir().unwrap();
    // Refused, silent after connecting, and a name that does not exist.
    let refused = Server::new().url.clone();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let silent = format!("http://{}", listener.local_addr().unwrap());
    for endpoint in [refused, silent, "http://no-such-host.invalid".to_owned()] {
        let begin = Instant::now();
        let error = resolve(&source("org/name"), &options(home.path(), &endpoint)).unwrap_err();
        assert!(
            matches!(error, Error::Unreachable { .. }) && error.is_unreachable(),
            "{endpoint}: {error}"
        );
        assert!(!error.to_string().contains('\n'));
        assert!(
            begin.elapsed() < Duration::from_secs(3),
            "{endpoint}: {:?}",
            begin.elapsed()
        );
    }
}

#[test]
fn what_the_hub_does_not_have() {
    let hub = Hub::new(&[("config.json", b"{}"), ("README.md", b"")], &[]);
    let home = tempfile::tempdir().unwrap();
    let options = options(home.path(), &hub.hub.url);
    let error = |text: &str| resolve(&source(text), &options).unwrap_err();
    assert!(
        matches!(error("org/other"), Error::NotFound { .. }),
        "{}",
        error("org/other")
    );
    assert!(
        error("org/name@v9").to_string().contains("org/name@v9"),
        "{}",
        error("org/name@v9")
    );
    assert!(
        error("org/name").to_string().contains("weight file"),
        "{}",
        error("org/name")
    );
    for (status, text) in [(401, "HF_TOKEN"), (403, "access denied"), (500, "500")] {
        hub.hub.route(
            "/api/models/org/name/revision/main",
            Route {
                status,
                ..Route::default()
            },
        );
        assert!(
            error("org/name").to_string().contains(text),
            "{status}: {}",
            error("org/name")
        );
    }
}

#[test]
fn files_of_a_data_set() {
    let hub = Server::new();
    let files: [(&str, &[u8]); 3] = [
        ("README.md", b"words"),
        ("data/test.jsonl", b"{\"text\": \"b\"}\n"),
        ("data/train.jsonl", b"{\"text\": \"a\"}\n"),
    ];
    let entry = |(name, content): &(&str, &[u8])| json!({"type": "file", "oid": git(content), "size": content.len(), "path": name});
    let tree: Vec<Value> = files.iter().map(entry).collect();
    for (name, content) in files {
        let route = Route::new(content).header("ETag", &format!("\"{}\"", git(content)));
        hub.route(&format!("/datasets/org/name/resolve/{COMMIT}/{name}"), route);
    }
    let info = json!({"id": "org/name", "_id": "1", "sha": COMMIT, "private": false, "siblings": []});
    hub.route(
        "/api/datasets/org/name/revision/main",
        Route::new(info.to_string()),
    );
    let path = format!("/api/datasets/org/name/tree/{COMMIT}");
    hub.route(&path, Route::new(Value::from(tree).to_string()));

    let home = tempfile::tempdir().unwrap();
    let mut options = options(home.path(), &hub.url);
    let train = |options: &FetchOptions| {
        fetch_dataset("org/name", None, &|name| name.ends_with("train.jsonl"), options)
    };
    let found = train(&options).unwrap();
    assert_eq!(found.names().collect::<Vec<_>>(), ["data/train.jsonl"]);
    assert_eq!(found.get("data/train.jsonl").unwrap().unwrap(), files[2].1);
    let snapshot = options
        .hub_cache
        .join("datasets--org--name/snapshots")
        .join(COMMIT);
    assert!(snapshot.join("data/train.jsonl").is_file() && !snapshot.join("data/test.jsonl").exists());
    let error = fetch_dataset("org/name", None, &|name| name == "x", &options).unwrap_err();
    assert!(error.to_string().contains("data/train.jsonl"), "{error}");
    assert!(fetch_dataset("../name", None, &|_| true, &options).is_err());
    options.offline = true;
    assert_eq!(train(&options).unwrap().names().count(), 1);
}

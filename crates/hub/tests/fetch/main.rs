//! Fetching, against a server of our own: interrupted, broken, slow, hostile and absent servers.

mod hub;
mod packages;
mod server;

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use oxiformers_hub::{FetchOptions, resolve};
use sha2::{Digest, Sha256};

/// Options that keep everything in `home` and ask only `url`.
fn options(home: &Path, url: &str) -> FetchOptions {
    FetchOptions {
        home: home.to_path_buf(),
        hub_cache: home.join("hub"),
        endpoint: url.into(),
        index_url: format!("{url}/simple"),
        connect_timeout: Duration::from_millis(800),
        ..FetchOptions::default()
    }
}

/// Bytes that do not compress, the same for the same seed (xorshift64*).
fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut random = Random(seed);
    (0..length).map(|_| random.next() as u8).collect()
}

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 32
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// All files below a folder, locks left out.
fn files_below(folder: &Path) -> Vec<String> {
    fn walk(folder: &Path, root: &Path, all: &mut Vec<String>) {
        for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
            let path = entry.path();
            if entry.file_type().unwrap().is_dir() {
                walk(&path, root, all);
            } else if path.extension().is_none_or(|end| end != "lock") {
                all.push(path.strip_prefix(root).unwrap().to_str().unwrap().to_owned());
            }
        }
    }
    let mut all = Vec::new();
    walk(folder, folder, &mut all);
    all.sort();
    all
}

/// Fetches in another process.
fn spawn(source: &str, home: &Path, url: &str) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "child"])
        .env("FETCH_TEST_SOURCE", source)
        .env("FETCH_TEST_HOME", home)
        .env("FETCH_TEST_URL", url)
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

#[test]
#[ignore = "the other process of the tests beside it"]
fn child() {
    let var = |name: &str| std::env::var(name).expect("started by another test");
    let options = options(Path::new(&var("FETCH_TEST_HOME")), &var("FETCH_TEST_URL"));
    resolve(&var("FETCH_TEST_SOURCE").parse().unwrap(), &options).unwrap();
}

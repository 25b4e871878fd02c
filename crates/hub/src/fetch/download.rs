//! One file from a server into the cache: once, whole, verified.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures::StreamExt;
use futures::future::BoxFuture;
use sha1::Sha1;
use sha2::{Digest as _, Sha256};

use super::http::{self, Body};
use super::progress::Event;
use crate::{Error, FetchOptions, Result};

/// How a publisher signs a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Checksum {
    Sha256(String),
    /// Git's name of a file: SHA-1 over `blob LENGTH\0` and the content.
    Git {
        id: String,
        size: u64,
    },
}

/// A checksum while it is being computed.
enum Hasher {
    Sha256(Sha256),
    Git(Sha1),
}

impl Checksum {
    /// The checksum that a name of 64 or 40 hexadecimal digits stands for, as blobs of the Hub have it.
    pub(crate) fn of_name(name: &str, size: u64) -> Option<Self> {
        match name.len() {
            _ if !name.bytes().all(|byte| byte.is_ascii_hexdigit()) => None,
            64 => Some(Self::Sha256(name.to_ascii_lowercase())),
            40 => Some(Self::Git {
                id: name.to_ascii_lowercase(),
                size,
            }),
            _ => None,
        }
    }

    fn hasher(&self) -> Hasher {
        match self {
            Self::Sha256(_) => Hasher::Sha256(Sha256::new()),
            Self::Git { size, .. } => Hasher::Git(Sha1::new_with_prefix(format!("blob {size}\0"))),
        }
    }

    fn expected(&self) -> &str {
        match self {
            Self::Sha256(id) | Self::Git { id, .. } => id,
        }
    }

    fn check(&self, hasher: Hasher, file: &str) -> Result<()> {
        let actual = hasher.finish();
        if actual == self.expected() {
            return Ok(());
        }
        Err(Error::Checksum {
            file: file.into(),
            expected: self.expected().into(),
            actual,
        })
    }

    /// Compares the whole file at `path`.
    pub(crate) fn check_file(&self, path: &Path) -> Result<()> {
        let mut hasher = self.hasher();
        let mut file = File::open(path).map_err(Error::io(path))?;
        feed(&mut file, &mut hasher).map_err(Error::io(path))?;
        self.check(hasher, &path.display().to_string())
    }
}

impl Hasher {
    fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Sha256(hasher) => hasher.update(bytes),
            Self::Git(hasher) => hasher.update(bytes),
        }
    }

    fn finish(self) -> String {
        match self {
            Self::Sha256(hasher) => hex(&hasher.finalize()),
            Self::Git(hasher) => hex(&hasher.finalize()),
        }
    }
}

/// Lower-case hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Reads a file to its end; the number of bytes.
fn feed(file: &mut File, hasher: &mut Hasher) -> io::Result<u64> {
    let mut buffer = vec![0; 1 << 20];
    let mut length = 0;
    loop {
        let count = file.read(&mut buffer)?;
        if count == 0 {
            return Ok(length);
        }
        hasher.update(&buffer[..count]);
        length += count as u64;
    }
}

/// An exclusive lock between processes, held until it is dropped. The lock file stays: removing it would let
/// two processes hold locks on two files of the same name.
pub(crate) struct Lock(#[expect(dead_code, reason = "closing the file gives the lock back")] File);

impl Lock {
    /// Waits until no other process holds the lock at `path`; `file` is what it is about.
    pub(crate) fn acquire(path: &Path, file: &str, options: &FetchOptions) -> Result<Self> {
        create_parent(path)?;
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(path)
            .map_err(Error::io(path))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                options.progress.event(Event::Waiting { file });
                lock.lock().map_err(Error::io(path))?;
            }
            // A file system without locks (some network shares): better one process than none.
            Err(TryLockError::Error(error)) if error.kind() == io::ErrorKind::Unsupported => {
                tracing::warn!(path = %path.display(), "the file system has no locks: do not fetch in parallel");
            }
            Err(TryLockError::Error(error)) => return Err(Error::io(path)(error)),
        }
        Ok(Self(lock))
    }
}

/// A file to fetch.
pub(crate) struct Download<'a> {
    /// What it is called in messages and progress.
    pub file: &'a str,
    /// Where it is to lie in the end.
    pub target: &'a Path,
    /// The lock that guards it.
    pub lock: &'a Path,
    /// Its length, if known.
    pub size: Option<u64>,
    /// Its checksum, if known.
    pub checksum: Option<Checksum>,
    pub options: &'a FetchOptions,
}

/// Opens the bytes from an offset on; the second number counts the attempts that failed just before.
pub(crate) type Open<'a> = dyn Fn(u64, u32) -> BoxFuture<'a, Result<Body>> + Send + Sync + 'a;

impl Download<'_> {
    /// Fetches the file unless it is there. It comes into `TARGET.incomplete`, where an interrupted transfer
    /// goes on; it is verified, synced and only then renamed.
    pub(crate) fn run(&self, open: &Open<'_>) -> Result<()> {
        if self.target.is_file() {
            return Ok(());
        }
        let _lock = Lock::acquire(self.lock, self.file, self.options)?;
        if self.target.is_file() {
            self.event(Event::Done { file: self.file });
            return Ok(());
        }
        create_parent(self.target)?;
        let part = with_suffix(self.target, ".incomplete");
        let resumed = part.metadata().is_ok_and(|meta| meta.len() > 0);
        let result = match self.transfer(&part, open) {
            // What an earlier run left may have been wrong: begin anew, once.
            Err(Error::Checksum { .. }) if resumed => self.transfer(&part, open),
            other => other,
        };
        result?;
        std::fs::rename(&part, self.target).map_err(Error::io(self.target))?;
        sync_parent(self.target);
        self.event(Event::Done { file: self.file });
        Ok(())
    }

    /// Brings the partial file to its end and verifies it. A wrong or empty one is removed.
    fn transfer(&self, part: &Path, open: &Open<'_>) -> Result<()> {
        let outcome = http::block_on(async || self.attempts(part, open).await);
        let useless = match &outcome {
            Ok(()) => false,
            Err(Error::Checksum { .. }) => true,
            Err(_) => part.metadata().is_ok_and(|meta| meta.len() == 0),
        };
        if useless {
            std::fs::remove_file(part).map_err(Error::io(part))?;
        }
        outcome
    }

    async fn attempts(&self, part: &Path, open: &Open<'_>) -> Result<()> {
        let io = |error| Error::io(part)(error);
        let mut file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .open(part)
            .map_err(io)?;
        let mut state = State {
            hasher: self.checksum.as_ref().map(Checksum::hasher),
            at: 0,
        };
        match &mut state.hasher {
            Some(hasher) => state.at = feed(&mut file, hasher).map_err(io)?,
            // Without a checksum nothing would tell whether the rest belongs to what is there.
            None => state.restart(self, &mut file).map_err(io)?,
        }
        if self.size.is_some_and(|size| state.at > size) {
            state.restart(self, &mut file).map_err(io)?;
        }
        let mut failed = 0;
        // A file that was interrupted after its last byte asks for nothing more.
        while self.size.is_none_or(|size| state.at < size) {
            let before = state.at;
            let result = self.receive(part, &mut file, &mut state, open, failed).await;
            let Err(error) = result else { break };
            failed = if state.at > before { 1 } else { failed + 1 };
            let began = state.at > 0;
            if failed > self.options.retries || !is_transient(&error, began) {
                return Err(error);
            }
            tracing::debug!(file = self.file, %error, at = state.at, "the transfer is taken up again");
            tokio::time::sleep(Duration::from_millis(100 << failed.min(6))).await;
        }
        if let Some(total) = self.size.filter(|total| *total != state.at) {
            let what = format!("has {} bytes, the publisher says {total}", state.at);
            return Err(Error::format(self.file, what));
        }
        if let (Some(checksum), Some(hasher)) = (&self.checksum, state.hasher.take()) {
            checksum.check(hasher, self.file)?;
        }
        file.sync_all().map_err(io)
    }

    /// One transfer, to its end or to its failure; `state` and the file agree in both cases.
    async fn receive(
        &self,
        part: &Path,
        file: &mut File,
        state: &mut State,
        open: &Open<'_>,
        failed: u32,
    ) -> Result<()> {
        let io = |error| Error::io(part)(error);
        // The client has limits of its own; these hold for whatever else brings the bytes.
        let patience = self.options.connect_timeout + self.options.read_timeout * 2;
        let stalled = |_| Error::Network {
            url: self.file.into(),
            status: None,
            reason: format!("nothing came for {} seconds", patience.as_secs()),
        };
        let mut body = tokio::time::timeout(patience, open(state.at, failed))
            .await
            .map_err(stalled)??;
        if body.offset != state.at {
            // The server does not resume.
            state.restart(self, file).map_err(io)?;
        }
        let total = self.size.or(body.total);
        self.event(Event::Start {
            file: self.file,
            at: state.at,
            total,
        });
        while let Some(chunk) = tokio::time::timeout(patience, body.stream.next())
            .await
            .map_err(stalled)?
        {
            let chunk = chunk?;
            let at = state.at + chunk.len() as u64;
            if let Some(total) = total.filter(|total| at > *total) {
                // Not the file that was promised, or all of it instead of its rest.
                state.restart(self, file).map_err(io)?;
                let reason = format!("sent more than the {total} bytes of the file");
                return Err(Error::Network {
                    url: self.file.into(),
                    status: None,
                    reason,
                });
            }
            file.write_all(&chunk).map_err(io)?;
            if let Some(hasher) = &mut state.hasher {
                hasher.update(&chunk);
            }
            state.at = at;
            self.event(Event::Advance { file: self.file, at });
        }
        match total {
            Some(total) if state.at < total => {
                let reason = format!("the transfer ended after {} of {total} bytes", state.at);
                Err(Error::Network {
                    url: self.file.into(),
                    status: None,
                    reason,
                })
            }
            _ => Ok(()),
        }
    }

    fn event(&self, event: Event<'_>) {
        self.options.progress.event(event);
    }
}

/// What is in the partial file.
struct State {
    hasher: Option<Hasher>,
    at: u64,
}

impl State {
    fn restart(&mut self, download: &Download<'_>, file: &mut File) -> io::Result<()> {
        self.hasher = download.checksum.as_ref().map(Checksum::hasher);
        self.at = 0;
        file.set_len(0)?;
        io::Seek::rewind(file)
    }
}

/// True for failures that another attempt may mend. A server that was never reached is not asked again: the
/// caller may know another one.
fn is_transient(error: &Error, began: bool) -> bool {
    match error {
        Error::Network { status, .. } => status.is_none_or(|status| matches!(status, 408 | 429 | 500..)),
        Error::Unreachable { .. } => began,
        _ => false,
    }
}

/// `path` with `suffix` behind its last component.
pub(crate) fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

pub(crate) fn create_parent(path: &Path) -> Result<()> {
    match path.parent() {
        Some(parent) => std::fs::create_dir_all(parent).map_err(Error::io(parent)),
        None => Ok(()),
    }
}

/// Makes a rename outlive a power cut, where the system allows folders to be synced.
pub(crate) fn sync_parent(path: &Path) {
    if let Some(folder) = path.parent().and_then(|parent| File::open(parent).ok()) {
        let _ = folder.sync_all();
    }
}

/// A name beside `path` that nobody else uses at the moment.
pub(crate) fn beside(path: &Path) -> PathBuf {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    with_suffix(
        path,
        &format!(
            ".{}-{}.tmp",
            std::process::id(),
            COUNT.fetch_add(1, Ordering::Relaxed)
        ),
    )
}

/// Writes a small file so that it is seen whole or not at all.
pub(crate) fn write_whole(path: &Path, content: &[u8]) -> Result<()> {
    create_parent(path)?;
    let part = beside(path);
    let write = || -> io::Result<()> {
        let mut file = File::create(&part)?;
        file.write_all(content)?;
        file.sync_all()?;
        std::fs::rename(&part, path)
    };
    write().map_err(Error::io(path))
}
